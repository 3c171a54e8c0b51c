"""Adding to runs that have ended, for the commands."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from jobs.tracking.checkpoint_models import models_of_run
from jobs.tracking.reading import reading
from jobs.tracking.store import DIGEST_CHARACTERS


def add_to_run(
    uri: str,
    run_id: str,
    values: Mapping[str, float],
    step: int,
    measured_on: tuple[str, str] | None = None,
) -> None:
    """Adds metrics to a run that has ended, and to the LoggedModel of its checkpoint at `step`.

    What the run holds at that step already is not repeated, and linked as it is held.

    Args:
        measured_on: name and fingerprint of the corpus split.

    Raises:
        UserError: the store does not answer or has no such run.
    """
    time_ms = time.time_ns() // 1_000_000
    with reading(uri) as client:
        from mlflow.entities import Metric

        experiment_id = client.get_run(run_id).info.experiment_id
        model = models_of_run(client, experiment_id, run_id).get(step)
        model_id = model.model_id if model else None
        linked = {(one.key, one.step) for one in (model.metrics or [])} if model else set()
        name_of_split, fingerprint = measured_on or (None, None)
        digest = fingerprint and fingerprint[:DIGEST_CHARACTERS]
        new, of_model = [], (model_id, name_of_split, digest)
        for name, value in values.items():
            history = client.get_metric_history(run_id, name)
            held = next((one for one in history if one.step == step), None)
            if held is None:
                new.append(Metric(name, float(value), time_ms, step, *of_model))
            elif model and (name, step) not in linked:
                # With the timestamp held, MLflow adds the row to the model and none to the run.
                new.append(Metric(name, held.value, held.timestamp, step, *of_model))
        client.log_batch(run_id, metrics=new)


def add_artifact(uri: str, run_id: str, name: str, content: bytes) -> None:
    """Stores a file with a run, over an earlier one. Raises UserError as `add_to_run` does."""
    folder, _, file_name = name.rpartition("/")
    with reading(uri) as client, tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / file_name
        path.write_bytes(content)
        client.log_artifact(run_id, str(path), folder or None)
