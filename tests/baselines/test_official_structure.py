"""The rebuilt official structure computes what our network does: an honest baseline."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from jobs.bench.measurement import compare
from jobs.bench.programs import Geometry
from jobs.console import Console
from model.objective import objective
from model.transformer import bind, initial_cache
from tests.baselines import official_structure
from tests.model import toy

pytestmark = pytest.mark.compiles

L = 8
MODEL = replace(toy.MODEL64, n_heads=2, block_length=None, gradient_block=L)


def close(actual, expected):
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-9)


@pytest.fixture
def float64():
    """Everything in double precision inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("window", [8, 11])
@pytest.mark.usefixtures("float64")
def test_features_and_cache_equal_our_networks(window):
    """Two calls, the second with the cache of the first; the window is as long as a block,
    or longer."""
    model, batch = replace(MODEL, window=window), toy.rows(length=4 * L)

    @jax.jit
    def ours(params, codebooks, tokens, cache, mask):
        return bind(model, params, codebooks)(tokens, cache, loss_mask=mask)

    official = jax.jit(functools.partial(official_structure.read, model, block_length=L))
    state, caches = toy.state(model), [initial_cache(model, 4)] * 2
    for part in (slice(0, 2 * L), slice(2 * L, None)):
        arrays = (batch.inputs[:, part], batch.loss_mask[:, part])
        results = [
            read(state.params, state.codebooks, arrays[0], cache, arrays[1])
            for read, cache in zip((ours, official), caches, strict=True)
        ]
        close(results[1], results[0])
        caches = [result.cache for result in results]
    assert np.any(np.asarray(caches[0].layers.counts) > 0)  # or the cache was never met


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
def test_loss_and_gradients_equal_ours():
    batch, state = toy.rows(), toy.state(MODEL)
    divisor = np.float64(batch.loss_mask.sum())
    ours = jax.value_and_grad(functools.partial(objective, config=MODEL), has_aux=True)
    (expected, _), gradients = jax.jit(ours)(
        state.params,
        state.codebooks,
        initial_cache(MODEL, 4),
        batch.inputs,
        batch.targets,
        batch.loss_mask,
        divisor,
    )
    theirs = functools.partial(official_structure.loss, config=MODEL, block_length=L)
    (value, _), found = jax.jit(jax.value_and_grad(theirs, has_aux=True))(
        state.params, state.codebooks, batch
    )
    close((value, found), (expected, gradients))


@pytest.mark.slow
def test_it_can_be_timed(capsys):
    geometry = Geometry(toy.MODEL, toy.OPTIMIZER, 1, None)
    program = official_structure.official_program(geometry, 16, L)
    comparison = compare([program], rounds=1, seconds=0, dtype="float32", console=Console())
    [measured] = comparison.measured
    assert measured.speed is not None
    assert measured.program.form == "official"
