"""What a training of a known loss leaves in its spool, and reading back what the store holds."""

import time
from pathlib import Path

from jobs.runs.metric_spool import MetricPoint, MetricSpool
from jobs.tracking.store import Store
from jobs.tracking.tracker import Tracker

REPOSITORY = Path(__file__).parents[3]
LOSS = "train/loss_nats_per_token"


def client(store: Store):
    from mlflow import MlflowClient

    return MlflowClient(store.uri)


def run_id_of(tracker: Tracker) -> str:
    run_id = tracker.wait_for_run()
    assert run_id
    return run_id


def write(folder: Path, steps: range, per_segment: int = 7) -> None:
    """A training's spool: the loss of each step is a function of the step, its time is now."""
    spool = MetricSpool(folder)
    for step in steps:
        values = {LOSS: loss(step)}
        if step % 10 == 0:
            values["eval/bits_per_byte"] = loss(step) * 2
        spool.append(MetricPoint(step, step * 100, time.time_ns() // 1_000_000, values))
        if step % per_segment == 0:
            spool.flush()
    spool.flush()


def loss(step: int) -> float:
    return 5.0 / (step + 1)


def complete(last: int) -> list[tuple[int, float]]:
    return [(step, loss(step)) for step in range(1, last + 1)]


def experiment_of(store: Store, run_id: str) -> str:
    return client(store).get_run(run_id).info.experiment_id


def statuses(store: Store, experiment_id: str) -> list[str]:
    return sorted(run.info.status for run in client(store).search_runs([experiment_id]))


def artifact(store: Store, run_id: str, name: str) -> bytes:
    return Path(client(store).download_artifacts(run_id, name)).read_bytes()
