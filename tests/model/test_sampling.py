"""Decoding token by token is the forward pass; what is drawn is what was asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import PAD_ID, UNK_ID, ConfigError
from model.sampling import filter_logits, sample
from model.transformer import bind, initial_cache
from tests.model import toy


@pytest.fixture(scope="module")
def state():
    return toy.state()


@pytest.fixture(scope="module")
def logits_of(state):
    network = bind(toy.MODEL, state.params, state.codebooks)

    @jax.jit
    def run(tokens, cache):
        features, cache, _ = network(tokens, cache)
        return network.logits(features), cache

    return run


@pytest.fixture(scope="module")
def draw(state):
    jitted = jax.jit(functools.partial(sample, toy.MODEL), static_argnums=3)
    return functools.partial(jitted, state.params, state.codebooks)


def test_token_by_token_is_the_forward_pass(logits_of):
    tokens = toy.rows().inputs
    expected, end = logits_of(tokens, initial_cache(toy.MODEL, 4))
    cache = initial_cache(toy.MODEL, 4)
    shapes = jax.tree.map(jnp.shape, cache)
    for position in range(tokens.shape[1]):
        logits, cache = logits_of(tokens[:, position : position + 1], cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, position], atol=2e-5)
        assert jax.tree.map(jnp.shape, cache) == shapes
    for left, right in zip(jax.tree.leaves(cache), jax.tree.leaves(end), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


def test_temperature_zero_takes_the_likeliest(draw, logits_of):
    prompt = toy.rows().inputs[:, :7]
    new = np.asarray(draw(prompt, 9, jax.random.key(0), 0.0))
    text = np.concatenate([prompt, new], axis=1)
    logits, _ = logits_of(text, initial_cache(toy.MODEL, 4))
    logits = np.array(logits[:, 6:-1])
    logits[..., [PAD_ID, UNK_ID]] = -np.inf
    np.testing.assert_array_equal(new, logits.argmax(-1))


def test_seeds_and_special_tokens(draw):
    prompt = np.ones((4, 1), np.int32)
    first = draw(prompt, 200, jax.random.key(0))
    np.testing.assert_array_equal(draw(prompt, 200, jax.random.key(0)), first)
    assert not np.array_equal(draw(prompt, 200, jax.random.key(1)), first)
    assert not np.array_equal(first[0], first[1])
    assert first.dtype == jnp.int32
    assert not np.isin(first, [PAD_ID, UNK_ID]).any()


def test_the_same_row_in_a_smaller_batch(draw):
    prompt = np.ones((4, 1), np.int32)
    np.testing.assert_array_equal(
        draw(prompt[:2], 30, jax.random.key(0)), draw(prompt, 30, jax.random.key(0))[:2]
    )


def test_top_p_keeps_the_smallest_set_with_that_mass():
    probabilities = np.array([[0.0, 0.1, 0.0, 0.4, 0.3, 0.2]])
    logits = jnp.log(jnp.asarray(probabilities))
    for top_p, kept in [(1.0, {1, 3, 4, 5}), (0.85, {3, 4, 5}), (0.65, {3, 4}), (0.0, {3})]:
        filtered = filter_logits(logits, 1.0, top_p)
        assert set(np.flatnonzero(np.isfinite(filtered[0]))) == kept
    halved = jax.nn.softmax(filter_logits(logits, 2.0, 1.0))[0]
    np.testing.assert_allclose(halved[3] / halved[5], 2**0.5, rtol=1e-5)


def test_a_prompt_is_needed(draw):
    with pytest.raises(ConfigError, match="needs a prompt"):
        draw(np.ones((1, 0), np.int32), 1, jax.random.key(0))
