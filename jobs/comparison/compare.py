"""`tvq compare`: runs side by side, as tables, as JSON, as a picture and as a page."""

from pathlib import Path

from jobs.comparison.differences import (
    By,
    Candidate,
    as_json,
    compare,
    difference_table,
    result_table,
    verdict_lines,
)
from jobs.console import Console
from jobs.errors import UserError
from jobs.recipe import Recipe
from jobs.runs.run_directory import RunDirectory
from jobs.training.train import store_of, store_of_run
from pipeline.errors import CorpusError
from pipeline.storage import Location


def compare_command(
    root: Location,
    names: tuple[str, ...],
    png: Path | None = None,
    *,
    html: Path | None = None,
    query: str | None = None,
    experiment: str = "tvq",
    by: By = "step",
    console: Console,
    json: bool = False,
) -> None:
    """Compares runs by what MLflow holds of them.

    Args:
        root: where the runs lie.
        names: of runs.
        png: draws the curves into this file.
        html: writes the report into this file.
        query: an MLflow filter; the runs that it finds in `experiment` come after those named.
        experiment: of MLflow, for the query.
        by: what the curves are drawn over.
        console: to print on.
        json: print one JSON object and no tables.

    Raises:
        UserError: a run is not there or not in MLflow, nothing is found, or a file cannot be
            written.
    """
    candidates = [_candidate(root, name) for name in names]
    if query is not None:
        candidates += _found(root, experiment, query, {one.run_id for one in candidates})
    comparison = compare(candidates, by)
    if json:
        console.json(as_json(comparison))
    else:
        if comparison.differences:
            console.table(*difference_table(comparison))
            console.line()
        console.table(*result_table(comparison))
        if comparison.verdict or comparison.cautions:
            console.line()
        for line in verdict_lines(comparison):
            console.result(line)
    try:
        if png:
            from jobs.comparison.figure import plot

            plot(comparison, png)
            console.line(f"curves    {png.absolute()}")
        if html:
            from jobs.comparison.report import write_report

            write_report(comparison, html)
            console.line(f"report    {html.absolute()}")
    except CorpusError as error:
        raise UserError(f"{error}; name another file") from None


def _candidate(root: Location, name: str) -> Candidate:
    run = RunDirectory.existing(root, name)
    record = run.record()
    if record is None or record.mlflow_run_id is None:
        raise UserError(
            f"run {run.name}: is not in MLflow yet; its `tvq train` puts it there, again if need be"
        )
    return Candidate(run.name, record.mlflow_run_id, store_of_run(run).uri)


def _found(root: Location, experiment: str, query: str, named: set[str]) -> list[Candidate]:
    from jobs.tracking.reading import find_runs

    uri = store_of(Recipe(), root).uri
    found = [one for one in find_runs(uri, experiment, query) if one.run_id not in named]
    if not found and not named:
        raise UserError(f"--query {query!r}: finds no run in the experiment {experiment}")
    return [Candidate(one.name, one.run_id, uri) for one in found]
