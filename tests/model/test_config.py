"""Configurations that cannot work are refused by the name of the field."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from model.config import (
    PRESETS,
    ConfigError,
    ModelConfig,
    OptimizerConfig,
    flops_per_token,
    parameter_count,
    validate,
    validate_update_length,
)
from model.training import initial_state

CONSTANT = OptimizerConfig(schedule="constant")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_length", 0),
        ("window", 0),
        ("n_heads", 0),
        ("d_model", 33),
        ("vocab_size", 3),
        ("codebook_decay", 1.0),
        ("position_base", 0.0),
        ("output_scale", float("nan")),
        ("commitment_weight", -1.0),
        ("residual_dropout", 1.0),
        ("dtype", "float16"),
        ("unrolled_layers", 0),
    ],
)
def test_a_model_that_cannot_work_names_its_field(field, value):
    config = ModelConfig()
    object.__setattr__(config, field, value)  # past the type check of the tests
    with pytest.raises(ConfigError, match=rf"^model\.{field}: must be .*got {value}$"):
        validate(config)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("learning_rate", {"learning_rate": 0.0}),
        ("schedule_steps", {"schedule": "cosine"}),
        ("schedule_steps", {"schedule": "linear", "schedule_steps": 10, "warmup_steps": 10}),
        ("warmup_steps", {"warmup_steps": -1}),
        ("gradient_clip", {"gradient_clip": 0.0}),
        ("weight_decay", {"weight_decay": -0.1}),
        ("b2", {"b2": 1.0}),
        ("eps", {"eps": 0.0}),
    ],
)
def test_an_optimizer_that_cannot_work_names_its_field(field, changes):
    with pytest.raises(ConfigError, match=rf"^optimizer\.{field}: "):
        validate(ModelConfig(), replace(CONSTANT, **changes))


def test_updates_must_divide_the_window():
    validate_update_length(1024, 256)
    for update_length in (0, 300, 2048):
        with pytest.raises(ConfigError, match=r"^training\.update_length: .*got"):
            validate_update_length(1024, update_length)


@pytest.mark.parametrize(
    ("name", "trained"),
    [("enwik8", 184_509_446), ("pg19", 1_311_489_280), ("imagenet64", 1_246_451_972)],
)
def test_parameter_counts_of_the_paper(name, trained):
    assert parameter_count(PRESETS[name]) == (trained, 3_170_304)


@pytest.mark.parametrize("name", PRESETS)
def test_counted_parameters_are_those_made(name):
    config = PRESETS[name]
    validate(config)
    state = jax.eval_shape(lambda: initial_state(config, CONSTANT, 0))

    def size(tree):
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

    assert parameter_count(config) == (size(state.params), size(state.codebooks))


def test_flops_are_linear_in_depth_and_more_with_the_cache():
    config = PRESETS["tiny"]
    one, two, three = (flops_per_token(replace(config, n_layers=n)) for n in (1, 2, 3))
    assert three - two == two - one
    without = replace(config, compressive_cache=False)
    merged, scored = config.d_value, config.d_key + config.d_value
    cache = config.n_layers * config.n_codes * (merged + scored)
    assert flops_per_token(config) - flops_per_token(without) == 6 * cache
    assert flops_per_token(config) > 3 * flops_per_token(config, training=False)
