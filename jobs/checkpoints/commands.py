"""`tvq checkpoints`: what a run has saved, whether it is whole, and what is kept of it."""

import time

from jobs.checkpoints.manifest import (
    CheckpointManifest,
    checkpoint_store,
    complete_checkpoints,
    manifest_of,
    pin,
    pinned_updates,
    readable_checkpoints,
    remove,
    unfinished_updates,
)
from jobs.checkpoints.retention import retire
from jobs.console import Console
from jobs.errors import UserError
from jobs.evaluation.trained_model import recipe_of
from jobs.runs.lease import Lease
from jobs.runs.run_directory import RunDirectory
from pipeline.storage import Location


def list_command(root: Location, name: str, *, console: Console, as_json: bool) -> None:
    """Lists the checkpoints of run `name`, those that are not whole included."""
    run = RunDirectory.existing(root, name)
    pinned = pinned_updates(run)
    manifests, damages = readable_checkpoints(run)
    rows = [_described(manifest, manifest.update in pinned) for manifest in manifests]
    unfinished = unfinished_updates(run)
    if as_json:
        damaged = [str(damage) for damage in damages]
        console.json({"checkpoints": rows, "damaged": damaged, "unfinished": unfinished})
        return
    console.table(
        ["update", "size", "age", "metrics", "pinned"],
        [
            [
                f"{row['update']:,}",
                f"{row['bytes'] / 1e6:,.1f} MB",
                _age(row["created"]),
                " ".join(f"{key}={value:.4g}" for key, value in row["metrics"].items()),
                "yes" if row["pinned"] else "",
            ]
            for row in rows
        ],
    )
    for damage in damages:
        console.warning(f"damaged: {damage}")
    for update in unfinished:
        console.warning(
            f"update {update:,}: has no sound manifest: being saved, left by a kill, or damaged"
        )


def verify_command(
    root: Location, name: str, update: int | None, *, console: Console, as_json: bool
) -> None:
    """Restores checkpoints and compares each leaf's sum with the manifest's.

    Args:
        update: of the one to verify; None: all.

    Raises:
        UserError: there is none, or one is damaged, after all were looked at.
    """
    from jobs.checkpoints.manifest import DamagedCheckpointError
    from jobs.checkpoints.restore import restore_by_recipe

    run = RunDirectory.existing(root, name)
    manifests, damages = readable_checkpoints(run)
    if update is not None:
        manifests, damages = [manifest_of(run, update)], []
    problems = [str(damage) for damage in damages]
    spoiled, refused = [], []
    if not manifests and not problems:
        raise UserError(f"run {run.name}: has no checkpoint to verify")
    whole = []
    for manifest in manifests:
        try:
            restore_by_recipe(run, manifest)
        except DamagedCheckpointError as damage:
            problems.append(str(damage))
            spoiled.append(checkpoint_store(run, manifest.update).location)
        except UserError as error:
            refused.append(str(error))
        else:
            whole.append(manifest.update)
            console.line(f"update {manifest.update:,}: whole, {len(manifest.leaves)} leaves")
    if as_json:
        console.json({"whole": whole, "damaged": problems, "refused": refused})
    if refused and not problems:
        raise UserError("; ".join(refused))
    if problems:
        raise UserError(
            "".join(f"{text}; " for text in refused)
            + f"run {run.name}: {len(problems)} damaged: {'; '.join(problems)}; training skips what"
            " is damaged; remove "
            + " and ".join(
                [f"the folder {folder}" for folder in spoiled]
                + ["what has no sound manifest with `tvq checkpoints prune`"] * bool(damages)
            )
        )


def prune_command(root: Location, name: str, *, console: Console, as_json: bool) -> None:
    """Removes what the run's recipe does not keep, and what a killed save left.

    Raises:
        UserError: the run is being trained.
    """
    run = RunDirectory.existing(root, name)
    with Lease(run).held():  # else what is being saved would look like what a kill left
        policy = recipe_of(run).checkpoint
        pinned = pinned_updates(run)
        unfinished = [update for update in unfinished_updates(run) if update not in pinned]
        for update in unfinished:
            remove(run, update)
        retired = retire(run, policy)
        _mark_deleted(run, console)
    if as_json:
        console.json({"retired": retired, "unfinished": unfinished})
        return
    for what, updates in (("not kept", retired), ("without a sound manifest", unfinished)):
        if updates:
            console.line(f"removed, {what}: {', '.join(f'{update:,}' for update in updates)}")
    if not retired and not unfinished:
        console.line("nothing to remove")


def pin_command(root: Location, name: str, update: int, wanted: bool, *, console: Console) -> None:
    """Protects a checkpoint from every retention, or takes that back."""
    run = RunDirectory.existing(root, name)
    pin(run, update, wanted)
    console.line(f"update {update:,} is {'' if wanted else 'no longer '}pinned")


def _mark_deleted(run: RunDirectory, console: Console) -> None:
    """In MLflow, what is not there any more; a store that does not answer undoes no removal."""
    from jobs.tracking.checkpoint_models import mark_deleted_in
    from jobs.training.train import store_of_run

    record = run.record()
    if record is None or record.mlflow_run_id is None:
        return
    present = {manifest.update for manifest in complete_checkpoints(run)}
    present.update(unfinished_updates(run))
    try:
        mark_deleted_in(store_of_run(run).uri, record.mlflow_run_id, present)
    except UserError as error:
        console.warning(f"not marked as deleted in MLflow: {error}")


def _described(manifest: CheckpointManifest, pinned: bool) -> dict:
    return {
        "update": manifest.update,
        "bytes": sum(manifest.files.values()),
        "created": manifest.created,
        "metrics": manifest.metrics,
        "pinned": pinned,
    }


def _age(created: float) -> str:
    if not created:
        return ""
    seconds = max(time.time() - created, 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
