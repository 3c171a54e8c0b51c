"""The published models, as far as they go without their hardware."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from model.config import PRESETS, ModelConfig, OptimizerConfig
from model.training import initial_state, train_step
from tests.model.golden import Rows

OPTIMIZERS = {
    "enwik8": OptimizerConfig(schedule="constant", gradient_clip=0.1, weight_decay=2e-4),
    "pg19": OptimizerConfig(name="adafactor", learning_rate=0.01, schedule="constant"),
    "imagenet64": OptimizerConfig(name="adafactor", learning_rate=0.01, schedule="constant"),
}
LENGTHS = {"enwik8": (8192, 2048), "pg19": (8192, 2048), "imagenet64": (12_288, 1536)}


@pytest.mark.parametrize("name", LENGTHS)
def test_the_program_of_48_layers_is_as_long_as_that_of_4(name):
    config = PRESETS[name]
    assert config.n_layers == 48
    assert equations(name, config) == equations(name, replace(config, n_layers=4))


def equations(name: str, config: ModelConfig) -> int:
    optimizer, (length, update_length) = OPTIMIZERS[name], LENGTHS[name]
    state = jax.eval_shape(functools.partial(initial_state, config, optimizer), 0)
    row = jax.ShapeDtypeStruct((1, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, length), jnp.bool_)
    batch = Rows(row, row, row, mask, jax.ShapeDtypeStruct((1,), jnp.uint32))
    step = functools.partial(train_step, config, optimizer, update_length)
    return count(jax.make_jaxpr(step)(state, batch).jaxpr)


def count(jaxpr) -> int:
    inner = [jaxprs_in_params(equation.params) for equation in jaxpr.eqns]
    return len(jaxpr.eqns) + sum(count(each) for jaxprs in inner for each in jaxprs)
