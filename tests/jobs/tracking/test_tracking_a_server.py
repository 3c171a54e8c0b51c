"""A long training against a real MLflow server that is killed in the middle of it."""

import math
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from jobs.runs.metric_spool import MetricPoint, MetricSpool, segments
from jobs.tracking.reading import history
from jobs.tracking.reading import run as read_run
from jobs.tracking.store import embedded_store
from jobs.tracking.tracker import Tracker
from jobs.ui import serve

LOSS = "train/loss_nats_per_token"
POINTS = 100_000
PER_SEGMENT = 500


def value(step: int) -> float:
    return {50_001: math.nan, 50_002: math.inf, 50_003: -math.inf}.get(step, 5.0 / step)


def stored(step: int) -> float:
    """As MLflow's SQL stores hold it, which have no infinities."""
    held = value(step)
    return math.copysign(sys.float_info.max, held) if math.isinf(held) else held


@pytest.mark.slow
@pytest.mark.tracking
def test_a_server_killed_midway_loses_none_of_a_hundred_thousand_points(tmp_path: Path):
    store = embedded_store(tmp_path)
    parameters = {f"group{i % 7}.größe{i}": "ä" * 10_000 if i < 10 else i for i in range(300)}
    said: list[str] = []
    spool = MetricSpool(tmp_path / "metrics")

    def write(steps: range) -> None:
        for step in steps:
            spool.append(
                MetricPoint(step, step * 64, 1_700_000_000_000 + step, {LOSS: value(step)})
            )
            if step % PER_SEGMENT == 0:
                spool.flush()

    first = Tracker.start(store.uri, "e", "r", "other", artifact_location=store.artifact_location)
    assert first.finish("FINISHED")  # a server wants a store that is there
    with serve(store, tmp_path / "first.log") as server:
        port = int(server.url.rpartition(":")[2])
        tracker = Tracker.start(server.url, "e", "r", "key", say=said.append)
        tracker.log_recipe(parameters, "recipe\n", "difference\n")
        tracker.attach_spool(tmp_path / "metrics", lambda points: None)
        write(range(1, POINTS // 2 + 1))
        run_id = tracker.wait_for_run(120.0)
        assert run_id
        before = len(segments(tmp_path / "metrics"))
        while len(segments(tmp_path / "metrics")) > before - 20:
            time.sleep(0.05)
        os.killpg(server.process.pid, signal.SIGKILL)  # while it is sent to
        write(range(POINTS // 2 + 1, POINTS + 1))  # the training notices nothing
        while not said:
            time.sleep(0.05)
    assert segments(tmp_path / "metrics")
    with serve(store, tmp_path / "second.log", port=port) as server:
        assert tracker.finish("FINISHED", limit_s=900.0)
        found = history(server.url, run_id, LOSS)
        tokens = history(server.url, run_id, "train/tokens")
        summary = read_run(server.url, run_id)
    assert [step for step, _ in found] == list(range(1, POINTS + 1))
    assert all(
        held == stored(step) or (math.isnan(held) and math.isnan(value(step)))
        for step, held in found
    )
    assert tokens == [(step, step * 64.0) for step in range(1, POINTS + 1)]
    assert summary.status == "FINISHED"
    assert len(summary.parameters) == 300
    assert summary.parameters["group1.größe1"] == "ä" * 497 + "..."
    _outage, recovery = said
    assert "answers again" in recovery
