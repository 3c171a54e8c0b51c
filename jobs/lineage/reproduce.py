"""`tvq reproduce`: the same training again, and what cannot be the same."""

from jobs import recipe as recipes
from jobs.console import Console
from jobs.errors import UserError
from jobs.evaluation.trained_model import recipe_of
from jobs.lineage.reproduction import check_corpora, matched, note_parent, open_points
from jobs.runs.run_directory import RunDirectory
from pipeline.storage import Location


def reproduce_command(
    root: Location,
    name: str,
    overrides: tuple[str, ...] = (),
    *,
    new_name: str | None = None,
    console: Console,
    as_json: bool = False,
) -> None:
    """Trains run `name` again from its recipe and corpus, as another run; resumes that one.

    Args:
        overrides: operational fields that must be others here: where the corpus lies, how many
            workers.
        new_name: None: the run's with `-again` behind it.

    Raises:
        UserError: no such run, the corpus is another one, or an override changes the mathematics.
    """
    from jobs.training.settled import with_corpora
    from jobs.training.train import train

    original = RunDirectory.existing(root, name)
    record = original.record()
    assert record is not None
    stored = recipe_of(original)
    recipe, mixture = with_corpora(recipes.with_overrides(stored, overrides))
    if changes := recipes.difference(recipe, stored, mathematical_only=True):
        raise UserError(
            f"run {original.name}: that would be another training, not the same again:"
            f" {'; '.join(changes)} in place of (the run's); leave it out, or use `tvq train`"
        )
    check_corpora(original, mixture, record)
    run = RunDirectory.at(root, new_name or f"{original.name}-again")
    if run.location == original.location:
        raise UserError(f"--run {run.name}: is the run itself; choose another name")
    points = open_points(original, recipe, stored)
    for point in points:
        console.warning(f"not the same: {point}")
    if not points:
        console.line("commit, versions, hardware, corpus and recipe are those of the run")
    claimed = run.claim(recipes.identity(recipe), record.fingerprints, recipes.to_yaml(recipe))
    if claimed.identity != record.identity:
        raise UserError(f"--run {run.name}: is another training; choose another name")
    note_parent(run, original, record)
    trained = train(recipe, root=root, name=run.name, console=console)
    match = matched(original, run)
    if as_json:
        console.json(
            {
                "run": run.name,
                "path": run.location,
                "reproduces": original.name,
                "update": trained.update,
                "not_the_same": points,
                "compared": match._asdict() if match else None,
            }
        )
    elif match is None:
        console.result("no checkpoint of one update is left of both: they cannot be compared")
    elif match.equal == match.arrays:
        console.result(
            f"the same to the last bit after update {match.update:,}: all {match.arrays} arrays of"
            " the state"
        )
    else:
        console.result(
            f"not the same bits after update {match.update:,}: {match.equal} of {match.arrays}"
            f" arrays of the state are equal; `tvq compare {original.name} {run.name}` shows by"
            " how much the results differ"
        )
