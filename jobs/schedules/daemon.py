"""`tvq schedule serve` and `tvq schedule tick`: looks at the schedules until told not to."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jobs.console import Console
from jobs.errors import ExitCode, UserError
from jobs.flows.flow_folder import flow_state
from jobs.schedules.daemon_metrics import DaemonMetrics
from jobs.schedules.launchers import LocalLauncher
from jobs.schedules.ray_launcher import RayLauncher
from jobs.schedules.schedule import ScheduleFolder
from jobs.schedules.scheduler import Scheduler
from jobs.submission.submit import Request
from pipeline.storage import LocalStore, Location, open_store

_LOOK_SECONDS = 1.0
_IDLE_SECONDS = 5.0
"""Between two looks while nothing runs: a request by hand waits so long at most."""
_LOOK_SECONDS_IN_A_BUCKET = 10.0
"""A look is two requests a schedule: 17,000 a day."""


def serve_command(
    root: Location,
    *,
    request: Request | None,
    metrics_host: str,
    metrics_port: int | None,
    console: Console,
) -> None:
    """Sees to all schedules until Ctrl-C or SIGTERM.

    Args:
        root: folder of the runs and schedules.
        request: the cluster that runs the flows; None: this machine does.
        metrics_host: address that Prometheus is answered at.
        metrics_port: port of that; None: it is not answered.
        console: says what happens.
    """
    scheduler = _scheduler(root, request, console)
    metrics = None if metrics_port is None else DaemonMetrics(metrics_host, metrics_port)
    console.line(f"serving the schedules under {open_store(root).location}; Ctrl-C ends it")
    with _told_to_stop() as stop:
        while not stop.is_set():
            due = scheduler.step()
            if metrics:
                metrics.show(scheduler.missed)
            stop.wait(max(0.05, min(_pause(root, scheduler), due - time.time())))
    scheduler.let_go()
    if metrics:
        metrics.close()
    console.line("stopped; what was launched goes on, and the next daemon sees to it")


def tick_command(root: Location, name: str, *, request: Request | None, console: Console) -> None:
    """Sees to what is due of one schedule, and ends when that is done.

    Raises:
        UserError: there is no such schedule, or what was run did not succeed.
    """
    ticks = ScheduleFolder.existing(root, name).ticks()
    before = {tick.id for tick in ticks if tick.settled}
    scheduler = _scheduler(root, request, console)
    with _told_to_stop() as stop:
        while not stop.is_set():
            scheduler.step(only=name)
            if not scheduler.open:
                break
            stop.wait(_pause(root, scheduler))
        stopped = stop.is_set()
    scheduler.let_go()
    # Not what was open after a look: a tick may end in the very one that finds it.
    seen = {tick: end for (_, tick), end in scheduler.outcomes.items() if tick not in before}
    if bad := [tick for tick, end in sorted(seen.items()) if end == "failed"]:
        raise UserError(
            f"schedule {name}: tick {bad[-1]} failed; see `tvq schedule history {name}`",
            ExitCode.FAILED,
        )
    if not seen and not stopped:
        console.line(f"schedule {name}: nothing is due that is not seen to already")


def _scheduler(root: Location, request: Request | None, console: Console) -> Scheduler:
    location = open_store(root).location
    return Scheduler(
        location,
        _local_launcher(root) if request is None else RayLauncher(request, root),
        run_state=lambda name, tick: flow_state(location, name, tick),
        say=console.line,
        warn=console.warning,
    )


def _local_launcher(root: Location) -> LocalLauncher:
    store = open_store(root)
    launches = (
        store.root / "launches"
        if isinstance(store, LocalStore)
        else Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")).expanduser() / "tvq/launches"
    )
    return LocalLauncher(launches)


def _pause(root: Location, scheduler: Scheduler) -> float:
    if not isinstance(open_store(root), LocalStore):
        return _LOOK_SECONDS_IN_A_BUCKET
    return _LOOK_SECONDS if scheduler.open else _IDLE_SECONDS


@contextlib.contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """Set by Ctrl-C and SIGTERM, so that no look is broken off in its middle."""
    stop = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
