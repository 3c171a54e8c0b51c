"""Saves a training's state with Orbax, in the background, straight to where the run lies."""

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jobs.checkpoints.manifest import (
    FORMAT_VERSION,
    CheckpointManifest,
    checkpoint_store,
    commit,
    file_lengths,
    remove_other_attempts,
)
from jobs.checkpoints.restore import jitted_leaf_sums, signatures
from jobs.checkpoints.retention import retire
from jobs.checkpoints.store_faults import may_pass, quiet_failed_saves
from jobs.errors import ExitCode, UserError
from jobs.recipe import CheckpointConfig
from jobs.runs.lease import Fence, LeaseLostError
from jobs.runs.run_directory import RunDirectory
from pipeline.errors import CorpusError

log = logging.getLogger("tvq.checkpoints")
_LAST_TRIES = 3
"""How often the state at the end of a training is saved before the training fails of it; where an
outage may pass, as often as there is time for."""
_LAST_PAUSE_SECONDS = 5.0
_LONGEST_PAUSE_SECONDS = 40.0
_PATIENCE_SECONDS = 1800.0
"""How long a save is waited for at most where it must be waited for."""
_SAY_EVERY_SECONDS = 60.0


class _Position(NamedTuple):
    update: int
    next_batch: int
    tokens: int
    metrics: dict[str, float]
    begun: float


class CheckpointWriter:
    """Saves a training's state without stopping it.

    Policy: `save` returns once the state is copied to host memory, and asks nothing of the store;
    threads then write the arrays into a folder that nobody else has written to, wait for Orbax's
    commit on all hosts, and on rank 0 for `before_commit` (the metric points up to it are stored),
    check the fence, write the manifest and remove what the retention does not keep.

    One save at a time, so that at most one copy of the state is in host memory: while one is under
    way, the next is skipped on all hosts and said so, rather than held up. A save that fails is
    said, and training goes on: the store may be well at the next. Only with `last` is a save
    waited for, within a limit, tried again, and its failure raised. Whoever lost the run learns it
    from the next call.
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
        """Called by every host at the same time; `before_commit` is called on rank 0."""
        quiet_failed_saves()
        self._run = run
        self._fence = fence
        self._keep = keep
        self._recipe = recipe
        self._fingerprints = fingerprints
        self._before_commit = before_commit
        self._writer = _same_on_all_hosts(secrets.randbits(32))
        self._saves = 0
        self._thread: threading.Thread | None = None
        self._begun, self._saving = 0.0, 0
        self._lost: LeaseLostError | None = None
        self._failed = False
        self._may_pass = False
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
        busy = self._thread is not None and self._thread.is_alive()
        busy, lost = _any_host(busy, self._lost is not None)
        if lost:
            self._raise_lost()
        if busy and not last:
            self._figures["checkpoint/skipped"] += 1
            log.warning(
                "checkpoint at update %d is skipped: the one before is still being stored, for"
                " %.0f s so far",
                update, time.time() - self._begun,
            )  # fmt: skip
            return
        position = _Position(update, next_batch, tokens, dict(metrics or {}), time.time())
        self.wait()
        self._begin(state, position)
        if last:
            self._until_stored(state, position)

    def _until_stored(self, state: Any, position: _Position) -> None:
        """Waits for the save that was begun, and tries again, within the limits."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        pause, tries = _LAST_PAUSE_SECONDS, 1
        while True:
            self.wait(deadline)
            late = time.monotonic() + pause > deadline
            failed, passing, late = _any_host(self._failed, self._may_pass, late)
            if not failed:
                return
            if late or (tries >= _LAST_TRIES and not passing):
                reason = self._reason or "the log of another host says why"
                raise self._not_stored(position.update, reason)
            log.warning("checkpoint at update %d is saved again in %.0f s", position.update, pause)
            time.sleep(pause)
            pause, tries = min(2 * pause, _LONGEST_PAUSE_SECONDS), tries + 1
            self._begin(state, position)

    def figures(self) -> dict[str, float]:
        """Saves skipped and failed so far, and how far the store lags behind, by metric.

        The lag is that of the last save stored, from its state to its manifest, or of the one
        that is under way where it is longer already.
        """
        figures = dict(self._figures)
        if self._thread is not None and self._thread.is_alive():
            lag = max(figures.get(_LAG, 0.0), time.time() - self._begun)
            figures[_LAG] = lag
        return figures

    def wait(self, deadline: float | None = None) -> None:
        """Until the last save has ended, well or not.

        Args:
            deadline: of `time.monotonic`; None: in half an hour.

        Raises:
            LeaseLostError: the run is another's.
            UserError: the deadline has come.
        """
        deadline = time.monotonic() + _PATIENCE_SECONDS if deadline is None else deadline
        while self._thread is not None:
            self._thread.join(min(_SAY_EVERY_SECONDS, max(deadline - time.monotonic(), 0.0)))
            if not self._thread.is_alive():
                self._thread = None
            elif time.monotonic() >= deadline:
                raise self._not_stored(self._saving, "the store did not take it in time")
            else:
                log.warning(
                    "waiting for the checkpoint at update %d to be stored, for %.0f s so far, for"
                    " %.0f s more at most",
                    self._saving, time.time() - self._begun, deadline - time.monotonic(),
                )  # fmt: skip
        if self._lost:
            self._raise_lost()

    def close(self) -> None:
        """Waits for the last save."""
        self.wait()

    def _raise_lost(self) -> None:
        lost, self._lost = self._lost, None  # said once is enough: the training ends of it
        raise lost or LeaseLostError(f"run {self._run.name}: was taken over; rank 0 says by whom")

    def _not_stored(self, update: int, reason: str) -> UserError:
        return UserError(
            f"run {self._run.name}: the checkpoint at update {update} could not be stored"
            f" ({reason}); the same command goes on from the newest one that is",
            ExitCode.FAILED,
        )

    def _begin(self, state: Any, position: _Position) -> None:
        self._failed, self._may_pass, self._reason = False, False, ""
        self._begun, self._saving = position.begun, position.update
        self._saves += 1
        store = checkpoint_store(self._run, position.update)
        # Never written to before: what a killed save left, or what a group that was taken for dead
        # is still writing, can never mix with it. So there is nothing to look for or to remove.
        folder = f"state-{self._writer:08x}-{self._saves}"
        sums = jitted_leaf_sums(state)
        # A new one each time: one that has failed raises that failure ever after.
        orbax = ocp.AsyncCheckpointer(
            ocp.StandardCheckpointHandler(),
            file_options=ocp.options.FileOptions(skip_sync_file_validations=True),
        )
        with self._noted(position.update):
            orbax.save(store.child(folder).location, args=ocp.args.StandardSave(state))
        if self._failed:
            _closed_quietly(orbax)
            return
        arguments = (orbax, folder, signatures(state), sums, position)
        # A daemon: a save that is given up must not keep the process.
        self._thread = threading.Thread(
            target=self._finish, args=arguments, name="checkpoint", daemon=True
        )
        self._thread.start()

    def _finish(
        self,
        orbax: ocp.AsyncCheckpointer,
        folder: str,
        leaves: dict[str, str],
        sums: dict[str, jax.Array],
        position: _Position,
    ) -> None:
        with self._noted(position.update), contextlib.ExitStack() as stack:
            stack.callback(_closed_quietly, orbax)
            orbax.wait_until_finished()
            if jax.process_index() != 0:
                return
            arrays = checkpoint_store(self._run, position.update).child(folder)
            files = file_lengths(arrays)
            manifest = CheckpointManifest(
                format_version=FORMAT_VERSION,
                update=position.update,
                next_batch=position.next_batch,
                tokens=position.tokens,
                recipe=self._recipe,
                fingerprints=self._fingerprints,
                leaves=leaves,
                sums={name: int(value) for name, value in jax.device_get(sums).items()},
                folder=folder,
                files=files,
                digests={name: arrays.md5(name) for name in files},
                metrics=position.metrics,
                created=position.begun,
            )
            try:
                self._before_commit()
                self._fence.check()
                commit(self._run, manifest, self._fence.check)
            except LeaseLostError:  # no manifest will ever name what was written
                with contextlib.suppress(CorpusError):
                    arrays.remove_tree("")
                raise
            self._figures[_LAG] = time.time() - position.begun
            try:
                remove_other_attempts(self._run, manifest)
                retire(self._run, self._keep, may=self._fence.check)
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
            self._failed, self._may_pass = True, may_pass(error)
            self._reason = f"{error}".partition("\n")[0][:300]
            self._figures["checkpoint/failed"] += 1
            log.warning(
                "checkpoint at update %d could not be stored, training goes on: %s",
                update,
                self._reason,
            )
            log.info("checkpoint at update %d failed", update, exc_info=error)


_LAG = "checkpoint/upload_lag_seconds"


def _any_host(*flags: bool) -> list[bool]:
    """Whether each flag is raised on any host; all of them must ask at the same time."""
    if jax.process_count() == 1:
        return list(flags)
    with jax.transfer_guard("allow"):  # under the loop's guard: the answer is read at once
        return list(map(bool, multihost_utils.process_allgather(np.array(flags)).any(axis=0)))


def _same_on_all_hosts(number: int) -> int:
    """Rank 0's number."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.uint32(number)))


def _closed_quietly(orbax: ocp.AsyncCheckpointer) -> None:
    with contextlib.suppress(Exception):  # what failed was raised when it was waited for
        orbax.close()
