"""`<run>/ledger/`: which updates a training skipped, and where its time went.

`skipped-<batch>.json` tells which updates of a batch were skipped and what was in it. A training
that resumes before such a batch skips it again and writes the same file again, so that none is
counted twice. `goodput-<number>.json` is one worker group's account of its seconds
(jobs/training/goodput.py).
"""

import json
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from jobs.runs.lease import LeaseLostError
from pipeline.errors import CorpusError
from pipeline.storage import Store

log = logging.getLogger("tvq.ledger")

_GOODPUT = re.compile(r"goodput-(\d{8,})\.json")


@dataclass(frozen=True)
class SkippedUpdate:
    """An update that moved nothing."""

    update: int
    """Counted from 1, as metrics are."""
    loss: float
    """Nats per token; may be NaN or infinite."""
    gradient_norm: float
    """Global norm before clipping; may be NaN or infinite."""
    sigmas: float
    """Standard deviations of the loss above its moving mean."""


@dataclass(frozen=True)
class SkippedBatch:
    """A batch of which updates were skipped."""

    batch: int
    """Its index: `tvq inspect --run RUN --step BATCH` shows what is in it."""
    first_row: int
    """In the training's endless sequence of windows."""
    last_row: int
    """Itself included."""
    updates: list[SkippedUpdate]
    documents: list[str]
    """Those with tokens in it; none where the corpus could not be read then."""


class Ledger:
    """The writer of a run's ledger, on rank 0.

    Policy: a thread writes, so that no step waits for an object store. What it could not write is
    logged, and ends no training. `close` waits for what is under way. A group that may not write to
    the run any more writes nothing here either: an account could be that of the group after it.
    """

    def __init__(self, store: Store, may: Callable[[], None] = lambda: None):
        """
        Args:
            store: the run directory's.
            may: raises `LeaseLostError` if this group may not write (`Fence.check`).
        """
        self._store, self._may = store.child("ledger"), may
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        accounts = _accounts(self._store)
        self.earlier = [_read(self._store, name) for name in accounts.values()]
        """The accounts of the worker groups before this one, oldest first."""
        self._number = max(accounts, default=0) + 1

    def skipped(self, batch: SkippedBatch, documents: Callable[[], list[str]]) -> None:
        """Notes a batch with all its skipped updates; `documents` finds its documents, which may
        take a while."""
        self._pool.submit(self._write_skipped, batch, documents)

    def account(self, fields: dict[str, Any]) -> None:
        """Notes this group's account, in place of the one before."""
        name = f"goodput-{self._number:08d}.json"
        self._pool.submit(self._write, name, json.dumps(fields) + "\n")

    def close(self) -> None:
        """What was noted is stored afterwards, or its failure is logged."""
        self._pool.shutdown()

    def _write_skipped(self, batch: SkippedBatch, documents: Callable[[], list[str]]) -> None:
        try:
            batch = replace(batch, documents=documents())
        except Exception as error:  # whatever it is, what was skipped is noted
            log.warning("the ledger lacks the documents of batch %d: %s", batch.batch, error)
        self._write(f"skipped-{batch.batch:08d}.json", json.dumps(asdict(batch)) + "\n")

    def _write(self, name: str, text: str) -> None:
        try:
            self._may()
            self._store.write(name, text.encode())
        except (CorpusError, LeaseLostError) as error:
            log.warning("the ledger lacks %s: %s", name, error)


def skipped_batch(store: Store, batch: int) -> SkippedBatch | None:
    """What the ledger in the run directory's store says of it; None if none of it was skipped."""
    try:
        fields = json.loads(store.child("ledger").read(f"skipped-{batch:08d}.json"))
    except FileNotFoundError:
        return None
    updates = [SkippedUpdate(**update) for update in fields.pop("updates")]
    return SkippedBatch(updates=updates, **fields)


def _accounts(store: Store) -> dict[int, str]:
    """The worker groups' accounts by their numbers."""
    found = ((_GOODPUT.fullmatch(entry.name), entry.name) for entry in store.list())
    return dict(sorted((int(match[1]), name) for match, name in found if match))


def _read(store: Store, name: str) -> dict[str, Any]:
    try:
        return json.loads(store.read(name))
    except (ValueError, CorpusError) as error:
        log.warning("the ledger's %s cannot be read, its time is not counted: %s", name, error)
        return {}
