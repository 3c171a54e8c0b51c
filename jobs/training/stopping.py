"""How a training is asked to save and end, on the driver's side and in each process of the mesh.

A process never decides alone: its reason is a number that rides in the update's own reduction, and
all processes read the greatest one a batch late, so that they stop behind the same update.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from enum import IntEnum

from jobs.errors import ExitCode
from jobs.runs.run_directory import RunDirectory


class StopReason(IntEnum):
    """Why a training saves and ends before its last update; of several, the greatest counts."""

    NONE = 0
    RESIZED = 1
    """Ray has room for another number of workers; a new group goes on at once."""
    PREEMPTED = 2
    """The node of a worker is about to be taken away."""
    REQUESTED = 3
    """The run's stop request: Ctrl-C, SIGTERM or another command."""


Notice = Callable[[], StopReason]
"""What this process has been told, besides the run's stop request; asked once a batch."""


class StopRequests:
    """Turns Ctrl-C and SIGTERM into the run's stop request.

    Policy: whoever sends SIGTERM takes the machine away soon after, so the driver has ended when
    `grace_seconds` are over, saved or not. Ctrl-C may take as long as the save takes; a second one
    ends the driver at once.
    """

    def __init__(
        self,
        run: RunDirectory,
        grace_seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._run = run
        self._clock = clock
        self.grace_seconds = grace_seconds
        self.interrupted = False
        """Whether Ctrl-C asked first."""
        self._terminated_at: float | None = None

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Catches SIGTERM while the body runs; only the main thread of a process can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.interrupted = True
        self._run.request_stop(True)

    @property
    def terminated(self) -> bool:
        """Whether SIGTERM came."""
        return self._terminated_at is not None

    @property
    def overdue(self) -> bool:
        """Whether SIGTERM came longer ago than the grace period."""
        return (
            self._terminated_at is not None
            and self._clock() - self._terminated_at > self.grace_seconds
        )

    @property
    def exit_code(self) -> ExitCode:
        """Of a driver whose training was stopped."""
        return ExitCode.INTERRUPTED if self.interrupted else ExitCode.PREEMPTED

    def _on_sigterm(self, signum: int, frame: object) -> None:
        if self._terminated_at is not None:
            return
        self._terminated_at = self._clock()
        # Not here: the main thread may be in the middle of a request to the same object store.
        threading.Thread(
            target=self._run.request_stop, args=(True,), name="sigterm", daemon=True
        ).start()
