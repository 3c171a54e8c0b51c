"""What tests compare of two runs."""

import jax
import numpy as np

from jobs.checkpoints.manifest import complete_checkpoints
from jobs.checkpoints.restore import restore_by_recipe
from jobs.runs.run_directory import RunDirectory
from jobs.tracking import reading
from jobs.tracking.store import embedded_store

LOSS = "train/loss_nats_per_token"


def losses(run: RunDirectory) -> list[tuple[int, float]]:
    """The update and the loss of each point that MLflow holds."""
    return reading.history(embedded_store(run.root).uri, _mlflow_run_id(run), LOSS)


def summary(run: RunDirectory) -> reading.RunSummary:
    """What MLflow holds of the run."""
    return reading.run(embedded_store(run.root).uri, _mlflow_run_id(run))


def final_sums(run: RunDirectory, steps: int) -> dict[str, int]:
    """Sums over every bit of the whole train state at the end."""
    last = complete_checkpoints(run)[-1]
    assert last.update == steps
    return last.sums


def state_difference(one: RunDirectory, other: RunDirectory) -> float:
    """The largest between their newest checkpoints, over parameters, codebooks and all else."""
    states = [restore_by_recipe(run, complete_checkpoints(run)[-1]) for run in (one, other)]
    leaves = [jax.tree.leaves(jax.device_get(state)) for state in states]
    return max(
        float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)), initial=0))
        for a, b in zip(*leaves, strict=True)
    )


def _mlflow_run_id(run: RunDirectory) -> str:
    record = run.record()
    assert record is not None
    assert record.mlflow_run_id is not None
    return record.mlflow_run_id
