"""`training.init_from`: a new run that begins with another's parameters and codebooks.

Codebooks are taken where both models attend as many codewords. Else they begin anew, so that a
model of unquantised keys can become one of quantised keys (with `model.kmeans_iterations`, from
what its keys are), or one of more codes.

The driver settles which they are before the run is claimed and notes it in `run.json` (`Origin`);
the workers read them, compare every array's sum with that note, and begin with new optimizer
state, at update 0. Once the run has a checkpoint of its own, the source is not needed any more.
"""

import dataclasses
import re
from typing import Any, NamedTuple

from jobs import recipe as recipes
from jobs.checkpoints.exported_file import is_exported_file, named_leaves, read_exported
from jobs.checkpoints.manifest import CheckpointManifest, DamagedCheckpointError, manifest_of
from jobs.errors import UserError
from jobs.recipe import Recipe
from jobs.runs.run_directory import Origin, RunDirectory
from model.config import ModelConfig
from pipeline.storage import Location, is_url, open_store

_CODEBOOKS = ".codebooks"


def settle(recipe: Recipe, stored: Recipe | None, root: Location) -> Recipe:
    """The recipe with `training.init_from` as it is stored: PLACE@UPDATE, or a file, absolute.

    Args:
        recipe: as asked for.
        stored: that of the run which is resumed; what names its source leaves it as it is.
        root: where a run that is given by its name lies.
    """
    if recipe.training.init_from is None:
        return recipe
    place, update = _parsed(recipe.training.init_from, root)
    kept = stored.training.init_from if stored else None
    if kept and place == _parsed(kept, root)[0] and update in (None, _parsed(kept, root)[1]):
        return _with_source(recipe, kept)
    return _with_source(recipe, place if update is None else f"{place}@{update}")


def look_up(recipe: Recipe, root: Location) -> tuple[Recipe, Origin | None]:
    """The recipe with the update that its source has now, and what that source holds.

    Raises:
        UserError: there is no such source, or its model has other arrays.
    """
    if recipe.training.init_from is None:
        return recipe, None
    place, update = _parsed(recipe.training.init_from, root)
    if is_exported_file(place):
        _, exported = read_exported(place)
        theirs, sums = exported.recipe, exported.sums
        origin = Origin(place, exported.run_key, exported.update, sums)
        settled = recipe
    else:
        run, manifest = _source(place, update)
        record = run.record()
        assert record is not None, "_source found it"
        theirs = recipes.from_yaml(manifest.recipe, f"the recipe of {place}")
        origin = Origin(place, record.run_key, manifest.update, network_sums(manifest.sums))
        settled = _with_source(recipe, f"{place}@{manifest.update}")
    if not _codebooks_fit(theirs.model, recipe.model):
        origin = dataclasses.replace(origin, sums=_without_codebooks(origin.sums))
    pairs = zip(shaping(theirs.model).items(), shaping(recipe.model).values(), strict=True)
    differences = [
        f"model.{name}: {there} there, {here} here"
        for (name, there), here in pairs
        if there != here
    ]
    if differences:
        raise UserError(
            f"training.init_from: {place} has arrays of other shapes: {'; '.join(differences)};"
            " set these fields to its values, or begin with the parameters of another run"
        )
    return settled, origin


def _codebooks_fit(theirs: ModelConfig, ours: ModelConfig) -> bool:
    return theirs.quantized_keys and ours.quantized_keys and theirs.n_codes == ours.n_codes


def _without_codebooks(sums: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in sums.items() if not name.startswith(_CODEBOOKS)}


def shaping(model: ModelConfig) -> dict[str, Any]:
    """What decides which parameters there are and their shapes, by field."""
    fields = (
        "vocab_size", "n_layers", "d_model", "d_feed_forward", "n_heads", "d_key", "d_value",
        "absolute_positions", "tied_embeddings", "output_norm",
    )  # fmt: skip
    return {
        **{name: getattr(model, name) for name in fields},
        "n_kv_heads": model.kv_heads,
        "dtype": "float64" if model.dtype == "float64" else "float32 or bfloat16",
    }


def first_state(run: RunDirectory, recipe: Recipe, abstract: Any) -> tuple[Any, bool]:
    """The state at update 0 of a run that has an origin, and whether its codebooks are taken from
    there; called by every host.

    Args:
        run: the run that begins.
        recipe: its recipe.
        abstract: its state's shapes, dtypes and shardings.

    Raises:
        UserError: the source is not there, damaged, or holds others than when the run was begun.
    """
    import jax

    from jobs.checkpoints.restore import failing_together, jitted_leaf_sums
    from model.optimizer import make_optimizer
    from model.training import initial_state

    with failing_together(str(recipe.training.init_from)):
        record = run.record()
        if record is None or record.origin is None:
            raise UserError(f"run {run.name}: run.json does not say what training.init_from is")
        origin = record.origin
    taken = any(name.startswith(_CODEBOOKS) for name in origin.sums)
    wanted = Network(abstract.params, abstract.codebooks if taken else None)
    network = _network(origin, wanted)
    sums = jax.device_get(jitted_leaf_sums(network))
    for name in sorted(sums.keys() | origin.sums.keys()):
        if name not in sums or int(sums[name]) != origin.sums.get(name):
            raise UserError(
                f"training.init_from: {origin.place} has changed since run {run.name} was begun:"
                f" {name} does not have the sum in run.json; begin another run"
            )

    def begin(network: Network) -> Any:  # the initial values that are replaced are never made
        state = initial_state(recipe.model, recipe.optimizer, recipe.training.seed)
        optimizer = make_optimizer(recipe.optimizer).init(network.params)
        codebooks = network.codebooks if taken else state.codebooks
        return state._replace(params=network.params, codebooks=codebooks, optimizer=optimizer)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(begin, out_shardings=shardings)(network), taken


class Network(NamedTuple):
    """What is taken of a state, under the names that it has there."""

    params: Any
    codebooks: Any
    """None: they are not taken."""


def _network(origin: Origin, wanted: Network) -> Network:
    """What is wanted, by its shapes and shardings, of the origin."""
    import jax

    from jobs.checkpoints.restore import failing_together, restore_by_recipe

    if is_exported_file(origin.place):
        with failing_together(origin.place):
            arrays, _ = read_exported(origin.place)
            by_name = named_leaves(wanted)
            found = {name: (a.shape, a.dtype) for name, a in arrays.items() if name in by_name}
            if found != {name: (leaf.shape, leaf.dtype) for name, leaf in by_name.items()}:
                raise UserError(f"training.init_from: {origin.place} holds other arrays by now")
        placed = [
            jax.make_array_from_callback(leaf.shape, leaf.sharding, arrays[name].__getitem__)
            for name, leaf in by_name.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(wanted), placed)
    with failing_together(origin.place):
        source, manifest = _source(origin.place, origin.update)
    try:
        state = restore_by_recipe(source, manifest, jax.tree.leaves(wanted)[0].sharding.mesh)
    except DamagedCheckpointError as damage:
        raise UserError(f"training.init_from: {damage}; begin another run from another") from None
    return Network(state.params, None if wanted.codebooks is None else state.codebooks)


def _source(place: str, update: int | None) -> tuple[RunDirectory, CheckpointManifest]:
    run = RunDirectory(place)
    if run.record() is None:
        raise UserError(
            f"training.init_from: there is no run {place}; give the name, the path or the URL of a"
            " run, with @UPDATE if not its newest checkpoint, or a file that"
            " `tvq checkpoints export` wrote"
        )
    try:
        return run, manifest_of(run, update)
    except UserError as error:
        raise UserError(f"training.init_from: {error}") from None


def network_sums(sums: dict[str, int]) -> dict[str, int]:
    """Of the sums of a state's leaves, those of parameters and codebooks."""
    return {
        name: value for name, value in sums.items() if name.startswith((".params", ".codebooks"))
    }


def _parsed(text: str, root: Location) -> tuple[str, int | None]:
    """The absolute place of a run or a file, and the update asked for.

    A name without a slash is a run's under `root`, whatever lies in the working folder: a source
    must be told from another also when it is gone.
    """
    match = re.fullmatch(r"(.+)@(\d+)", text)
    place, update = (match[1], int(match[2])) if match else (text, None)
    if is_url(place) or "/" in place or is_exported_file(place):
        return open_store(place).location, update
    return RunDirectory.at(root, place).location, update


def _with_source(recipe: Recipe, text: str) -> Recipe:
    training = dataclasses.replace(recipe.training, init_from=text)
    return dataclasses.replace(recipe, training=training)
