"""`tvq checkpoints export` and `import`: a checkpoint as one safetensors file, and back."""

import dataclasses
from pathlib import Path
from typing import Any

from jobs.checkpoints.exported_file import Exported, encode, named_leaves, read_exported
from jobs.checkpoints.init_from import Network, network_sums
from jobs.checkpoints.manifest import CheckpointManifest, complete_checkpoints, manifest_of
from jobs.console import Console
from jobs.errors import UserError
from jobs.recipe import Recipe, from_yaml
from jobs.runs.run_directory import RunDirectory
from pipeline.storage import LocalStore, Location


def export_command(
    root: Location, name: str, update: int | None, output: Path, *, console: Console
) -> None:
    """Writes the checkpoint of run `name` at `update` (None: the newest) to the file `output`.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or the file is there already.
    """
    if output.exists():
        raise UserError(f"--output {output}: is there already; choose another name")
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: must end in .safetensors, as what it is")
    run = RunDirectory.existing(root, name)
    manifest = manifest_of(run, update)
    LocalStore(output.absolute().parent).write(output.name, exported_file(run, manifest))
    console.line(f"wrote update {manifest.update:,} of run {run.name} to {output}")


def exported_file(run: RunDirectory, manifest: CheckpointManifest) -> bytes:
    """The file of one checkpoint, whose arrays are verified.

    Raises:
        UserError: it is damaged.
    """
    import jax
    import numpy as np

    from jobs.checkpoints.manifest import DamagedCheckpointError
    from jobs.checkpoints.restore import restore_by_recipe

    record = run.record()
    assert record is not None, "it has a checkpoint"
    try:
        state = restore_by_recipe(run, manifest)
    except DamagedCheckpointError as damage:
        raise UserError(f"{damage}; choose another --update") from None
    network = Network(state.params, state.codebooks)
    leaves = named_leaves(jax.device_get(network))
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}
    exported = Exported(
        recipe=from_yaml(manifest.recipe, f"the recipe of checkpoint {manifest.update}"),
        update=manifest.update,
        run_key=record.run_key,
        fingerprints=manifest.fingerprints,
        sums=network_sums(manifest.sums),
    )
    return encode(arrays, exported)


def import_command(file: Path, root: Location, name: str, *, console: Console) -> None:
    """Makes run `name` of a file that `export_command` wrote; it has ended at that update.

    Its optimizer state is a new one.

    Raises:
        UserError: not such a file, damaged, other arrays than its recipe describes, or a run of
            that name.
    """
    from jobs.checkpoints.import_official import save_as_run

    run = RunDirectory.at(root, name)
    if complete_checkpoints(run):
        raise UserError(f"run {run.name}: exists already; choose another name with --run")
    network, exported = read_network(file)
    training = dataclasses.replace(exported.recipe.training, steps=exported.update, init_from=None)
    recipe = dataclasses.replace(exported.recipe, training=training)
    save_as_run(
        run,
        recipe,
        network=tuple(network),
        updates=exported.update,
        fingerprints=exported.fingerprints,
    )
    console.line(
        f"imported update {exported.update:,} as run {run.location}; its optimizer state is new"
    )


def read_network(file: Location) -> tuple[Network, Exported]:
    """The parameters and codebooks of a file, their sums compared, and what it says of them.

    Raises:
        UserError: not such a file, damaged, or other arrays than its recipe describes.
    """
    arrays, exported = read_exported(file)
    return _network(file, exported.recipe, arrays, exported), exported


def _network(file: Location, recipe: Recipe, arrays: dict[str, Any], exported: Exported) -> Network:
    """The recipe's parameters and codebooks, filled with the file's arrays."""
    import jax

    from jobs.checkpoints.restore import jitted_leaf_sums
    from model.training import initial_state

    state = jax.eval_shape(lambda: initial_state(recipe.model, recipe.optimizer, 0))
    described = Network(state.params, state.codebooks)
    expected = named_leaves(described)
    for name in sorted(expected.keys() | arrays.keys()):
        wanted, found = (
            "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"
            for leaf in (expected.get(name), arrays.get(name))
        )
        if wanted != found:
            raise UserError(f"{file}: {name} is {found}, its recipe describes {wanted}")
    network = jax.tree.unflatten(jax.tree.structure(described), [arrays[name] for name in expected])
    for path, value in jax.device_get(jitted_leaf_sums(network)).items():
        if int(value) != exported.sums.get(path):
            raise UserError(f"{file}: is damaged: {path} does not have the sum in its metadata")
    return network
