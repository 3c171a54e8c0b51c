"""Schedules under a clock of the test: each tick runs once, whatever dies and whoever races."""

import functools
import json
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import UserError
from jobs.flows.flow_folder import FlowFolder, flow_state
from jobs.schedules.alerts import AlertError, Hook, send
from jobs.schedules.launchers import State
from jobs.schedules.schedule import Schedule, ScheduleFolder, list_schedules, submission_id
from jobs.schedules.scheduler import Scheduler
from jobs.schedules.ticks import tick_id
from pipeline.storage import LocalStore

ROOT = Path(__file__).parents[3]
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
    for daemon in daemons:
        _, errors = daemon.communicate(timeout=280)
        assert daemon.returncode == 0, errors
    return lines.read_text().splitlines()


@pytest.mark.parametrize("n_ticks", [150, pytest.param(1000, marks=pytest.mark.slow)])
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


# ---- Policies ------------------------------------------------------------------------------------


def run(scheduler: Scheduler, clock: Clock, until: timedelta, every: float = 60) -> None:
    while clock.now <= (BEGIN + until).timestamp():
        scheduler.step()
        clock.now += every


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [
        ("skip", ["succeeded", "skipped", "skipped", "succeeded", "skipped"]),
        ("queue", ["succeeded", "succeeded", "open", "open", "open"]),
        ("replace", ["replaced", "replaced", "replaced", "replaced", "replaced"]),
    ],
)
def test_overlap(tmp_path: Path, overlap, expected):
    folder = add(tmp_path, overlap=overlap)
    clock = Clock()
    cluster = Cluster(clock, seconds=2.5 * 3600)
    run(Scheduler(tmp_path, cluster, clock=clock), clock, timedelta(hours=6, minutes=45), every=300)
    assert list(outcomes(folder).values())[:5] == expected
    begun = sorted(cluster.launched.values())
    if overlap == "queue":  # one after the other
        assert all(b - a >= cluster.seconds for a, b in pairwise(begun))
    assert len(cluster.stopped) == len(set(cluster.stopped)) == (5 if overlap == "replace" else 0)


def test_what_nobody_saw_to_in_time_is_noted_and_not_run(tmp_path: Path):
    folder = add(tmp_path, misfire_seconds=1800)
    clock = Clock(BEGIN + timedelta(hours=10, minutes=20))
    cluster = Cluster(clock)
    scheduler = Scheduler(tmp_path, cluster, clock=clock)
    scheduler.step()
    assert scheduler.missed == {"nightly": 9}
    scheduler.step()
    assert scheduler.missed == {"nightly": 0}  # one was run since
    # The last is within its window; those long over are noted together.
    assert outcomes(folder) == {hours(9)[0]: "missed", hours(10)[0]: "succeeded"}
    missed = folder.result(hours(9)[0])
    assert missed
    assert missed.since == hours(1)[0]
    assert "9 ticks" in missed.detail
    clock.now += 3000  # the next one is 10 minutes late
    scheduler.step()
    clock.now += 5100  # the one at twelve 35
    other = Scheduler(tmp_path, cluster, clock=clock)
    other.step()
    assert other.missed == {"nightly": 1}
    assert list(outcomes(folder).values())[-2:] == ["succeeded", "missed"]
    assert list(cluster.launches) == [f"nightly-{id}" for id in hours(10, 11)]


@pytest.mark.parametrize("end", ["succeeded", "failed"])
def test_a_tick_that_a_clusters_cron_runs_is_not_run_by_the_daemon_too(tmp_path: Path, end: str):
    """The one claim is that of `tvq flow run`, which the daemon launches and the cron is."""
    folder = add(tmp_path)
    [tick] = hours(1)
    theirs = FlowFolder(tmp_path, "nightly", tick)
    claim = theirs.claim()
    assert claim.take() is None
    clock = Clock(BEGIN + timedelta(hours=1, minutes=1))
    cluster = Cluster(clock)
    cluster.ends[f"nightly-{tick}"] = "failed"  # it finds the tick claimed
    state = functools.partial(flow_state, tmp_path)
    scheduler = Scheduler(tmp_path, cluster, clock=clock, run_state=state)
    for _ in range(3):
        scheduler.step()
    assert outcomes(folder) == {tick: "open"}
    if end == "succeeded":
        theirs.write("result.json", {})
    claim.give_back()
    scheduler.step()
    assert outcomes(folder) == {tick: end}
    assert cluster.launches == {f"nightly-{tick}": 1}


def test_retries_wait_longer_each_time_and_end(tmp_path: Path):
    folder = add(tmp_path, retries=2, backoff_seconds=300)
    clock = Clock(BEGIN + timedelta(minutes=59))
    cluster = Cluster(clock, seconds=60)
    ids = [submission_id("nightly", hours(1)[0], attempt) for attempt in (1, 2, 3)]
    cluster.ends |= dict.fromkeys(ids, "failed")
    run(Scheduler(tmp_path, cluster, clock=clock), clock, timedelta(hours=1, minutes=50))
    assert list(cluster.launched) == ids
    first, second, third = cluster.launched.values()
    assert second - first == 60 + 300
    assert third - second == 60 + 600
    result = folder.result(hours(1)[0])
    assert result
    assert (result.outcome, result.attempts) == ("failed", 3)
    assert f"log of {ids[-1]}" in result.detail


def test_a_retry_that_succeeds_is_a_success(tmp_path: Path):
    folder = add(tmp_path, retries=1)
    clock = Clock(BEGIN + timedelta(minutes=59))
    cluster = Cluster(clock, seconds=60)
    cluster.ends[f"nightly-{hours(1)[0]}"] = "failed"
    run(Scheduler(tmp_path, cluster, clock=clock), clock, timedelta(hours=1, minutes=50))
    result = folder.result(hours(1)[0])
    assert result
    assert (result.outcome, result.attempts) == ("succeeded", 2)


def test_a_run_that_vanished_is_begun_again_without_a_word_on_retries(tmp_path: Path):
    folder = add(tmp_path)
    clock = Clock(BEGIN + timedelta(minutes=59))
    cluster = Cluster(clock, seconds=60)
    cluster.ends[f"nightly-{hours(1)[0]}"] = "lost"
    run(Scheduler(tmp_path, cluster, clock=clock), clock, timedelta(hours=1, minutes=50))
    assert outcomes(folder) == {hours(1)[0]: "succeeded"}
    assert len(cluster.launched) == 2


def test_deadline_stops_a_run_and_counts_as_failure(tmp_path: Path):
    folder = add(tmp_path, deadline_seconds=1800, retries=5)
    clock = Clock(BEGIN + timedelta(minutes=59))
    cluster = Cluster(clock, seconds=1e6)
    run(Scheduler(tmp_path, cluster, clock=clock), clock, timedelta(hours=1, minutes=50))
    assert cluster.stopped == [f"nightly-{hours(1)[0]}"]
    result = folder.result(hours(1)[0])
    assert result
    assert result.outcome == "failed"
    assert "deadline of 1800 s" in result.detail
    assert len(cluster.launched) == 1


def test_history_is_kept_as_long_as_asked_and_ticks_go_on_from_it(tmp_path: Path):
    folder = add(tmp_path, history=2)
    clock = Clock()
    cluster = Cluster(clock)
    run(Scheduler(tmp_path, cluster, clock=clock), clock, timedelta(hours=6, minutes=15), every=600)
    assert list(outcomes(folder)) == hours(5, 6)
    # A daemon that slept since it listed the ticks does not run what was removed.
    sleepy = Scheduler(tmp_path, cluster, clock=clock)
    folder.forget(hours(5)[0])
    folder.forget(hours(6)[0])
    clock.now = (BEGIN + timedelta(hours=4, minutes=30)).timestamp()
    sleepy.step()
    assert outcomes(folder) == {}
    assert len(cluster.launches) == 6


def test_paused_ticks_are_not_made_up_for_and_a_run_by_hand_is_no_tick_of_the_cron(tmp_path: Path):
    folder = add(tmp_path)
    clock = Clock(BEGIN + timedelta(minutes=59))
    cluster = Cluster(clock, seconds=60)
    scheduler = Scheduler(tmp_path, cluster, clock=clock)
    schedule = folder.load()
    assert schedule
    folder.save(Schedule("nightly", "0 * * * *", "UTC", schedule.since, paused=True))
    run(scheduler, clock, timedelta(hours=3, minutes=30), every=300)
    assert cluster.launched == {}
    id = folder.request(datetime.fromtimestamp(clock.now, UTC))
    for _ in range(3):
        scheduler.step()
        clock.now += 100
    assert outcomes(folder) == {id: "succeeded"}
    resumed = tick_id(datetime.fromtimestamp(clock.now, UTC))
    folder.save(Schedule("nightly", "0 * * * *", "UTC", resumed))
    run(scheduler, clock, timedelta(hours=5, minutes=30), every=300)
    assert outcomes(folder) == dict.fromkeys([id, *hours(4, 5)], "succeeded")


def test_a_clock_that_is_set_back_repeats_no_tick(tmp_path: Path):
    add(tmp_path)
    clock = Clock()
    cluster = Cluster(clock)
    scheduler = Scheduler(tmp_path, cluster, clock=clock)
    run(scheduler, clock, timedelta(hours=3, minutes=10), every=300)
    clock.now -= 2 * 3600
    run(scheduler, clock, timedelta(hours=4, minutes=10), every=300)
    assert cluster.launches == {f"nightly-{id}": 1 for id in hours(1, 2, 3, 4)}


def test_a_run_that_is_known_elsewhere_is_not_launched_here(tmp_path: Path):
    """The daemon of another machine launched it and died; its run still beats in the store."""
    folder = add(tmp_path)
    clock = Clock(BEGIN + timedelta(minutes=61))
    elsewhere, here = Cluster(clock, seconds=600), Cluster(clock)
    Scheduler(tmp_path, elsewhere, clock=clock).step()

    def run_state(name: str, tick: str) -> State | None:
        return elsewhere.state(f"{name}-{tick}")

    scheduler = Scheduler(tmp_path, here, clock=clock, run_state=run_state)
    clock.now += 100
    run(scheduler, clock, timedelta(minutes=75))
    assert outcomes(folder) == {hours(1)[0]: "succeeded"}
    assert here.launched == {}


def test_one_schedule_that_is_damaged_does_not_stop_the_others(tmp_path: Path):
    folder = add(tmp_path)
    (tmp_path / "schedules" / "broken").mkdir()
    (tmp_path / "schedules" / "broken" / "schedule.json").write_text('{"alert": null, "x": 1}')
    clock = Clock(BEGIN + timedelta(minutes=61))
    said: list[str] = []
    scheduler = Scheduler(tmp_path, Cluster(clock), clock=clock, warn=said.append)
    for _ in range(3):
        scheduler.step()
    assert outcomes(folder) == {hours(1)[0]: "succeeded"}
    [line] = said
    assert "damaged" in line
    assert [folder.name for folder in list_schedules(tmp_path)] == ["broken", "nightly"]


# ---- Alerts --------------------------------------------------------------------------------------


def test_failure_and_recovery_are_told_once_each(tmp_path: Path):
    alerts = tmp_path / "alerts"
    add(tmp_path, alert=Hook(command=("/bin/sh", "-c", f"cat >> {alerts}")))
    clock = Clock()
    cluster = Cluster(clock)
    cluster.ends |= {f"nightly-{id}": "failed" for id in hours(2, 3)}
    run(Scheduler(tmp_path, cluster, clock=clock), clock, timedelta(hours=5, minutes=5))
    events = [json.loads(line) for line in alerts.read_text().splitlines()]
    assert [(event["event"], event["tick"]) for event in events] == [
        ("failure", hours(2)[0]),
        ("failure", hours(3)[0]),
        ("recovery", hours(4)[0]),
    ]
    assert events[0]["output"] == f"log of nightly-{hours(2)[0]}"


def test_an_alert_that_does_not_get_through_is_tried_thrice_and_stops_nothing(tmp_path: Path):
    folder = add(tmp_path, alert=Hook(command=("/bin/sh", "-c", "echo too bad >&2; exit 3")))
    clock = Clock()
    cluster = Cluster(clock)
    cluster.ends[f"nightly-{hours(1)[0]}"] = "failed"
    said: list[str] = []
    scheduler = Scheduler(tmp_path, cluster, clock=clock, warn=said.append)
    run(scheduler, clock, timedelta(hours=2, minutes=5), every=40)
    assert len(said) == 2  # of the failure and of the recovery
    assert all(line.endswith("given up: /bin/sh ended with 3: too bad") for line in said)
    assert outcomes(folder) == dict(zip(hours(1, 2), ("failed", "succeeded"), strict=True))


@pytest.fixture
def webhook() -> Any:
    got: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if "bad" in self.path else 204)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    server.server_close()


def test_webhook(webhook, monkeypatch):
    url, got = webhook
    send(Hook(webhook=f"{url}/hook"), {"event": "failure"})
    monkeypatch.setenv("TVQ_TEST_HOOK", f"{url}/secret")
    send(Hook(webhook="env:TVQ_TEST_HOOK"), {"event": "recovery"})
    assert [(path, json.loads(body)) for path, body in got] == [
        ("/hook", {"event": "failure"}),
        ("/secret", {"event": "recovery"}),
    ]
    monkeypatch.setenv("TVQ_TEST_HOOK", f"{url}/bad-secret")
    with pytest.raises(AlertError, match="answered 500") as error:
        send(Hook(webhook="env:TVQ_TEST_HOOK"), {})
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Hook(), "give one"),
        (lambda: Hook(command=("a",), webhook="http://x/"), "give one"),
        (lambda: Hook(webhook="ftp://x/"), "expected http"),
        (lambda: Hook(webhook="http://me:secret@x/"), "without a user"),
    ],
)
def test_hooks_that_are_none(make: Callable[[], Hook], expected):
    with pytest.raises(UserError, match=expected):
        make()


def _instant(id: str) -> float:
    return datetime.strptime(id, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
