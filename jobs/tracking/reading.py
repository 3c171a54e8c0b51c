"""Reading runs back, for the commands."""

import contextlib
from collections.abc import Iterator
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
    parameters: dict[str, str]
    metrics: dict[str, float]
    """Last value of each metric."""
    tags: dict[str, str]
    datasets: dict[str, list[str]]
    """Digests of the corpus splits, by what the run used them for: training, evaluation."""


class Point(NamedTuple):
    """One value of a metric."""

    step: int
    value: float
    time_ms: int
    """Unix time of the measurement, milliseconds."""


def run(uri: str, run_id: str) -> RunSummary:
    """One run. Raises UserError if the store does not answer or has no such run."""
    with reading(uri) as client:
        return _summary(client.get_run(run_id))


def find_runs(uri: str, experiment: str, query: str) -> list[RunSummary]:
    """The runs of an experiment for which an MLflow filter holds, the oldest first.

    Args:
        query: such as "params.`model.d_model` = '64' and attributes.status = 'FINISHED'"; empty:
            all of them.

    Raises:
        UserError: the store does not answer, has no such experiment or cannot read the filter.
    """
    with reading(uri) as client:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise UserError(
                f"--experiment {experiment}: MLflow at {without_credentials(uri)} has none of that"
                " name; `tvq ui` shows those that are"
            )
        runs, token = [], None
        while True:
            page = client.search_runs(
                [found.experiment_id],
                query,
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            runs += map(_summary, page)
            token = page.token
            if not token:
                return runs


def history(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric by step; empty if the run has none of that name."""
    return [(point.step, point.value) for point in points(uri, run_id, metric)]


def points(uri: str, run_id: str, metric: str) -> list[Point]:
    """A metric by step, with its times; empty if the run has none of that name."""
    with reading(uri) as client:
        found = client.get_metric_history(run_id, metric)
        by_step = sorted(found, key=lambda m: (m.step, m.timestamp))
        return [Point(m.step, m.value, m.timestamp) for m in by_step]


@contextlib.contextmanager
def reading(uri: str) -> "Iterator[MlflowClient]":
    """A client of a store that must exist; what goes wrong with it is a UserError of one line."""
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not path.exists():
        raise UserError(f"{path}: no MLflow store there; `tvq train` makes it")
    load()
    from mlflow import MlflowClient

    try:
        yield MlflowClient(tracking_uri=uri)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"MLflow at {without_credentials(uri)}: {reason(error)}") from error


def _summary(run: "Run") -> RunSummary:
    info, data = run.info, run.data
    datasets: dict[str, list[str]] = {}
    for used in run.inputs.dataset_inputs if run.inputs else ():
        context = next((tag.value for tag in used.tags if tag.key == "mlflow.data.context"), "")
        datasets.setdefault(context, []).append(used.dataset.digest)
    return RunSummary(
        info.run_id,
        info.run_name or info.run_id,
        info.status,
        info.start_time,
        dict(data.params),
        dict(data.metrics),
        dict(data.tags),
        datasets,
    )
