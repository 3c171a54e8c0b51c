"""An MLflow run that has other runs under it: a flow's, a sweep's.

What the tracking server does ends neither: a call that fails is warned of, and the next one tries
again to begin the run.
"""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

from jobs.recipe import Recipe
from jobs.tracking.mlflow_run import MlflowRun
from jobs.tracking.store import Store, load, reason
from pipeline.storage import Location

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT_TAG = "mlflow.parentRunId"
_LONGEST_TAG = 5000


class ParentRun:
    """One flow at one tick, or one sweep, in MLflow; the same key finds the same run again."""

    def __init__(self, store: Store, experiment: str, key: str, warn: Callable[[str], None]):
        self._store = store
        self._experiment = experiment
        self._key = key
        self._warn = warn
        self._run: MlflowRun | None = None

    @classmethod
    def of(cls, recipe: Recipe, root: Location, key: str, warn: Callable[[str], None]) -> Self:
        """The parent of trainings by this recipe under this root."""
        from jobs.training.train import store_of

        return cls(store_of(recipe, root), recipe.tracking.experiment, key, warn)

    def adopt(self, run_id: str | None, ended: str | None = None) -> None:
        """Shows a training's run under this one, unless it is under another already.

        Args:
            run_id: the training's; None: it has none, which its own warnings say.
            ended: what it ended as, if it was killed before it could say so.
        """

        def adopt(client: "MlflowClient", parent: str) -> None:
            if run_id is None:
                return
            run = client.get_run(run_id)
            if PARENT_TAG not in run.data.tags:
                client.set_tag(run_id, PARENT_TAG, parent)
            if ended and run.info.status == "RUNNING":
                client.set_terminated(run_id, ended)

        self._call(adopt)

    def stage(
        self, name: str, figures: Mapping[str, float], tags: Mapping[str, str] | None = None
    ) -> None:
        """A run of its own under this one, with figures; the same one again changes nothing."""

        def stage(client: "MlflowClient", parent: str) -> None:
            key = f"{self._key}-{name}"
            child = MlflowRun(self._store, self._experiment, key, key, None)
            child.open()
            known = client.get_run(child.run_id).data
            for metric, value in figures.items():
                if metric not in known.metrics:
                    client.log_metric(child.run_id, metric, value)
            for tag, value in {PARENT_TAG: parent, **(tags or {})}.items():
                client.set_tag(child.run_id, tag, value[:_LONGEST_TAG])
            client.set_terminated(child.run_id, "FINISHED")

        self._call(stage)

    def report(self, text: str, tags: Mapping[str, str]) -> None:
        """The report, as the run's description and as an artifact; what is looked for as tags."""

        def report(client: "MlflowClient", parent: str) -> None:
            assert self._run is not None
            self._run.log_artifact("report.txt", text.encode())
            client.set_tag(parent, "mlflow.note.content", f"```\n{text}```"[:_LONGEST_TAG])
            for tag, value in tags.items():
                client.set_tag(parent, f"tvq.{tag}", value[:_LONGEST_TAG])

        self._call(report)

    def figures(self, values: Mapping[str, float]) -> None:
        """Metrics of the parent itself."""

        def log(client: "MlflowClient", parent: str) -> None:
            from mlflow.entities import Metric

            now = time.time_ns() // 1_000_000
            metrics = [Metric(name, float(value), now, 0) for name, value in values.items()]
            client.log_batch(parent, metrics=metrics)

        self._call(log)

    def finish(self, status: str) -> None:
        """Ends it as FINISHED, FAILED or KILLED."""
        self._call(lambda client, parent: client.set_terminated(parent, status))

    def _call(self, work: "Callable[[MlflowClient, str], None]") -> None:
        try:
            if self._run is None:
                load()
                run = MlflowRun(self._store, self._experiment, self._key, self._key, None)
                run.open()
                self._run = run
            work(self._run.client, self._run.run_id)
        except Exception as error:
            self._warn(f"tracking: {reason(error)}")


def children(store: Store, experiment: str, key: str) -> list[dict[str, Any]]:
    """The runs under the parent of that key: name, status, metrics, tags."""
    load()
    parent = MlflowRun(store, experiment, key, key, None)
    parent.open()
    found = parent.client.search_runs(
        [parent.experiment_id], f"tags.`{PARENT_TAG}` = '{parent.run_id}'"
    )
    return [
        {
            "name": run.info.run_name,
            "status": run.info.status,
            "metrics": dict(run.data.metrics),
            "tags": dict(run.data.tags),
        }
        for run in found
    ]
