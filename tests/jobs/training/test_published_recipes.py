"""The published models' recipes, as far as they go without their hardware."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jobs import recipe as recipes
from jobs.recipe import Recipe
from model.training import initial_state, train_step
from tests.model import toy
from tests.model.golden import Rows

pytestmark = pytest.mark.compiles

PUBLISHED = {
    # Tokens of a global batch, and the optimizer (MODEL.md section 2.1).
    "enwik8": (32 * 8192, "adamw"),
    "pg19": (32 * 8192, "adafactor"),
    "imagenet64": (16 * 12_288, "adafactor"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_program_of_48_layers_is_as_long_as_that_of_4(name: str):
    recipe = recipes.resolve(recipes.load(name))
    assert recipe.model.n_layers == 48
    shallow = replace(recipe, model=replace(recipe.model, n_layers=4))
    assert n_equations(recipe) == n_equations(shallow)
    tokens = recipe.training.batch_size * recipe.data.sequence_length
    assert (tokens, recipe.optimizer.name) == PUBLISHED[name]


def n_equations(recipe: Recipe) -> int:
    """Of a train step, traced with abstract values."""
    model, optimizer, T = recipe.model, recipe.optimizer, recipe.data.sequence_length
    state = jax.eval_shape(functools.partial(initial_state, model, optimizer), 0)
    row = jax.ShapeDtypeStruct((1, T), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, T), jnp.bool_)
    batch = Rows(row, row, row, mask, jax.ShapeDtypeStruct((1,), jnp.uint32))
    step = functools.partial(train_step, model, optimizer, recipe.training.update_length)
    return len(list(toy.equations(jax.make_jaxpr(step)(state, batch).jaxpr)))
