"""A training that is killed, tracked through an MLflow server that is killed too."""

import contextlib
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from jobs.checkpoints.manifest import newest_update
from jobs.errors import ExitCode
from jobs.tracking.reading import points
from jobs.tracking.store import Store
from jobs.tracking.tracker import Tracker
from jobs.ui import serve
from pipeline.storage import open_store
from tests.chaos.training_under_fire import Training
from tests.micro import write_micro
from tests.runs import LOSS

pytestmark = [pytest.mark.ray, pytest.mark.tracking, pytest.mark.slow, pytest.mark.timeout(1800)]

OUTAGE_SECONDS = 30.0
SLOWER = 1.25
"""How much longer steps may take in the outage: room for the noise of a 95th percentile."""
FIELDS = (
    "cluster.workers=2", "optimizer.schedule_steps=400", "checkpoint.every=40",
    "training.evaluate_every=200", "training.samples=1",
)  # fmt: skip


def test_kills_and_an_outage_leave_one_run_with_every_update_once(bucket: str, tmp_path: Path):
    write_micro(tmp_path)
    store = Store(f"sqlite:///{tmp_path / 'mlflow.db'}", f"{bucket}/artifacts")
    first = Tracker.start(store.uri, "other", "first", "other")
    assert first.finish("FINISHED")  # a server wants a database that is there
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serve(store, tmp_path / "first.log"))
        port, uri = int(server.url.rpartition(":")[2]), f"tracking.uri={server.url}"
        training = Training(tmp_path, "tracked", uri, "training.steps=1000000", *FIELDS)
        stack.callback(training.close)
        since = -1
        for kind in ("worker 0", "driver"):
            training.at_work(since)
            since = len(training.events) - 1
            assert training.kill(kind)
        training.at_work(since)
        time.sleep(OUTAGE_SECONDS)  # as many steps with a server as without one
        os.killpg(server.process.pid, signal.SIGKILL)
        killed_at, before = time.time(), newest_update(training.run)
        time.sleep(OUTAGE_SECONDS)
        during = newest_update(training.run)
        stack.enter_context(serve(store, tmp_path / "second.log", port))
        back_at = time.time()
        training.at_work(since)
        steps = training.stopped(ExitCode.PREEMPTED)
        # What MLflow has not been sent yet is sent when the run is begun again, and then it ends.
        Training(tmp_path, "tracked", uri, f"training.steps={steps}", *FIELDS).finished()

        client = MlflowClient(server.url)
        experiment = client.get_experiment_by_name("tvq")
        assert experiment
        [run] = client.search_runs([experiment.experiment_id])
        found = points(server.url, run.info.run_id, LOSS)
        rates = points(server.url, run.info.run_id, "perf/tokens_per_second")
        curves = Path(client.download_artifacts(run.info.run_id, "plots/curves.png")).read_bytes()
        samples = [each.path for each in client.list_artifacts(run.info.run_id, "samples")]
    assert run.info.status == "FINISHED"
    assert [point.step for point in found] == list(range(1, steps + 1))
    assert before < during, "the training went on while the server was down"
    assert curves.startswith(b"\x89PNG")
    assert len(samples) == steps // 200
    stored = {entry.name for entry in open_store(f"{bucket}/artifacts").list()}
    assert any(name.endswith("plots/curves.png") for name in stored)

    group = training.events[training.newest("state ready")]["update"]
    steady = [(p.time_ms / 1000, 1 / p.value) for p in rates if p.step > group + 20]
    down = np.array([s for at, s in steady if killed_at < at < killed_at + OUTAGE_SECONDS])
    up = np.array([s for at, s in steady if at < killed_at or at > back_at])
    ratio = np.percentile(down, 95) / np.percentile(up, 95)
    print(
        f"p95 of a step while the server was down over that of others: {ratio:.2f}"
        f" ({len(down)} and {len(up)} batches)"
    )
    assert ratio < SLOWER
