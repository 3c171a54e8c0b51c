"""`tvq compare`: runs side by side, as a table, as JSON and as a picture."""

from pathlib import Path

from jobs.comparison import Candidate, as_json, compare, difference_table, plot, result_table
from jobs.console import Console
from jobs.errors import UserError
from jobs.run_directory import RunDirectory
from jobs.train import store_of_run
from pipeline.storage import Location


def compare_command(
    root: Location,
    names: tuple[str, ...],
    png: Path | None,
    *,
    console: Console,
    json: bool = False,
) -> None:
    """Compares runs by what MLflow holds of them; draws their curves into `png`."""
    comparison = compare([_candidate(root, name) for name in names])
    if json:
        console.json(as_json(comparison))
    else:
        if comparison.differences:
            console.table(*difference_table(comparison))
            console.line()
        console.table(*result_table(comparison))
    if png:
        plot(comparison, png)
        console.line(f"curves    {png.absolute()}")


def _candidate(root: Location, name: str) -> Candidate:
    run = RunDirectory.existing(root, name)
    record = run.record()
    if record is None or record.mlflow_run_id is None:
        raise UserError(
            f"run {run.name}: is not in MLflow yet; its `tvq train` puts it there, again if need be"
        )
    return Candidate(run.name, record.mlflow_run_id, store_of_run(run).uri)
