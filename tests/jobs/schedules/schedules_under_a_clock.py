"""Schedules, and what runs their flows, under a clock of the test."""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from jobs.schedules.launchers import State
from jobs.schedules.schedule import Schedule, ScheduleFolder
from jobs.schedules.scheduler import Scheduler
from jobs.schedules.ticks import tick_id

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    def __init__(self, now: datetime = BEGIN):
        self.now = now.timestamp()

    def __call__(self) -> float:
        return self.now


class Cluster:
    """What runs flows, on the clock of the test: it outlives every daemon."""

    def __init__(self, clock: Clock, seconds: float = 0.0):
        self.clock = clock
        self.seconds = seconds
        self.launched: dict[str, float] = {}
        self.launches: Counter[str] = Counter()
        self.ends: dict[str, State] = {}
        """How a submission ends, if not well."""
        self.stopped: list[str] = []

    def launch(self, submission_id: str, command: Sequence[str]) -> None:
        assert command[:2] == ["flow", "run"]
        self.launches[submission_id] += 1
        self.launched.setdefault(submission_id, self.clock())

    def state(self, submission_id: str) -> State | None:
        if submission_id not in self.launched:
            return None
        if submission_id in self.stopped:
            return "failed"
        if self.clock() - self.launched[submission_id] < self.seconds:
            return "running"
        return self.ends.get(submission_id, "succeeded")

    def stop(self, submission_id: str) -> None:
        self.stopped.append(submission_id)

    def where(self, submission_id: str) -> str:
        return f"log of {submission_id}"


def add(root: Path, name: str = "nightly", **fields: Any) -> ScheduleFolder:
    folder = ScheduleFolder(root, name)
    fields = {"cron": "0 * * * *", "timezone": "UTC", "since": tick_id(BEGIN)} | fields
    assert folder.create(Schedule(name, **fields))
    return folder


def outcomes(folder: ScheduleFolder) -> dict[str, str]:
    found = {tick.id: folder.result(tick.id) for tick in folder.ticks()}
    return {id: result.outcome if result else "open" for id, result in found.items()}


def hours(*which: int) -> list[str]:
    return [tick_id(BEGIN + timedelta(hours=hour)) for hour in which]


def run(scheduler: Scheduler, clock: Clock, until: timedelta, every: float = 60) -> None:
    while clock.now <= (BEGIN + until).timestamp():
        scheduler.step()
        clock.now += every
