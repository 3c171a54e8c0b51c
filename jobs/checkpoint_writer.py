"""Saves a training's state with Orbax, in the background, straight to where the run lies."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jobs.checkpoint_manifest import (
    FORMAT_VERSION,
    CheckpointManifest,
    checkpoint_store,
    file_lengths,
    remove,
    write,
)
from jobs.checkpoints import jitted_leaf_sums, signatures
from jobs.errors import ExitCode, UserError
from jobs.lease import Fence, LeaseLostError
from jobs.recipe import CheckpointConfig
from jobs.retention import retire
from jobs.run_directory import RunDirectory
from pipeline.errors import CorpusError
from pipeline.storage import Store

log = logging.getLogger("tvq.checkpoints")
_LAST_TRIES = 3
"""How often the state at the end of a training is saved before the training fails of it."""
_LAST_PAUSE_SECONDS = 5.0


class _Position(NamedTuple):
    update: int
    next_batch: int
    tokens: int
    metrics: dict[str, float]
    begun: float


class CheckpointWriter:
    """Saves a training's state without stopping it.

    Policy: `save` returns once the state is copied to host memory; a thread then waits for
    Orbax's commit on all hosts, and on rank 0 for `before_commit` (the metric points up to it are
    stored), checks the fence, writes the manifest and removes what the retention does not keep.

    One save at a time: while one is under way, the next is skipped on all hosts and said so,
    rather than held up. A save that fails is said, and training goes on: the store may be well
    at the next. Only with `last` is a save waited for, tried again, and its failure raised. Whoever
    lost the run learns it from the next call.
    """

    def __init__(
        self,
        run: RunDirectory,
        fence: Fence,
        *,
        keep: CheckpointConfig,
        recipe: str,
        fingerprints: dict[str, str],
        before_commit: Callable[[], None] = lambda: None,
    ):
        # They print the traceback of every array of a save that fails; we say it in one line.
        for library in ("asyncio", "absl"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        self._run = run
        self._fence = fence
        self._keep = keep
        self._recipe = recipe
        self._fingerprints = fingerprints
        self._before_commit = before_commit
        self._thread: threading.Thread | None = None
        self._lost: LeaseLostError | None = None
        self._failed = False
        self._reason = ""
        self._figures: dict[str, float] = {"checkpoint/skipped": 0, "checkpoint/failed": 0}

    def save(
        self,
        state: Any,
        *,
        update: int,
        next_batch: int,
        tokens: int,
        metrics: Mapping[str, float] | None = None,
        last: bool = False,
    ) -> None:
        """Begins to save `state` (sharded arrays); called by every host at the same update.

        Args:
            state: the pytree.
            update: optimizer updates that it has seen.
            next_batch: the batch to go on with.
            tokens: unmasked targets trained on.
            metrics: of an evaluation of this very state.
            last: return once it is stored.

        Raises:
            LeaseLostError: the run is another's.
            UserError: with `last`, it could not be stored.
        """
        if not last and _any_host(self._thread is not None and self._thread.is_alive()):
            self._figures["checkpoint/skipped"] += 1
            log.warning(
                "checkpoint at update %d is skipped: the one before is being stored", update
            )
            return
        position = _Position(update, next_batch, tokens, dict(metrics or {}), time.time())
        for left in reversed(range(_LAST_TRIES if last else 1)):
            self.wait()
            self._begin(state, position)
            if not last:
                return
            self.wait()
            if not _any_host(self._failed):
                return
            if left:
                time.sleep(_LAST_PAUSE_SECONDS)
        raise UserError(
            f"run {self._run.name}: the checkpoint at update {update} could not be stored"
            f" ({self._reason or 'the log of another host says why'}); the same command goes on"
            " from the newest one that is",
            ExitCode.FAILED,
        )

    def figures(self) -> dict[str, float]:
        """Saves skipped and failed so far, and how long the last one stored took, by metric."""
        return dict(self._figures)

    def wait(self) -> None:
        """Until the last save has ended, well or not; raises LeaseLostError."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._lost:
            raise self._lost

    def close(self) -> None:
        """Waits for the last save."""
        self.wait()

    def _begin(self, state: Any, position: _Position) -> None:
        self._failed = False
        store = checkpoint_store(self._run, position.update)
        sums = jitted_leaf_sums(state)
        with self._noted(position.update):
            if jax.process_index() == 0:
                self._fence.check()
                # What a killed or damaged attempt left: an old manifest must not meet new arrays.
                remove(self._run, position.update)
        if lost := self._lost:
            self._lost = None  # said once is enough: the training ends of it
            raise lost
        if _any_host(self._failed):  # none may wait in Orbax for the one that does not come
            return
        # A new one each time: one that has failed raises that failure ever after.
        orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        with self._noted(position.update):
            state_location = store.child("state").location
            orbax.save(state_location, args=ocp.args.StandardSave(state), force=True)
        if self._failed:
            _closed_quietly(orbax)
            return
        self._thread = threading.Thread(
            target=self._finish,
            args=(orbax, store, signatures(state), sums, position),
            name="checkpoint",
        )
        self._thread.start()

    def _finish(
        self,
        orbax: ocp.AsyncCheckpointer,
        store: Store,
        leaves: dict[str, str],
        sums: dict[str, jax.Array],
        position: _Position,
    ) -> None:
        with self._noted(position.update), contextlib.ExitStack() as stack:
            stack.callback(_closed_quietly, orbax)
            orbax.wait_until_finished()
            if jax.process_index() != 0:
                return
            manifest = CheckpointManifest(
                format_version=FORMAT_VERSION,
                update=position.update,
                next_batch=position.next_batch,
                tokens=position.tokens,
                recipe=self._recipe,
                fingerprints=self._fingerprints,
                leaves=leaves,
                sums={name: int(value) for name, value in jax.device_get(sums).items()},
                files=file_lengths(store.child("state")),
                metrics=position.metrics,
                created=position.begun,
            )
            self._before_commit()
            self._fence.check()
            write(self._run, manifest)
            self._figures["checkpoint/lag_seconds"] = time.time() - position.begun
            try:
                retire(self._run, self._keep)
            except CorpusError as error:  # the next save tries again
                log.warning("checkpoints that are not kept could not be removed: %s", error)

    @contextlib.contextmanager
    def _noted(self, update: int) -> Iterator[None]:
        """Notes what goes wrong with a save: who lost the run must stop, else training goes on."""
        try:
            yield
        except LeaseLostError as error:
            self._lost = error
        except Exception as error:  # Orbax, tensorstore and gcsfs each raise their own
            self._failed = True
            self._reason = f"{error}".partition("\n")[0][:300]
            self._figures["checkpoint/failed"] += 1
            log.warning(
                "checkpoint at update %d could not be stored, training goes on: %s",
                update,
                self._reason,
            )
            log.info("checkpoint at update %d failed", update, exc_info=error)


def _any_host(flag: bool) -> bool:
    """Whether the flag is raised on any host; all of them must ask at the same time."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def _closed_quietly(orbax: ocp.AsyncCheckpointer) -> None:
    with contextlib.suppress(Exception):  # what failed was raised when it was waited for
        orbax.close()
