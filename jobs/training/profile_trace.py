"""`training.profile`: an XProf trace of some updates, in the run directory."""

import contextlib
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax

from jobs.runs.run_directory import RunDirectory
from pipeline.errors import CorpusError

log = logging.getLogger("tvq.profile")


class ProfileTrace:
    """Traces this process's host and devices while certain updates are made.

    Policy: a batch is traced whole if one of the updates lies in it. The trace is made on this
    machine's disk and put to `<run>/profile/` when it is complete, where `tensorboard --logdir` or
    XProf read it; one that cannot be stored is said and ends no training. A training that resumes
    makes it again if it comes by these updates again.
    """

    def __init__(self, run: RunDirectory, updates: tuple[int, int] | None):
        """`updates`: the first and the last, counted from 1; None: no trace."""
        self._store = run.store
        self._updates = updates
        self._folder: Path | None = None

    def before(self, update: int, per_batch: int, state: Any) -> None:
        """To be called when `update` updates were made and the batch of the next is at hand.

        The first and the last call of a trace wait for `state`, so that it holds what is asked for.
        """
        if self._updates is None:
            return
        first, last = self._updates
        if self._folder and update >= last:
            jax.block_until_ready(state)
            self.close()
        elif not self._folder and update < last and update + per_batch >= first:
            jax.block_until_ready(state)
            self._folder = Path(tempfile.mkdtemp(prefix="tvq-profile-"))
            jax.profiler.start_trace(str(self._folder))

    def step(self, last_update: int) -> contextlib.AbstractContextManager[object]:
        """Around the call of a batch's step: XProf shows it under the batch's last update."""
        if not self._folder:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=last_update)

    def close(self) -> None:
        """Ends a trace that has begun and stores it."""
        if not self._folder:
            return
        folder, self._folder = self._folder, None
        self._updates = None
        jax.profiler.stop_trace()
        store = self._store.child("profile")
        try:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    store.write(path.relative_to(folder).as_posix(), path.read_bytes())
            log.info("the profile is in %s", store.location)
        except CorpusError as error:
            log.warning("the profile could not be stored: %s", error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
