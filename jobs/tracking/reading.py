"""Reading runs back, and adding to those that have ended, for the commands."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jobs.errors import UserError
from jobs.tracking.store import load, reason, without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


class RunSummary(NamedTuple):
    """A run as MLflow holds it."""

    run_id: str
    name: str
    status: str
    """RUNNING, FINISHED, FAILED or KILLED."""
    start_ms: int
    end_ms: int | None
    parameters: dict[str, str]
    metrics: dict[str, float]
    """Last value of each metric."""
    tags: dict[str, str]


def run(uri: str, run_id: str) -> RunSummary:
    """One run. Raises UserError if the store does not answer or has no such run."""
    with _reading(uri) as client:
        return _summary(client.get_run(run_id))


def history(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric by step; empty if the run has none of that name."""
    with _reading(uri) as client:
        points = client.get_metric_history(run_id, metric)
        return [(m.step, m.value) for m in sorted(points, key=lambda m: (m.step, m.timestamp))]


def add_to_run(uri: str, run_id: str, values: Mapping[str, float], step: int) -> None:
    """Adds metrics to a run that has ended; what it holds at that step already is not repeated.

    Raises UserError if the store does not answer or has no such run.
    """
    time_ms = time.time_ns() // 1_000_000
    with _reading(uri) as client:
        from mlflow.entities import Metric

        new = [
            Metric(name, float(value), time_ms, step)
            for name, value in values.items()
            if all(stored.step != step for stored in client.get_metric_history(run_id, name))
        ]
        client.log_batch(run_id, metrics=new)


@contextlib.contextmanager
def _reading(uri: str) -> "Iterator[MlflowClient]":
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not path.exists():
        raise UserError(f"{path}: no MLflow store there; `tvq train` makes it")
    load()
    from mlflow import MlflowClient

    try:
        yield MlflowClient(tracking_uri=uri)
    except Exception as error:
        raise UserError(f"MLflow at {without_credentials(uri)}: {reason(error)}") from error


def _summary(run: "Run") -> RunSummary:
    info, data = run.info, run.data
    return RunSummary(
        info.run_id,
        info.run_name or info.run_id,
        info.status,
        info.start_time,
        info.end_time,
        dict(data.params),
        dict(data.metrics),
        dict(data.tags),
    )
