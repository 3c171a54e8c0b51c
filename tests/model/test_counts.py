"""The formula of the operations against the matrix products of the traced program."""

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import pytest

from jobs import recipe as recipes
from jobs.bench.programs import FORMS, Geometry, begin_training
from model.config import ModelConfig, OptimizerConfig
from model.counts import flops_per_token, flops_per_update
from model.training import evaluation_step, train_step

BASE = ModelConfig(
    n_layers=3, d_model=32, d_key=8, d_value=24, n_codes=16, window=16, block_length=16,
    vocab_size=40,
)  # fmt: skip
QUANTIZED = [form for form, fields in FORMS.items() if fields["quantized_keys"]]


def products(jaxpr: Any, rounds: int = 1) -> Iterator[int]:
    """FLOPs of each matrix product of a traced program, as often as its scans make it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            out = math.prod(equation.outvars[0].aval.shape)
            yield 2 * rounds * out * math.prod(left[axis] for axis in contracted)
        assert equation.primitive.name != "while", "a loop whose rounds are not known"
        inner = rounds * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    yield from products(part, inner)


@pytest.mark.parametrize("form", QUANTIZED)
@pytest.mark.parametrize(
    ("update_length", "accumulate", "changes"),
    [
        (64, 1, {}),
        (32, 2, {}),
        (64, 1, {"n_heads": 4, "n_kv_heads": 2, "tied_embeddings": True}),
        (64, 1, {"d_feed_forward": 48, "n_heads": 2, "n_kv_heads": 1}),
        (64, 1, {"compressive_cache": False}),
    ],
)
def test_the_formula_is_what_the_traced_program_multiplies(
    form, update_length, accumulate, changes
):
    model = replace(BASE, **{**FORMS[form], **changes})
    if form == "dense" and update_length != 64:
        pytest.skip("the dense form's columns follow the tokens of a call")
    optimizer, rows, length = OptimizerConfig(schedule="constant"), 4, 64
    geometry = Geometry(model, optimizer, rows, update_length)
    state, batch = jax.eval_shape(lambda: begin_training(geometry, length))
    step = functools.partial(train_step, model, optimizer, update_length, accumulate=accumulate)
    trained = sum(products(jax.make_jaxpr(step)(state, batch).jaxpr))
    passes = length // update_length * accumulate
    expected = rows * length * flops_per_token(model, length) + passes * flops_per_update(model)
    assert trained == expected

    traced = jax.make_jaxpr(functools.partial(evaluation_step, model))(
        state.params, state.codebooks, batch
    )
    per_token = flops_per_token(model, length, training=False)
    expected = rows * length * per_token + flops_per_update(model, training=False)
    # One piece of the logits may be longer than what is left of the tokens; here there is one.
    assert sum(products(traced.jaxpr)) == expected


@pytest.mark.parametrize("name", ["enwik8", "pg19", "imagenet64"])
def test_the_formula_is_that_of_the_published_recipes(name):
    """As `tvq plan` counts them: their model, length and updates; two rows are enough."""
    recipe = recipes.resolve(recipes.load(name))
    # What is computed anew in the backward pass is no part of the formula.
    model, rows = replace(recipe.model, remat=False), 2
    length, update_length = recipe.data.sequence_length, recipe.training.update_length
    geometry = Geometry(model, recipe.optimizer, rows, update_length)
    state, batch = jax.eval_shape(lambda: begin_training(geometry, length))
    step = functools.partial(train_step, model, recipe.optimizer, update_length)
    trained = sum(products(jax.make_jaxpr(step)(state, batch).jaxpr))
    expected = rows * length * flops_per_token(model, length)
    expected += length // update_length * flops_per_update(model)
    assert trained == expected
