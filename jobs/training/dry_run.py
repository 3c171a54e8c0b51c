"""`tvq train --dry-run`: what a training would do, without beginning it."""

from typing import Any

from jobs import recipe as recipes
from jobs.checkpoints import init_from
from jobs.checkpoints.manifest import newest_update
from jobs.cluster.accelerators import devices_per_worker, mesh_axes
from jobs.console import Console
from jobs.planning.forecast import forecast
from jobs.planning.report import plan_json
from jobs.recipe import ClusterConfig, Recipe
from jobs.runs.lease import is_held
from jobs.runs.run_directory import RunDirectory
from jobs.training.settled import changed_fields, refuse_other_corpus, settled, with_corpora
from jobs.units import targets_of
from model.counts import flops_per_token, parameter_count
from pipeline.mixture import Mixture
from pipeline.storage import Location


def dry_run(
    recipe: Recipe,
    *,
    root: Location,
    name: str,
    console: Console,
    stated: frozenset[str] | None = None,
    as_json: bool = False,
) -> None:
    """Prints the resolved plan of the training that `train` would begin or go on with.

    Writes nothing, claims nothing, starts no worker; for a TPU it asks the compiler, if it is
    installed, which takes minutes once. Arguments and errors are those of `train`.
    """
    recipe, mixture = with_corpora(recipe)
    run = RunDirectory.at(root, name)
    recipe = settled(run, recipe, stated)
    if record := run.record():
        refuse_other_corpus(run, record, mixture)
    else:
        recipe, _ = init_from.look_up(recipe, run.root)
    plan = _plan(run, recipe, mixture)
    foreseen = forecast(recipe, console, compiles=True)
    if as_json:
        console.json(plan | {"plan": plan_json(foreseen.plan) if foreseen.plan else None})
    else:
        _show(console, plan)
        console.result(f"plan        {foreseen.text}")
        console.result("nothing was begun (--dry-run)")


def _plan(run: RunDirectory, recipe: Recipe, mixture: Mixture) -> dict[str, Any]:
    data, training, checkpoint = recipe.data, recipe.training, recipe.checkpoint
    count = parameter_count(recipe.model)
    axes = _mesh(recipe.cluster)
    along_rows = axes["data"] * axes["fsdp"]
    rows = -(-training.batch_size // (along_rows * training.accumulate)) * training.accumulate
    batches = training.steps // recipe.updates_per_batch
    epochs = mixture.epochs(
        batches * training.batch_size, sequence_length=data.sequence_length, window=data.window
    )
    done = newest_update(run)
    ends = [] if training.steps % checkpoint.every == 0 else [training.steps]
    return {
        "run": run.location,
        "state": _state(run, done, training.steps),
        "update": done,
        "identity": recipes.identity(recipe),
        "recipe": recipes.flatten(recipe),
        "changed": changed_fields(recipe),
        "parameters": count.trained,
        "codebook": count.codebook,
        "flops_per_token": flops_per_token(recipe.model, data.sequence_length),
        "mesh": axes,
        "workers": recipe.cluster.most_workers,
        "batch": {
            "rows": training.batch_size,
            "tokens": training.batch_size * data.sequence_length,
            "rows_a_device": rows,
            "rows_a_micro_batch": rows // training.accumulate,
            "accumulate": training.accumulate,
            "masked_rows": rows * along_rows - training.batch_size,
            "updates": recipe.updates_per_batch,
            "tokens_an_update": training.batch_size * training.update_length,
        },
        "steps": training.steps,
        "batches": batches,
        "tokens": batches * training.batch_size * data.sequence_length,
        "evaluations": len(range(training.evaluate_every, training.steps + 1,
                                 training.evaluate_every)),
        "checkpoints": len(range(checkpoint.every, training.steps + 1, checkpoint.every))
        + len(ends),
        "data": [
            {
                "corpus": str(corpus.path),
                "weight": corpus.weight,
                "targets": targets_of(split, data.window),
                "documents": split.documents,
                "fingerprint": split.fingerprint,
                "epochs": float(share),
            }
            for corpus, split, share in zip(
                mixture.corpora, mixture.splits("train"), epochs, strict=True
            )
        ],
    }  # fmt: skip


def _show(console: Console, plan: dict[str, Any]) -> None:
    recipe, batch, mesh = plan["recipe"], plan["batch"], plan["mesh"]
    changed = " ".join(f"{name}={value}" for name, value in plan["changed"].items())
    where = f"{plan['workers']} Ray workers" if plan["workers"] else "this process"
    console.result(f"run         {plan['run']}: {plan['state']}")
    console.result(f"recipe      {changed}")
    console.result(f"identity    {plan['identity']}")
    console.result(
        f"model       {plan['parameters']:,} parameters + {plan['codebook']:,} in codebooks,"
        f" {plan['flops_per_token'] / 1e6:,.1f} MFLOP a token"
    )
    console.result(
        f"mesh        data {mesh['data']} x fsdp {mesh['fsdp']} x tensor {mesh['tensor']}, on"
        f" {where}"
    )
    masked = f", {batch['masked_rows']} of all rows masked" if batch["masked_rows"] else ""
    parts = f" in {batch['accumulate']} micro-batches" if batch["accumulate"] > 1 else ""
    console.result(
        f"batch       {batch['rows']} rows x {recipe['data.sequence_length']:,} tokens ="
        f" {batch['tokens']:,}; {batch['rows_a_device']} rows a device{parts}{masked}"
    )
    console.result(
        f"training    {plan['steps']:,} updates of {batch['tokens_an_update']:,} tokens in"
        f" {plan['batches']:,} batches of {batch['updates']}: {plan['tokens']:,} tokens"
    )
    console.result(
        f"evaluation  every {recipe['training.evaluate_every']:,} updates,"
        f" {plan['evaluations']:,} times, over {recipe['training.evaluate_windows']:,} windows of"
        " each corpus at most"
    )
    console.result(
        f"checkpoints every {recipe['checkpoint.every']:,} updates, {plan['checkpoints']:,} times;"
        f" the newest {recipe['checkpoint.keep']} are kept"
    )
    for each in plan["data"]:
        console.result(
            f"data        {each['corpus']}: {each['targets']:,} targets of {each['documents']:,}"
            f" documents, {each['epochs']:.2f} epochs, fingerprint {each['fingerprint'][:16]}"
        )


def _state(run: RunDirectory, done: int, steps: int) -> str:
    if is_held(run):
        return "is being trained by another process"
    if done >= steps:
        return f"already finished at update {done:,}"
    if done:
        return f"would resume from the checkpoint at update {done:,}"
    return "would begin" if run.record() is None else "would begin anew: it has no checkpoint"


def _mesh(cluster: ClusterConfig) -> dict[str, int]:
    """Devices along each axis, with all the workers that there may be."""
    if cluster.most_workers:
        devices = cluster.most_workers * devices_per_worker(cluster)
    else:  # known to JAX alone, in the process that computes: this one
        import jax

        from model.sharding import make_mesh

        axes = {"data": cluster.data, "fsdp": cluster.fsdp, "tensor": cluster.tensor}
        devices = make_mesh(jax.devices(), **axes).size
    return mesh_axes(cluster, devices, "cluster: of these devices")
