"""An MLflow run as the destination of a `Delivery`."""

import contextlib
import functools
import getpass
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.palette import PALETTE
from jobs.tracking.checkpoint_models import UPDATE_TAG, mark_deleted
from jobs.tracking.delivery import Measurement, Refusal
from jobs.tracking.store import Store, one_process_creates, reason, without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_KEY_TAG = "tvq.run_key"
_PARAMETERS_PER_CALL = 100


class MlflowRun:
    """An MLflow run as the destination of a `Delivery`. Used by its sender thread only."""

    def __init__(
        self, store: Store, experiment: str, run_name: str, run_key: str, run_id: str | None
    ) -> None:
        self.name = without_credentials(store.uri)
        self._store = store
        self._experiment = experiment
        self._run_name = run_name
        self._run_key = run_key
        self.run_id = run_id or ""
        self.experiment_id = ""
        self._corpora: dict[str, list[tuple[str, str]]] = {}
        """Name and digest of each, by what the run uses it for."""

    @functools.cached_property
    def client(self) -> "MlflowClient":
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self._store.uri)

    def open(self) -> dict[str, int]:
        with _plain_errors(), one_process_creates(self._store.uri):
            experiment_id = self._find_or_create_experiment()
            run = self._find_or_create_run(experiment_id)
        self.run_id = run.info.run_id
        self.experiment_id = run.info.experiment_id
        # RunData.metrics has no steps; its message form has.
        return {metric.key: metric.step for metric in run.data.to_proto().metrics}

    def send(self, measurements: list[Measurement]) -> dict[str, str]:
        """One call; if MLflow refuses it, one call a name, to leave out only what it refuses.

        A call whose acknowledgement was lost is repeated with the same timestamps: MLflow stores
        equal rows once.
        """
        with contextlib.suppress(Refusal):
            self._log(measurements)
            return {}
        refused = {}
        for name in dict.fromkeys(one.name for one in measurements):
            try:
                self._log([one for one in measurements if one.name == name])
            except Refusal as refusal:
                refused[name] = str(refusal)
        return refused

    def end(self, status: str) -> None:
        with _plain_errors():
            self.client.set_terminated(self.run_id, status)

    @contextlib.contextmanager
    def answers(self) -> Iterator[None]:
        """Turns MLflow's answer "never" into a Refusal and any other error into a _StoreError."""
        with _plain_errors():
            try:
                with _plain_errors():
                    yield
            except Refusal:
                # Everything is refused for a deleted run; nothing is dropped for that.
                if self.client.get_run(self.run_id).info.lifecycle_stage == "deleted":
                    raise _StoreError(f"run {self.run_id} was deleted in MLflow") from None
                raise

    def log_parameters(self, parameters: dict[str, str]) -> None:
        from mlflow.entities import Param

        known = self.client.get_run(self.run_id).data.params
        new = [Param(name, value) for name, value in parameters.items() if name not in known]
        for begin in range(0, len(new), _PARAMETERS_PER_CALL):
            self.client.log_batch(self.run_id, params=new[begin : begin + _PARAMETERS_PER_CALL])
        changed = [
            f"{name}={value} (was {known[name]})"
            for name, value in parameters.items()
            if known.get(name, value) != value
        ]
        if changed:
            self.client.set_tag(self.run_id, "tvq.changed_on_resume", ", ".join(changed))

    def set_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(*tag) for tag in tags.items()])

    def log_dataset(self, fields: dict[str, str], context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        corpora = self._corpora.setdefault(context, [])
        if (corpus := (fields["name"], fields["digest"])) not in corpora:
            corpora.append(corpus)
        tags = [InputTag("mlflow.data.context", context)]
        self.client.log_inputs(self.run_id, [DatasetInput(Dataset(**fields), tags)])

    def log_artifact(self, name: str, content: bytes) -> None:
        folder, _, file_name = name.rpartition("/")
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / file_name
            path.write_bytes(content)
            self.client.log_artifact(self.run_id, str(path), folder or None)

    def missing_artifacts(self, folder: str, names: Collection[str]) -> list[str]:
        """Which of these files the run does not have in its artifact folder."""
        held = {each.path for each in self.client.list_artifacts(self.run_id, folder)}
        return [name for name in names if f"{folder}/{name}" not in held]

    def history(self, metric: str) -> list[tuple[int, float]]:
        found = self.client.get_metric_history(self.run_id, metric)
        return [(one.step, one.value) for one in sorted(found, key=lambda m: (m.step, m.timestamp))]

    def log_checkpoint(self, update: int, uri: str, metrics: list[Measurement]) -> None:
        from mlflow.entities import LoggedModelOutput

        client, name = self.client, f"{self._run_name}-{update:08d}"
        found = client.search_logged_models(
            [self.experiment_id], f"source_run_id = '{self.run_id}' AND name = '{name}'"
        )
        model = (
            found[0]
            if found
            else client.create_logged_model(
                self.experiment_id,
                name=name,
                source_run_id=self.run_id,
                tags={
                    "tvq.checkpoint_uri": without_credentials(uri),
                    UPDATE_TAG: str(update),
                    **{
                        f"tvq.corpus.{context}": ", ".join(map(" ".join, corpora))
                        for context, corpora in self._corpora.items()
                    },
                },
                model_type="transformer-vq",
            )
        )
        linked = {(metric.key, metric.step) for metric in model.metrics or []}
        # A metric that the run holds keeps its timestamp: MLflow then finds the run's row there and
        # stores it for the model only, so the run's history gets no second point at that step.
        new = [self._stored(one) or one for one in metrics if (one.name, update) not in linked]
        self._log(new, model.model_id, self._corpora.get("evaluation", []))
        client.finalize_logged_model(model.model_id, "READY")
        outputs = client.get_run(self.run_id).outputs
        if model.model_id not in {
            one.model_id for one in (outputs.model_outputs if outputs else ())
        }:
            client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, update)])

    def mark_deleted(self, present: Collection[int]) -> None:
        mark_deleted(self.client, self.experiment_id, self.run_id, present)

    def _log(
        self,
        measurements: list[Measurement],
        model_id: str | None = None,
        measured_on: Sequence[tuple[str, str]] = (),
    ) -> None:
        """`measured_on`: the corpora; MLflow takes one, so those of a mixture are not named."""
        from mlflow.entities import Metric

        name, digest = measured_on[0] if len(measured_on) == 1 else (None, None)
        metrics = [
            Metric(one.name, one.value, one.time_ms, one.step, model_id, name, digest)
            for one in measurements
        ]
        if metrics:
            with self.answers():
                self.client.log_batch(self.run_id, metrics=metrics)

    def _stored(self, wanted: Measurement) -> Measurement | None:
        """`wanted` as the run holds it, with its timestamp, if it does; NaN equals NaN."""
        for metric in self.client.get_metric_history(self.run_id, wanted.name):
            if metric.step == wanted.step and repr(metric.value) == repr(wanted.value):
                return wanted._replace(time_ms=metric.timestamp)
        return None

    def _find_or_create_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                return self.client.create_experiment(
                    self._experiment,
                    self._store.artifact_location,
                    tags={"mlflow.experimentKind": "custom_model_development"},
                )
            except MlflowException as error:
                found = self.client.get_experiment_by_name(self._experiment)
                if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _find_or_create_run(self, experiment_id: str) -> "Run":
        from mlflow.entities import ViewType
        from mlflow.exceptions import MlflowException

        run = None
        if self.run_id:
            try:
                run = self.client.get_run(self.run_id)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
        if run is None:
            found = self.client.search_runs(
                [experiment_id],
                f"tags.`{RUN_KEY_TAG}` = '{self._run_key}'",
                run_view_type=ViewType.ALL,
                max_results=1,
                order_by=["attributes.start_time ASC"],
            )
            run = found[0] if found else None
        if run is None:
            tags = {
                RUN_KEY_TAG: self._run_key,
                "mlflow.source.name": "tvq",
                "mlflow.source.type": "LOCAL",
                # MLflow's page draws runs in colours of their ids' hashes, two of them alike.
                "mlflow.runColor": PALETTE[self._count_runs(experiment_id) % len(PALETTE)],
            }
            with contextlib.suppress(KeyError, OSError):  # No such user in this container.
                tags["mlflow.user"] = getpass.getuser()
            return self.client.create_run(experiment_id, tags=tags, run_name=self._run_name)
        if run.info.lifecycle_stage == "deleted":
            self.client.restore_run(run.info.run_id)
        if run.info.status != "RUNNING":
            self.client.update_run(run.info.run_id, status="RUNNING")
        return run

    def _count_runs(self, experiment_id: str) -> int:
        return len(self.client.search_runs([experiment_id], max_results=1000))


class _StoreError(Exception):
    """What MLflow or the way to it failed with, as one line without credentials."""


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Turns MLflow's answer "never" into a Refusal and every other error into a _StoreError."""
    try:
        yield
    except (Refusal, _StoreError):
        raise
    except Exception as error:
        # Only this code: MLflow answers BAD_REQUEST to errors of its database too, which pass.
        refused = getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"
        raise (Refusal if refused else _StoreError)(reason(error)) from error
