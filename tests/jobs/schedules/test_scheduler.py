"""Schedules under a clock of the test: each tick runs once, whatever dies and whoever races."""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from jobs.schedules.alerts import Hook
from jobs.schedules.schedule import Schedule, ScheduleFolder
from jobs.schedules.scheduler import Scheduler
from jobs.schedules.ticks import tick_id
from pipeline.storage import LocalStore
from tests.jobs.schedules.schedules_under_a_clock import (
    BEGIN,
    Clock,
    Cluster,
    add,
    hours,
    outcomes,
    run,
)

ROOT = Path(__file__).parents[3]


class Killed(BaseException):
    """The daemon dies here."""


class Mortal:
    """Wraps a store or a launcher; the daemon dies before or after the n-th thing it does."""

    def __init__(self, inner: Any, fate: list[int]):
        self._inner, self._fate = inner, fate

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name == "child":
            return lambda path: Mortal(value(path), self._fate)
        if name not in ("create", "write", "remove", "remove_tree", "launch"):
            return value

        def call(*arguments: Any) -> Any:
            self._count()
            answer = value(*arguments)
            self._count()
            return answer

        return call

    def _count(self) -> None:
        self._fate[0] -= 1
        if self._fate[0] == 0:
            raise Killed


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder where syncing costs nothing, if there is one: 20,000 of them take minutes else."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path) as folder:
        yield Path(folder)


def test_a_year_of_ticks_over_both_changes_of_the_clock(in_memory: Path):
    folder = add(in_memory, cron="30 2 * * *", timezone="Europe/Berlin", history=20)
    clock = Clock()
    cluster = Cluster(clock, seconds=600)
    scheduler = Scheduler(in_memory, cluster, clock=clock)
    while clock.now < BEGIN.timestamp() + 365 * 86400:
        due = scheduler.step()
        clock.now = clock.now + 601 if scheduler.open else due + 7
    ticks = folder.load().ticks()  # pyright: ignore[reportOptionalMemberAccess]
    end = BEGIN + timedelta(days=365)
    expected = [tick_id(tick) for tick in takewhile(lambda t: t <= end, ticks.after(BEGIN))]
    assert len(expected) == 365
    assert "20260329T010000Z" in expected  # 02:30 was skipped: at 03:00 summer time
    assert "20261025T003000Z" in expected  # 02:30 came twice: the first
    assert "20261025T013000Z" not in expected
    assert outcomes(folder) == dict.fromkeys(expected[-20:], "succeeded")
    assert cluster.launches == dict.fromkeys([f"nightly-{id}" for id in expected], 1)
    late = [cluster.launched[f"nightly-{id}"] - _instant(id) for id in expected]
    assert set(late) == {7}


@pytest.mark.parametrize("overlap", ["skip", pytest.param("queue", marks=pytest.mark.slow)])
def test_a_daemon_that_dies_at_any_step_loses_no_tick_and_repeats_none(
    in_memory: Path, monkeypatch, overlap
):
    steps = 0
    while True:
        steps += 1
        root = in_memory / f"{steps}"
        alerts = root / "alerts"
        folder = add(
            root,
            overlap=overlap,
            history=2,
            alert=Hook(command=("/bin/sh", "-c", f"cat >> {alerts}")),
        )
        clock = Clock(BEGIN + timedelta(minutes=30))
        cluster = Cluster(clock, seconds=60)
        cluster.ends[f"nightly-{hours(2)[0]}"] = "failed"
        fate = [steps]
        died = False
        monkeypatch.setattr(
            "jobs.schedules.schedule.open_store", lambda at, f=fate: Mortal(LocalStore(at), f)
        )
        mortal: Any = Mortal(cluster, fate)
        scheduler = Scheduler(root, mortal, clock=clock)
        while clock.now < (BEGIN + timedelta(hours=4, minutes=40)).timestamp():
            try:
                scheduler.step()
            except Killed:
                assert not died
                died = True
                scheduler = Scheduler(root, cluster, clock=clock)
            clock.now += 300
        monkeypatch.undo()
        found = outcomes(folder)
        # Who dies in removing the oldest leaves that to the next tick.
        assert list(found)[-2:] == hours(3, 4), f"died at step {steps}"
        assert set(list(found.values())[-2:]) == {"succeeded"}
        assert cluster.launches == {f"nightly-{id}": 1 for id in hours(1, 2, 3, 4)}
        events = [json.loads(line) for line in alerts.read_text().splitlines()]
        told = [(event["event"], event["tick"]) for event in events]
        assert set(told) == {("failure", hours(2)[0]), ("recovery", hours(3)[0])}
        assert len(told) <= (3 if died else 2)  # told twice at most where it died in telling
        if not died:
            break
    assert steps > 30


def test_a_daemon_that_was_asleep_takes_nothing_away(tmp_path: Path):
    """Two daemons; the first is suspended between its claim and its launch."""
    folder = add(tmp_path)
    clock = Clock(BEGIN + timedelta(minutes=61))
    cluster = Cluster(clock, seconds=600)
    second = Scheduler(tmp_path, cluster, clock=clock)

    class Sleepy(Cluster):
        def launch(self, submission_id: str, command: Sequence[str]) -> None:
            clock.now += 120  # its claim expires
            second.step()
            cluster.launch(submission_id, command)  # the id is launched once, whoever asks

    first = Scheduler(tmp_path, Sleepy(clock), clock=clock)
    first.step()
    assert cluster.launches[f"nightly-{hours(1)[0]}"] == 2
    assert len(cluster.launched) == 1
    for _ in range(20):
        clock.now += 60
        first.step()
        second.step()
    assert outcomes(folder) == {hours(1)[0]: "succeeded"}
    assert first.open == []


def test_what_a_daemon_left_that_was_killed_while_it_wrote(tmp_path: Path):
    folder = add(tmp_path)
    tick = folder.tick(hours(1)[0])
    tick.create("lease.json", b'{"owner": "dead", "host": "gone"}')
    tick.write("attempt-1.json.0123.tmp", b"{")
    tick.write("result.json.0123.tmp", b"{")
    clock = Clock(BEGIN + timedelta(minutes=62))
    cluster = Cluster(clock, seconds=60)
    run(Scheduler(tmp_path, cluster, clock=clock), clock, timedelta(minutes=70))
    assert outcomes(folder) == {hours(1)[0]: "succeeded"}
    assert cluster.launches == {f"nightly-{hours(1)[0]}": 1}


def test_a_tick_that_another_daemon_ended_and_removed_is_not_waited_for(tmp_path: Path):
    folder = add(tmp_path)
    clock = Clock(BEGIN + timedelta(minutes=30))
    scheduler = Scheduler(tmp_path, Cluster(clock, seconds=600), clock=clock)
    id = folder.request(BEGIN + timedelta(minutes=30))
    scheduler.step()
    assert scheduler.open == [("nightly", id)]
    folder.tick(id).remove_tree("")
    scheduler.step()
    assert scheduler.open == []


def race(tmp_path: Path, root: str, n_ticks: int) -> list[str]:
    """Two processes over so many ticks, one a minute; returns what was run."""
    lines = tmp_path / "lines"
    begin, end = BEGIN.timestamp(), BEGIN.timestamp() + 60 * n_ticks
    daemons = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.jobs.schedules.one_of_two_daemons",
             root, str(lines), str(begin), str(end), str(seed)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for seed in (1, 2)
    ]  # fmt: skip
    try:
        for daemon in daemons:
            _, errors = daemon.communicate()
            assert daemon.returncode == 0, errors
    finally:
        for daemon in daemons:
            daemon.kill()
    return lines.read_text().splitlines()


@pytest.mark.parametrize(
    "n_ticks", [150, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])]
)
def test_two_daemons_that_race_run_each_tick_once(tmp_path: Path, in_memory: Path, n_ticks):
    root = in_memory / "runs"
    folder = add(root, cron="* * * * *", overlap="queue", history=10, misfire_seconds=1e6)
    ran = race(tmp_path, str(root), n_ticks)
    expected = [f"nightly-{tick_id(BEGIN + timedelta(minutes=k))}" for k in range(1, n_ticks + 1)]
    assert Counter(ran) >= Counter(expected)
    assert max(Counter(ran).values()) == 1
    assert len(folder.ticks()) <= 30
    assert set(outcomes(folder).values()) == {"succeeded"}


def test_two_daemons_race_in_a_bucket(tmp_path: Path, bucket: str):
    folder = ScheduleFolder(bucket, "nightly")
    folder.create(
        Schedule("nightly", "* * * * *", "UTC", tick_id(BEGIN), overlap="queue", history=10,
                 misfire_seconds=1e6)
    )  # fmt: skip
    ran = race(tmp_path, bucket, 15)
    expected = [f"nightly-{tick_id(BEGIN + timedelta(minutes=k))}" for k in range(1, 16)]
    assert Counter(ran) >= Counter(expected)
    assert max(Counter(ran).values()) == 1


def _instant(id: str) -> float:
    return datetime.strptime(id, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
