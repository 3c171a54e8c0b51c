"""`<run>/ledger/`: which updates a training skipped, and where its time went.

`skipped-<batch>.jsonl` has a line for each update of a batch that was skipped. A training that
resumes before such a batch skips it again and writes the same file again, so that none is counted
twice. `goodput-<number>.json` is one worker group's account of its seconds (jobs/goodput.py).
"""

import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import CorpusError
from pipeline.storage import Store

log = logging.getLogger("tvq.ledger")

_SKIPPED = re.compile(r"skipped-(\d{8,})\.jsonl")
_GOODPUT = re.compile(r"goodput-(\d{8,})\.json")


@dataclass(frozen=True)
class SkippedUpdate:
    """An update that moved nothing."""

    update: int
    """Counted from 1, as metrics are."""
    batch: int
    """Index of its batch: `tvq inspect --run RUN --step BATCH` shows what is in it."""
    first_row: int
    """Of the batch, in the training's endless sequence of windows."""
    last_row: int
    """Of the batch, itself included."""
    loss: float
    """Nats per token; may be NaN or infinite."""
    gradient_norm: float
    """Global norm before clipping; may be NaN or infinite."""
    sigmas: float
    """Standard deviations of the loss above its moving mean."""


class Ledger:
    """The writer of a run's ledger, on rank 0.

    Policy: a thread writes, so that no step waits for an object store. What it could not write is
    logged, and ends no training. `close` waits for what is under way.
    """

    def __init__(self, store: Store):
        """`store` is the run directory's."""
        self._store = store.child("ledger")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        accounts = _numbers(self._store, _GOODPUT)
        self.earlier = [_read(self._store, name) for name in accounts.values()]
        """The accounts of the worker groups before this one, oldest first."""
        self._number = max(accounts, default=0) + 1

    def skipped(self, updates: list[SkippedUpdate]) -> None:
        """Notes the skipped updates of one batch, all of them."""
        lines = "".join(json.dumps(asdict(update)) + "\n" for update in updates)
        self._pool.submit(self._write, f"skipped-{updates[0].batch:08d}.jsonl", lines)

    def account(self, fields: dict[str, Any]) -> None:
        """Notes this group's account, in place of the one before."""
        name = f"goodput-{self._number:08d}.json"
        self._pool.submit(self._write, name, json.dumps(fields) + "\n")

    def close(self) -> None:
        """What was noted is stored afterwards, or its failure is logged."""
        self._pool.shutdown()

    def _write(self, name: str, text: str) -> None:
        try:
            self._store.write(name, text.encode())
        except CorpusError as error:
            log.warning("the ledger lacks %s: %s", name, error)


def skipped_updates(store: Store) -> list[SkippedUpdate]:
    """What the ledger in the run directory's store says was skipped, in order."""
    ledger = store.child("ledger")
    lines = [
        line
        for _, name in sorted(_numbers(ledger, _SKIPPED).items())
        for line in ledger.read(name).decode().splitlines()
    ]
    return [SkippedUpdate(**json.loads(line)) for line in lines]


def _numbers(store: Store, pattern: re.Pattern[str]) -> dict[int, str]:
    """The files of that name by their numbers."""
    found = ((pattern.fullmatch(entry.name), entry.name) for entry in store.list())
    return dict(sorted((int(match[1]), name) for match, name in found if match))


def _read(store: Store, name: str) -> dict[str, Any]:
    try:
        return json.loads(store.read(name))
    except (ValueError, CorpusError) as error:
        log.warning("the ledger's %s cannot be read, its time is not counted: %s", name, error)
        return {}
