"""A checkpoint's parameters and codebooks as one safetensors file, and back.

The file holds the arrays by name (`params.embedding.table`, `codebooks...`), and as metadata the
recipe, the update and the fingerprints of the corpus. Reading it runs no code of anybody's.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jobs import recipe as recipes
from jobs.checkpoint_manifest import CheckpointManifest, complete_checkpoints, manifest_of
from jobs.console import Console
from jobs.errors import UserError
from jobs.recipe import Recipe
from jobs.run_directory import RunDirectory
from pipeline.storage import LocalStore, Location

FORMAT_VERSION = 1


def export_command(
    root: Location, name: str, update: int | None, output: Path, *, console: Console
) -> None:
    """Writes the checkpoint of run `name` at `update` (None: the newest) to the file `output`.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or the file is there already.
    """
    if output.exists():
        raise UserError(f"--output {output}: is there already; choose another name")
    run = RunDirectory.existing(root, name)
    manifest = manifest_of(run, update)
    data = exported(run, manifest)
    LocalStore(output.absolute().parent).write(output.name, data)
    console.line(f"wrote update {manifest.update:,} of run {run.name} to {output}")


def exported(run: RunDirectory, manifest: CheckpointManifest) -> bytes:
    """The file of one checkpoint, whose arrays are verified.

    Raises:
        UserError: it is damaged.
    """
    import jax
    import numpy as np
    from safetensors.numpy import save

    from jobs.checkpoint_manifest import DamagedCheckpointError
    from jobs.checkpoints import restore_alone

    try:
        state = restore_alone(run, manifest)
    except DamagedCheckpointError as damage:
        raise UserError(f"{damage}; choose another --update") from None
    metadata = {
        "tvq_format": str(FORMAT_VERSION),
        "update": str(manifest.update),
        "recipe": manifest.recipe,
        "fingerprints": json.dumps(manifest.fingerprints),
    }
    network = (state.params, state.codebooks)
    arrays = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(jax.device_get(network))]
    return save(dict(zip(_names(network), arrays, strict=True)), metadata)


def import_command(file: Path, root: Location, name: str, *, console: Console) -> None:
    """Makes run `name` of a file that `export_command` wrote; it has ended at that update.

    Its optimizer state is a new one.

    Raises:
        UserError: not such a file, other arrays than its recipe describes, or a run of that name.
    """
    from jobs.import_official import save_as_run

    run = RunDirectory.at(root, name)
    if complete_checkpoints(run):
        raise UserError(f"run {run.name}: exists already; choose another name with --run")
    recipe, updates, fingerprints, network = read_export(file)
    training = dataclasses.replace(recipe.training, steps=updates)
    recipe = dataclasses.replace(recipe, training=training)
    save_as_run(
        run,
        recipe,
        network=network,
        updates=updates,
        fingerprints=fingerprints,
    )
    console.line(f"imported update {updates:,} as run {run.location}; its optimizer state is new")


def read_export(file: Path) -> tuple[Recipe, int, dict[str, str], tuple[Any, Any]]:
    """The recipe of a file, its update, the fingerprints of the corpus, (params, codebooks).

    Raises:
        UserError: not such a file, or other arrays than its recipe describes.
    """
    arrays, metadata = _read(file)
    recipe = recipes.from_yaml(metadata["recipe"], f"the recipe in {file}")
    network = _network(file, recipe, arrays)
    return recipe, int(metadata["update"]), json.loads(metadata["fingerprints"]), network


def _read(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as a safetensors file: {error}") from None
    if not {"tvq_format", "update", "recipe", "fingerprints"} <= metadata.keys():
        raise UserError(f"{file}: was not written by `tvq checkpoints export`")
    if metadata["tvq_format"] != str(FORMAT_VERSION):
        raise UserError(
            f"{file}: format {metadata['tvq_format']}, this tvq reads {FORMAT_VERSION}; upgrade tvq"
        )
    return arrays, metadata


def _network(file: Path, recipe: Recipe, arrays: dict[str, Any]) -> tuple[Any, Any]:
    """(params, codebooks) of the recipe's model, filled with the file's arrays."""
    import jax

    from model.training import initial_state

    state = jax.eval_shape(lambda: initial_state(recipe.model, recipe.optimizer, 0))
    leaves, structure = jax.tree.flatten((state.params, state.codebooks))
    names = _names((state.params, state.codebooks))
    expected = dict(zip(names, leaves, strict=True))
    for name in sorted(expected.keys() | arrays.keys()):
        wanted, found = (
            "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"
            for leaf in (expected.get(name), arrays.get(name))
        )
        if wanted != found:
            raise UserError(f"{file}: {name} is {found}, its recipe describes {wanted}")
    return jax.tree.unflatten(structure, [arrays[name] for name in names])


def _names(network: tuple[Any, Any]) -> list[str]:
    import jax

    return [
        f"{prefix}.{jax.tree_util.keystr(path, simple=True, separator='.')}"
        for prefix, tree in zip(("params", "codebooks"), network, strict=True)
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
