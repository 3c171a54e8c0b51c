"""The training's side of tracking: what it hands in, none of which ever fails or waits."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self

from jobs.lineage.code_diff import CodeDiff
from jobs.lineage.provenance import Provenance
from jobs.runs.metric_spool import MetricPoint
from jobs.tracking.delivery import Delivery, Measurement, Refusal
from jobs.tracking.mlflow_run import MlflowRun
from jobs.tracking.store import DIGEST_CHARACTERS, Store, load, reason, without_credentials
from pipeline.storage import Location

_LONGEST_PARAMETER = 500
_logger = logging.getLogger("tvq.tracking")

Scalar = str | int | float | bool | None
Drawing = Callable[[Mapping[str, Sequence[tuple[int, float]]]], bytes]
"""From (step, value) by step, of each metric, to a picture."""


class Tracker:
    """One training in MLflow.

    Nothing here raises into training or waits for the store, except `wait_for_run` and `finish`,
    which have limits. How calls and points reach the store, and what happens while it is down, is
    the policy of `jobs.tracking.delivery.Delivery`.
    """

    def __init__(self, run: MlflowRun, delivery: Delivery) -> None:
        """Use `Tracker.start`."""
        self._run = run
        self._delivery = delivery

    @classmethod
    def start(
        cls,
        uri: str,
        experiment: str,
        run_name: str,
        run_key: str,
        run_id: str | None = None,
        *,
        artifact_location: str | None = None,
        say: Callable[[str], None] = _logger.warning,
    ) -> Self:
        """Begins or continues the MLflow run of one training.

        Takes the run `run_id` if it exists, else the one tagged with `run_key`, else creates it.
        Imports MLflow in the calling thread, so that no two threads import it or pandas at once,
        then returns; the store is opened in the background. `say` gets the one-line messages.
        """
        run = MlflowRun(Store(uri, artifact_location), experiment, run_name, run_key, run_id)

        def speak(message: str) -> None:
            say(f"tracking: {message}")

        delivery = Delivery(run, speak)
        try:
            load()
        except Exception as error:
            speak(f"off, MLflow cannot be imported ({reason(error)})")
        else:
            delivery.start()
        return cls(run, delivery)

    def wait_for_run(self, timeout_s: float = 60.0) -> str | None:
        """The MLflow run id, waiting until the store has answered; None if it did not in time."""
        return self._run.run_id if self._delivery.wait_until_open(timeout_s) else None

    def attach_spool(
        self, folder: Location, on_points: Callable[[list[MetricPoint]], None]
    ) -> None:
        """Sends what appears in the spool `folder`, and calls `on_points` with it at once.

        `on_points` is called from a thread, within 0.5 s of a flush, whether the store answers or
        not, and also with points that an earlier start left unsent.
        """
        self._delivery.attach(folder, on_points)

    def detach_spool(self) -> None:
        """No more points will come: returns once all of them were given to `on_points`."""
        self._delivery.detach()

    def log_recipe(
        self, parameters: Mapping[str, Any], resolved_yaml: str, difference: str
    ) -> None:
        """Stores the recipe: nested parameters flattened to `a.b`, and both texts as artifacts.

        A value over 500 characters is cut in the parameter and kept whole in
        `recipe/long_parameters.json`. On resume, parameters that differ from the first start's
        (MLflow's are immutable) are noted in the tag `tvq.changed_on_resume`.
        """
        flat = flatten(parameters)
        long = {name: value for name, value in flat.items() if len(value) > _LONGEST_PARAMETER}
        for name, value in long.items():
            flat[name] = value[: _LONGEST_PARAMETER - 3] + "..."
        self._queue("the parameters", lambda: self._run.log_parameters(flat))
        self.log_text("recipe/recipe.yaml", resolved_yaml)
        self.log_text("recipe/difference_from_defaults.yaml", difference)
        if long:
            self.log_text("recipe/long_parameters.json", json.dumps(long, indent=2))

    def log_provenance(self, provenance: Provenance, diff: CodeDiff) -> None:
        """Stores as tags what this start runs on, and the checkout's changes as an artifact.

        The patch is named by its content, and the tag `tvq.git.diff` says which is this start's, or
        why it has none; so a run that was resumed with other changes keeps both.
        """
        tags = {
            "tvq.git.dirty": str(provenance.dirty).lower(),
            "tvq.python": provenance.python,
            **{f"tvq.version.{name}": value for name, value in provenance.versions.items()},
            **{f"tvq.hardware.{name}": value for name, value in provenance.hardware.items()},
        }
        if provenance.commit:
            tags["mlflow.source.git.commit"] = provenance.commit
        said = "none"
        if diff.left_out:
            said = f"left out: {diff.left_out}"
        elif diff.patch:
            said = f"code/{hashlib.sha256(diff.patch).hexdigest()[:12]}.patch"
            patch = diff.patch
            self._queue(said, lambda: self._run.log_artifact(said, patch))
        tags["tvq.git.diff"] = said
        self._queue("what it runs on", lambda: self._run.set_tags(tags))

    def log_corpus(
        self,
        name: str,
        digest: str,
        source: str,
        profile: Mapping[str, Scalar],
        schema: Mapping[str, str],
        context: str = "training",
    ) -> None:
        """Stores a corpus split as dataset input of the run; the same one again changes nothing.

        Args:
            name: as shown in MLflow.
            digest: fingerprint; MLflow takes 36 characters, the whole one goes into the profile.
            source: path or URL.
            profile: counts (documents, tokens, bytes).
            schema: MLflow type by column, as `{"tokens": "integer"}`.
            context: what the run used it for.
        """
        columns = [{"name": key, "type": kind, "required": True} for key, kind in schema.items()]
        fields = {
            "name": name,
            "digest": digest[:DIGEST_CHARACTERS],
            "source_type": "url" if "://" in source else "local",
            "source": json.dumps({"uri": without_credentials(source)}),
            "schema": json.dumps({"mlflow_colspec": columns}),
            "profile": json.dumps({"fingerprint": digest, **profile}),
        }
        self._queue(f"corpus {name}", lambda: self._run.log_dataset(fields, context))

    def log_text(self, name: str, text: str) -> None:
        """Stores a text as artifact `name`, over an earlier one."""
        self._queue(name, lambda: self._run.log_artifact(name, text.encode()))

    def log_missing(
        self, folder: str, names: Collection[str], read: Callable[[str], bytes]
    ) -> None:
        """Stores those files as artifacts in `folder` that are not there yet.

        `read` gives a file by its name, and is asked for no other, when it is sent; one that is
        gone by then (`FileNotFoundError`) is left out.
        """

        def send() -> None:
            for name in self._run.missing_artifacts(folder, names):
                try:
                    content = read(name)
                except FileNotFoundError:
                    continue  # tried again, it would hold up all that is queued behind it
                self._run.log_artifact(f"{folder}/{name}", content)

        if names:
            self._queue(folder, send)

    def log_curves(self, name: str, metrics: Sequence[str], draw: Drawing) -> None:
        """Stores `draw` of the run's metrics as artifact `name`, once all points are stored.

        The curves are read back from MLflow, so those of earlier starts are in them. A drawing that
        fails is said and left out.
        """

        def send() -> None:
            curves = {metric: self._run.history(metric) for metric in metrics}
            try:
                picture = draw(curves)
            except Exception as error:
                raise Refusal(reason(error)) from error
            self._run.log_artifact(name, picture)

        self._queue(name, send)

    def log_checkpoint(self, update: int, uri: str, metrics: Mapping[str, float]) -> None:
        """Stores a checkpoint as LoggedModel, by reference: its URI, its update, its metrics.

        Metrics that the run already holds at that update are linked, not repeated. The same update
        again adds what is missing and nothing twice.
        """
        time_ms = time.time_ns() // 1_000_000
        held = [Measurement(name, float(value), time_ms, update) for name, value in metrics.items()]
        self._queue(f"checkpoint {update}", lambda: self._run.log_checkpoint(update, uri, held))

    def log_present(self, updates: Collection[int]) -> None:
        """Marks the LoggedModels of all other checkpoints as deleted; their metrics stay."""
        present = frozenset(updates)
        self._queue("which checkpoints were deleted", lambda: self._run.mark_deleted(present))

    def finish(self, status: str, limit_s: float = 60.0) -> bool:
        """Sends what is left, then ends the run as FINISHED, FAILED or KILLED.

        Returns whether all was sent within `limit_s`; if not, says so, and the metrics wait in the
        spool for the next start of the run.
        """
        return self._delivery.finish(status, limit_s)

    def _queue(self, what: str, send: Callable[[], None]) -> None:
        def send_plainly() -> None:
            with self._run.answers():
                send()

        self._delivery.queue(what, send_plainly)


def flatten(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": 1e-4}}` as `{"a.b": "0.0001"}`; null, true and false as YAML writes them."""
    flat: dict[str, str] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        elif value is None or isinstance(value, bool):
            flat[prefix + name] = "null" if value is None else str(value).lower()
        else:
            flat[prefix + name] = str(value)
    return flat
