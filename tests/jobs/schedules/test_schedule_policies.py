"""Overlap, misfires, retries, deadlines, pauses, history: what a schedule says is what happens."""

import functools
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from jobs.flows.flow_folder import FlowFolder, flow_state
from jobs.schedules.launchers import State
from jobs.schedules.schedule import Schedule, list_schedules, submission_id
from jobs.schedules.scheduler import Scheduler
from jobs.schedules.ticks import tick_id
from tests.jobs.schedules.schedules_under_a_clock import (
    BEGIN,
    Clock,
    Cluster,
    add,
    hours,
    outcomes,
    run,
)


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
    torn = add(tmp_path, "torn")
    torn.tick(hours(1)[0]).create("lease.json", b"{}")
    torn.tick(hours(1)[0]).write("result.json", b'{"outco')
    clock = Clock(BEGIN + timedelta(minutes=61))
    said: list[str] = []
    scheduler = Scheduler(tmp_path, Cluster(clock), clock=clock, warn=said.append)
    for _ in range(3):
        scheduler.step()
    assert outcomes(folder) == {hours(1)[0]: "succeeded"}
    damaged, torn_file = said  # once each, however often it is looked at
    assert damaged.startswith("broken: ")
    assert "schedule.json: damaged" in damaged
    assert torn_file.startswith(f"torn: a damaged file in {tmp_path}/ticks/torn")
    assert [folder.name for folder in list_schedules(tmp_path)] == ["broken", "nightly", "torn"]
