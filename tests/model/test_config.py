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
    validate,
    validate_update_length,
)
from model.counts import flops_per_token, parameter_count
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
    check_counts(PRESETS[name])


def check_counts(config: ModelConfig):
    validate(config)
    state = jax.eval_shape(lambda: initial_state(config, CONSTANT, 0))

    def size(tree):
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

    assert parameter_count(config) == (size(state.params), size(state.codebooks))


@pytest.mark.parametrize("name", ["tiny", "small"])
@pytest.mark.parametrize(
    "changes",
    [
        {"n_heads": 4, "n_kv_heads": 2},
        {"quantized_keys": False},
        {"d_feed_forward": 96, "n_heads": 4, "n_kv_heads": 1},
    ],
)
def test_counted_parameters_of_other_heads_are_those_made(name, changes):
    check_counts(replace(PRESETS[name], **changes))


def test_flops_are_linear_in_depth_and_more_with_the_cache():
    config = PRESETS["tiny"]
    one, two, three = (flops_per_token(replace(config, n_layers=n), 512) for n in (1, 2, 3))
    assert three - two == two - one
    assert flops_per_token(config, 512) == flops_per_token(config, 4096)
    without = replace(config, compressive_cache=False)
    merged, scored = config.d_value, config.d_key + config.d_value
    cache = config.n_layers * config.n_codes * (merged + scored)
    # Codewords have no gradient as factors of scores, one-hot codes none in merging.
    none = config.n_layers * config.n_codes * (merged + config.d_key)
    more = flops_per_token(config, 512) - flops_per_token(without, 512)
    assert more == 2 * (3 * cache - none)


def test_flops_of_unquantised_attention_are_those_of_the_causal_pairs():
    """D 8, K 4, V 16, one head, M 2, one layer, 10 tokens a vocabulary, by hand."""
    config = ModelConfig(
        vocab_size=10, n_layers=1, d_model=8, d_key=4, d_value=16, window=2, quantized_keys=False
    )
    projections = 8 * (4 + 4 + 16 + 16 + 16)
    positions = (2 + 1) * 4
    columns = sum(range(1, 8)) // 7  # a window of 7 tokens: 1 + 2 + ... + 7 pairs
    forward = projections + positions + columns * (4 + 16) + 8 * 10
    assert flops_per_token(config, 7) == 6 * forward


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("n_kv_heads", {"n_heads": 4, "n_kv_heads": 3}),
        ("d_feed_forward", {"d_feed_forward": 0}),
        ("attention_form", {"attention_form": "parallel", "quantized_keys": False}),
        ("attention_form", {"attention_form": "dense", "gradient_block": 64}),
        ("gradient_through_cache", {"gradient_through_cache": False}),
        ("block_length", {"gradient_block": 64, "block_length": 32}),
        ("kmeans_iterations", {"kmeans_iterations": -1}),
        ("revive_below", {"revive_below": -1.0}),
    ],
)
def test_fields_that_do_not_go_together_name_the_one_to_change(field, changes):
    config = ModelConfig()
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    with pytest.raises(ConfigError, match=rf"^model\.{field}: .*got"):
        validate(config)
