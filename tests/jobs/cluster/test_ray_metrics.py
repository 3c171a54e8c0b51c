"""What Prometheus finds of a training: scraped from a real Ray node."""

import re
import time
import urllib.request
from pathlib import Path

import pytest

from jobs.checkpoints.manifest import CheckpointManifest, commit
from jobs.cluster.ray_metrics import GAUGES, RayMetrics
from jobs.cluster.ray_session import ray_session
from jobs.runs.metric_spool import MetricPoint, MetricSpool
from jobs.runs.run_directory import RunDirectory


def test_without_a_ray_session_there_is_no_thread(tmp_path: Path):
    watched = RayMetrics(RunDirectory.at(tmp_path, "a"), {"update": 3.0})
    assert watched._thread is None
    watched.close()


@pytest.mark.ray
def test_gauges_are_exported_by_ray(tmp_path: Path):
    run = RunDirectory.at(tmp_path, "a-run")
    run.claim("identity", {}, "recipe")
    taken = time.time() - 1000
    commit(run, CheckpointManifest(2, 4, 1, "", 1, {}, {}, {}, {}, created=taken), lambda: None)
    spool = MetricSpool(run.metrics)
    for step in (1, 2):
        spool.append(MetricPoint(step, 1, 1, {"train/loss_nats_per_token": 2.0}))
        spool.flush()
    latest = {
        "update": 4.0, "perf/tokens_per_second": 812.5, "train/loss_nats_per_token": 2.25,
        "train/skipped_updates": 3.0, "codebook/dead_codes": 7.0, "codebook/collapsed_layers": 1.0,
        "goodput/fraction": 0.5, "checkpoint/upload_lag_seconds": 6.5,
    }  # fmt: skip
    expected = {
        "tvq_progress_update": 4, "tvq_tokens_per_second": 812.5, "tvq_loss_nats_per_token": 2.25,
        "tvq_skipped_updates": 3, "tvq_dead_codes": 7, "tvq_collapsed_layers": 1,
        "tvq_goodput_fraction": 0.5, "tvq_upload_lag_seconds": 6.5, "tvq_spool_depth": 2,
    }  # fmt: skip
    with ray_session(None, cpus=1):
        import ray

        watched = RayMetrics(run, latest, seconds=0.5)
        [node] = ray.nodes()
        assert node["MetricsExportPort"] > 0
        url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
        deadline = time.monotonic() + 90
        found: dict[str, float] = {}
        while not set(GAUGES) <= set(found) and time.monotonic() < deadline:
            time.sleep(0.5)
            with urllib.request.urlopen(url, timeout=10) as answer:
                text = answer.read().decode()
            lines = re.findall(r'^ray_(tvq_\w+)\{([^}]*run="a-run"[^}]*)\} (\S+)$', text, re.M)
            found = {name: float(value) for name, _, value in lines}
        watched.close()
    age = found.pop("tvq_checkpoint_age_seconds", None)
    assert found == expected
    assert age is not None
    assert 1000 <= age <= time.time() - taken
