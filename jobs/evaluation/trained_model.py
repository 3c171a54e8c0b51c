"""A run's newest intact checkpoint, loaded into this process to score or write text."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import click

from jobs import recipe as recipes
from jobs.checkpoints.manifest import (
    CheckpointManifest,
    DamagedCheckpointError,
    complete_checkpoints,
)
from jobs.errors import UserError
from jobs.recipe import Recipe
from jobs.runs.run_directory import RunDirectory
from pipeline.mixture import Mixture


class TrainedModel(NamedTuple):
    """Parameters and what is needed to use them."""

    recipe: Recipe
    update: int
    """Optimizer updates they have seen."""
    fingerprints: dict[str, str]
    """Of the splits of the corpus or mixture that the run was begun on."""
    params: Any
    codebooks: Any

    def mixture(self) -> Mixture:
        """The corpora that the run is trained on, where its newest checkpoint says they lie."""
        return Mixture.load(self.recipe.data.corpora)


def recipe_of(run: RunDirectory) -> Recipe:
    """What the run was last trained by: a resumed run may have its corpus elsewhere by now."""
    checkpoints = complete_checkpoints(run)
    text = checkpoints[-1].recipe if checkpoints else run.recipe_text()
    return recipes.from_yaml(text, f"the recipe of run {run.name}")


def refuse_other_text(run: RunDirectory, mixture: Mixture, split: str, recorded: str) -> None:
    """Raises UserError if a split is not that of this fingerprint, on which the run was begun."""
    if difference := mixture.difference(split, recorded):
        raise UserError(
            f"{', '.join(mixture.weights)}: run {run.name} was begun {difference}; prepare that"
            " corpus again"
        )


@contextlib.contextmanager
def damage_on_stderr() -> Iterator[None]:
    """What the body finds damaged, and passes over, is named on stderr."""
    shown = logging.Handler(logging.WARNING)
    shown.emit = lambda record: click.echo(f"warning: {record.getMessage()}", err=True)
    logger = logging.getLogger("tvq")
    logger.addHandler(shown)
    try:
        yield
    finally:
        logger.removeHandler(shown)


def load_trained_model(run: RunDirectory) -> TrainedModel:
    """Restores, verified, onto the first device of this process.

    A damaged checkpoint is named on stderr, and the one before is taken.

    Raises:
        UserError: the run has no checkpoint yet, or none that is intact.
    """
    with damage_on_stderr():
        return _load(run)


def _load(run: RunDirectory) -> TrainedModel:
    import jax

    from jobs.checkpoints.restore import restore_newest
    from model.sharding import abstract_state, make_mesh
    from model.training import initial_state

    recipe = recipe_of(run)
    abstract = abstract_state(
        make_mesh(jax.devices()[:1]),
        recipe.model,
        lambda: initial_state(recipe.model, recipe.optimizer, 0),
    )
    restored = restore_newest(run, abstract)
    if restored is None:
        raise UserError(
            f"run {run.name}: has no checkpoint yet; the first is saved after"
            f" checkpoint.every={recipe.checkpoint.every} updates"
        )
    state, manifest = restored
    return TrainedModel(
        recipe, manifest.update, manifest.fingerprints, state.params, state.codebooks
    )


def load_checkpoint(run: RunDirectory, checkpoint: CheckpointManifest) -> TrainedModel:
    """Restores one checkpoint, verified, onto the first device of this process.

    Raises:
        UserError: it is damaged.
    """
    from jobs.checkpoints.restore import restore_by_recipe

    try:
        state = restore_by_recipe(run, checkpoint)
    except DamagedCheckpointError as damage:
        others = [str(each.update) for each in complete_checkpoints(run)]
        raise UserError(
            f"{damage}; take another checkpoint with --update: there are {', '.join(others)}"
        ) from None
    recipe = recipes.from_yaml(checkpoint.recipe, f"the recipe of run {run.name}")
    return TrainedModel(
        recipe, checkpoint.update, checkpoint.fingerprints, state.params, state.codebooks
    )
