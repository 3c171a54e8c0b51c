"""Points on their way to a real MLflow store: none is lost or repeated, whatever fails or dies."""

import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.runs.metric_spool import MetricPoint, MetricSpool, segments
from jobs.tracking.reading import history
from jobs.tracking.store import Store, embedded_store
from tests.jobs.tracking.tracked_training import (
    LOSS,
    REPOSITORY,
    artifact,
    complete,
    experiment_of,
    loss,
    run_id_of,
    statuses,
    write,
)

pytestmark = pytest.mark.tracking


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.05)


@pytest.fixture
def broken(store: Store) -> Iterator[Callable[[bool], None]]:
    """Breaks the store and mends it: its table of metrics is gone."""

    def switch(broken: bool) -> None:
        before, after = ("metrics", "hidden") if broken else ("hidden", "metrics")
        with sqlite3.connect(store.uri.removeprefix("sqlite:///"), timeout=30) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            if before in tables:
                database.execute(f"ALTER TABLE {before} RENAME TO {after}")

    yield switch
    switch(False)


def test_repeated_updates_of_a_resumed_training_leave_no_gap_and_no_overlap(
    store: Store, start, tmp_path: Path
):
    folder = tmp_path / "a run" / "metrics"
    shown: list[int] = []
    tracker = start()
    tracker.attach_spool(folder, lambda points: shown.extend(p.step for p in points))
    write(folder, range(1, 61))
    until(lambda: not segments(folder))
    write(folder, range(51, 101))  # Resumed at its checkpoint after update 50.
    run_id = run_id_of(tracker)
    assert tracker.finish("FINISHED")
    assert history(store.uri, run_id, LOSS) == complete(100)
    assert history(store.uri, run_id, "train/tokens") == [(s, s * 100.0) for s in range(1, 101)]
    evaluations = [(step, loss(step) * 2) for step in range(10, 101, 10)]
    assert history(store.uri, run_id, "eval/bits_per_byte") == evaluations
    assert shown == [*range(1, 61), *range(51, 101)]
    assert segments(folder) == []


def test_a_driver_killed_and_started_again_leaves_no_gap_and_no_overlap(
    store: Store, start, tmp_path: Path, request
):
    folder = tmp_path / "metrics"
    program = f"""
import time
from pathlib import Path
from jobs.tracking.tracker import Tracker
tracker = Tracker.start({store.uri!r}, {request.node.name!r}, "a run", {request.node.name!r})
tracker.attach_spool(Path({str(folder)!r}), lambda points: None)
time.sleep(600)
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    write(folder, range(1, 41))
    driver = subprocess.Popen([sys.executable, "-c", program], env=environment)
    until(lambda: not segments(folder))
    driver.send_signal(signal.SIGSTOP)
    write(folder, range(41, 61))  # The training outlives its driver, then is resumed from 30.
    driver.kill()
    driver.wait()
    tracker = start()
    tracker.attach_spool(folder, lambda points: None)
    write(folder, range(31, 81))
    run_id = run_id_of(tracker)
    assert tracker.finish("FINISHED")
    assert history(store.uri, run_id, LOSS) == complete(80)
    assert statuses(store, experiment_of(store, run_id)) == ["FINISHED"]


def test_a_store_that_fails_midway_loses_no_point_and_says_it_once(
    store: Store, start, said, broken, tmp_path: Path
):
    folder = tmp_path / "metrics"
    shown: list[int] = []
    tracker = start()
    tracker.attach_spool(folder, lambda points: shown.extend(p.step for p in points))
    write(folder, range(1, 31))
    until(lambda: not segments(folder))
    broken(True)
    write(folder, range(31, 61))
    until(lambda: bool(said) and shown[-1] == 60)  # The console does not wait for the store.
    assert segments(folder)
    broken(False)
    run_id = run_id_of(tracker)
    assert tracker.finish("FINISHED")
    assert history(store.uri, run_id, LOSS) == complete(60)
    outage, recovery = said
    assert "no such table" in outage
    assert "answers again" in recovery
    assert all("\n" not in line for line in said)


def test_what_could_not_be_sent_waits_for_the_next_start(
    store: Store, start, said, broken, tmp_path: Path
):
    folder = tmp_path / "metrics"
    write(folder, range(1, 31))
    tracker = start()
    run_id = run_id_of(tracker)
    broken(True)
    tracker.attach_spool(folder, lambda points: None)
    assert not tracker.finish("FINISHED", limit_s=2.0)
    assert str(folder) in said[-1]
    assert segments(folder)
    broken(False)
    again = start()
    again.attach_spool(folder, lambda points: None)
    assert again.finish("FINISHED")
    assert history(store.uri, run_id, LOSS) == complete(30)


def test_a_store_that_comes_up_late_gets_everything(start, said, tmp_path: Path):
    root = tmp_path / "late root"
    root.write_text("a file where the folder will be")
    late = Store(f"sqlite:///{root / 'mlflow.db'}", (root / "mlartifacts").as_uri())
    tracker = start(at=late)
    tracker.log_text("a.txt", "early")
    tracker.attach_spool(tmp_path / "metrics", lambda points: None)
    write(tmp_path / "metrics", range(1, 21))
    assert tracker.wait_for_run(timeout_s=0.5) is None
    until(lambda: bool(said))
    root.unlink()
    run_id = run_id_of(tracker)
    assert tracker.finish("FINISHED")
    assert history(late.uri, run_id, LOSS) == complete(20)
    assert artifact(late, run_id, "a.txt") == b"early"


def test_artifacts_that_cannot_be_stored_do_not_hold_up_metrics_and_status(
    start, said, tmp_path: Path
):
    root = tmp_path / "root"
    root.mkdir()
    broken = embedded_store(root)
    (root / "mlartifacts").write_text("a file where the folder should be")
    tracker = start(at=broken)
    tracker.log_text("a.txt", "x")
    tracker.attach_spool(tmp_path / "metrics", lambda points: None)
    write(tmp_path / "metrics", range(1, 21))
    run_id = run_id_of(tracker)
    assert not tracker.finish("FINISHED", limit_s=1.5)
    assert history(broken.uri, run_id, LOSS) == complete(20)
    assert statuses(broken, experiment_of(broken, run_id)) == ["FINISHED"]


def test_a_metric_that_mlflow_refuses_is_left_out_alone(store: Store, start, said, tmp_path: Path):
    spool = MetricSpool(tmp_path / "metrics")
    for step in range(1, 4):
        spool.append(MetricPoint(step, step, step, {"bad;name": 1.0, LOSS: loss(step)}))
        spool.flush()
    tracker = start()
    tracker.attach_spool(tmp_path / "metrics", lambda points: None)
    run_id = run_id_of(tracker)
    assert tracker.finish("FINISHED")
    assert history(store.uri, run_id, LOSS) == complete(3)
    [complaint] = said
    assert "bad;name" in complaint


def test_a_damaged_segment_is_said_and_kept_and_its_other_lines_are_stored(
    store: Store, start, said, tmp_path: Path
):
    write(tmp_path / "metrics", range(1, 4), per_segment=100)
    with (tmp_path / "metrics" / "00000001.jsonl").open("a") as file:
        file.write('{"step": 4, "tok')
    tracker = start()
    tracker.attach_spool(tmp_path / "metrics", lambda points: None)
    run_id = run_id_of(tracker)
    assert tracker.finish("FINISHED")
    assert history(store.uri, run_id, LOSS) == complete(3)
    assert (tmp_path / "metrics" / "00000001.jsonl.damaged").exists()
    [complaint] = said
    assert "line 4" in complaint


def test_nan_and_infinity_are_stored(store: Store, start, tmp_path: Path):
    spool = MetricSpool(tmp_path / "metrics")
    for step, value in enumerate((math.nan, math.inf, -math.inf, 1.0)):
        spool.append(MetricPoint(step, step, step, {LOSS: value}))
    spool.flush()
    tracker = start()
    tracker.attach_spool(tmp_path / "metrics", lambda points: None)
    run_id = run_id_of(tracker)
    assert tracker.finish("FINISHED")
    stored = [value for _, value in history(store.uri, run_id, LOSS)]
    assert math.isnan(stored[0])
    # MLflow's SQL stores have no infinities: the largest floats stand for them.
    assert stored[1:] == [sys.float_info.max, -sys.float_info.max, 1.0]


def test_a_callback_that_raises_is_said_and_does_not_stop_the_tracking(
    store: Store, start, said, tmp_path: Path
):
    write(tmp_path / "metrics", range(1, 6), per_segment=100)
    tracker = start()
    tracker.attach_spool(tmp_path / "metrics", lambda points: points[99])  # type: ignore
    run_id = run_id_of(tracker)
    assert tracker.finish("FINISHED")
    assert history(store.uri, run_id, LOSS) == complete(5)
    assert len(said) == 1
