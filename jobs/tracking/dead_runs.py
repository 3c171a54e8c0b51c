"""Runs that MLflow holds for running though their driver was killed, and nobody went on."""

from collections.abc import Callable, Iterable

from jobs.errors import UserError
from jobs.runs.lease import died_at, is_held
from jobs.runs.run_directory import RunDirectory
from jobs.tracking.reading import reading
from jobs.training.train import store_of_run


def end_dead_runs(runs: Iterable[RunDirectory], say: Callable[[str], None]) -> None:
    """Ends them as KILLED, at the moment when their driver renewed its lease last.

    The same command that began such a run goes on with it as ever, and makes it RUNNING again.
    A store that does not answer is said, once, and looked at no further.
    """
    for run in runs:
        seconds = died_at(run)
        record = run.record()
        if seconds is None or record is None or record.mlflow_run_id is None:
            continue
        try:
            ended = _end(run, record.mlflow_run_id, round(seconds * 1000))
        except UserError as error:
            say(f"whether runs were killed is not known: {error}")
            return
        if ended:
            say(f"run {run.name} was killed; MLflow says so now")


def _end(run: RunDirectory, run_id: str, end_ms: int) -> bool:
    with reading(store_of_run(run).uri) as client:
        if client.get_run(run_id).info.status != "RUNNING":
            return False
        client.set_terminated(run_id, "KILLED", end_ms)
        if is_held(run):  # somebody went on with it in this moment
            client.update_run(run_id, "RUNNING")
            return False
    return True
