"""What a reproduction of a run can and cannot repeat, and whether it came out the same."""

import json
from typing import Any, NamedTuple

from jobs import recipe as recipes
from jobs.checkpoints.manifest import complete_checkpoints
from jobs.errors import UserError
from jobs.lineage.provenance import noted_starts, provenance
from jobs.recipe import Recipe
from jobs.runs.run_directory import RunDirectory, RunRecord
from pipeline.mixture import Mixture

_PARENT = "parent.json"


class Match(NamedTuple):
    """How the arrays of two runs compare after the same update."""

    update: int
    equal: int
    """Arrays of the state whose bits have the same sum."""
    arrays: int


def open_points(run: RunDirectory, recipe: Recipe, original: Recipe) -> list[str]:
    """What is not as it was when `run` was trained, a sentence each; empty if nothing is known to
    differ."""
    points = []
    starts = noted_starts(run)
    now = provenance()
    if not starts:
        points.append("the run did not note its commit and versions: they may be others")
    else:
        points += starts[-1].differences(now)
    if len(starts) > 1:
        points.append(
            f"the run was trained on {len(starts)} different machines or versions, one after the"
            " other; this is only one"
        )
    operational = recipes.difference(recipe, original)
    if operational:
        points.append(f"fields are others (than the run's): {'; '.join(operational)}")
    return points


def check_corpora(run: RunDirectory, mixture: Mixture, record: RunRecord) -> None:
    """Raises UserError if train or validation is not the text that `run` was trained on."""
    for split in ("train", "validation"):
        if difference := mixture.difference(split, record.fingerprints[split]):
            raise UserError(
                f"run {run.name}: cannot be reproduced, it was begun {difference}; prepare that"
                " corpus again, or give where it lies as data.corpus=FOLDER"
            )


def note_parent(run: RunDirectory, parent: RunDirectory, record: RunRecord) -> None:
    """Notes in `run`, which is claimed, that it reproduces `parent`."""
    fields = {
        "name": parent.name,
        "location": parent.location,
        "run_key": record.run_key,
        "mlflow_run_id": record.mlflow_run_id,
    }
    run.store.write(_PARENT, (json.dumps(fields, indent=1) + "\n").encode())


def parent_of(run: RunDirectory) -> dict[str, Any] | None:
    """The run that `run` reproduces: name, location, run_key, mlflow_run_id; None if none."""
    try:
        return json.loads(run.store.read(_PARENT))
    except FileNotFoundError:
        return None


def matched(original: RunDirectory, again: RunDirectory) -> Match | None:
    """Compares the newest checkpoints that are of one update; None if there are none."""
    ours, theirs = (
        {manifest.update: manifest.sums for manifest in complete_checkpoints(run)}
        for run in (original, again)
    )
    common = ours.keys() & theirs.keys()
    if not common:
        return None
    update = max(common)
    equal = sum(theirs[update].get(name) == value for name, value in ours[update].items())
    return Match(update, equal, len(ours[update]))
