"""The serial form against the dense definition, in double precision."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.attention import (
    LayerCache,
    Projections,
    Scoring,
    attend_blocks,
    attend_dense,
    block_starts,
    empty_cache,
)

pytestmark = pytest.mark.usefixtures("float64")

B, H, S, K, V = 2, 2, 5, 4, 3


class Case(NamedTuple):
    """Shapes and switches of a comparison."""

    pieces: tuple[int, ...]  # tokens of each call, the cache carried between them
    block_length: int
    window: int
    compressive_cache: bool = True
    gradient_through_cache: bool = True


cases = st.builds(
    Case,
    pieces=st.lists(st.integers(1, 13), min_size=1, max_size=3).map(tuple),
    block_length=st.integers(1, 7),
    window=st.integers(1, 7),
    compressive_cache=st.booleans(),
    gradient_through_cache=st.booleans(),
)


class Arrays(NamedTuple):
    """What gradients are taken of."""

    queries: Any
    keys: Any
    values: Any
    content_bias: Any
    position_bias: Any
    distances: Any


def draw(case: Case) -> tuple[Arrays, jax.Array, jax.Array]:
    rng, T = np.random.default_rng(7), sum(case.pieces)
    shapes = Arrays(
        (B, H, T, K), (B, H, T, K), (B, H, T, V), (H, K), (H, K), (H, case.window + 1, K)
    )
    arrays = Arrays(*(jnp.asarray(rng.normal(size=shape)) for shape in shapes))
    codes = jnp.asarray(rng.integers(0, S, size=(B, H, T)), jnp.int32)
    return arrays, jnp.asarray(rng.normal(size=(H, S, K))), codes


def build(arrays: Arrays, codewords, codes) -> tuple[Projections, Scoring]:
    nearest = jnp.stack([codewords[h][codes[:, h]] for h in range(H)], axis=1)
    keys = nearest + (arrays.keys - jax.lax.stop_gradient(arrays.keys))
    tokens = Projections(arrays.queries, keys, arrays.values, codes)
    return tokens, Scoring(codewords, arrays.content_bias, arrays.position_bias, arrays.distances)


def new_cache(case: Case) -> LayerCache:
    return empty_cache(
        (B, H),
        window=case.window,
        n_codes=S,
        d_key=K,
        d_value=V,
        compressive_cache=case.compressive_cache,
        dtype=jnp.dtype("float64"),
        statistics_dtype=jnp.dtype("float64"),
    )


def serial(case: Case, arrays: Arrays, codewords, codes):
    tokens, scoring = build(arrays, codewords, codes)
    cache, length, outputs = new_cache(case), 0, []
    for piece in case.pieces:
        part = jax.tree.map(lambda a, n=length, m=piece: a[:, :, n : n + m], tokens)
        attended, cache = attend_blocks(
            part,
            scoring,
            cache,
            jnp.asarray(length),
            block_length=case.block_length,
            gradient_through_cache=case.gradient_through_cache,
        )
        outputs.append(attended)
        length += piece
    return jnp.concatenate(outputs, axis=2), cache


def dense(case: Case, arrays: Arrays, codewords, codes):
    tokens, scoring = build(arrays, codewords, codes)
    begins = np.cumsum([0, *case.pieces[:-1]])
    starts = [
        begin + block_starts(n, case.block_length)
        for begin, n in zip(begins, case.pieces, strict=True)
    ]
    return attend_dense(
        tokens,
        scoring,
        jnp.concatenate(starts),
        compressive_cache=case.compressive_cache,
        gradient_through_cache=case.gradient_through_cache,
    ), None


def outputs_and_gradients(form, case: Case):
    arrays, codewords, codes = draw(case)
    weights = jnp.asarray(np.random.default_rng(8).normal(size=arrays.values.shape))

    def weighted(arrays):
        attended, cache = form(case, arrays, codewords, codes)
        return jnp.sum(weights * attended), (attended, cache)

    (_, (attended, cache)), gradients = jax.jit(jax.value_and_grad(weighted, has_aux=True))(arrays)
    return attended, gradients, cache


# One token; blocks shorter and longer than the window; T not a multiple of either; no cache; and
# keys of earlier blocks as constants.
@settings(max_examples=6, derandomize=True, deadline=None, database=None)
@given(cases)
@example(Case(pieces=(1,), block_length=4, window=3))
@example(Case(pieces=(23,), block_length=3, window=5))
@example(Case(pieces=(11, 1, 9), block_length=6, window=2))
@example(Case(pieces=(17,), block_length=4, window=4, compressive_cache=False))
@example(Case(pieces=(5, 12), block_length=5, window=3, gradient_through_cache=False))
def test_serial_form_is_the_dense_definition(case):
    expected, expected_gradients, _ = outputs_and_gradients(dense, case)
    actual, gradients, cache = outputs_and_gradients(serial, case)
    np.testing.assert_allclose(actual, expected, atol=1e-10, rtol=0)
    for name, gradient in expected_gradients._asdict().items():
        np.testing.assert_allclose(
            getattr(gradients, name), gradient, atol=1e-10, rtol=0, err_msg=name
        )
    check_cache(case, cache)


def check_cache(case: Case, cache: LayerCache):
    """The cache holds the last M tokens, and the number and mean of older values by code."""
    arrays, _, codes = draw(case)
    old = max(sum(case.pieces) - case.window, 0)
    held = min(sum(case.pieces), case.window)
    np.testing.assert_array_equal(cache.values[:, :, -held:], arrays.values[:, :, old:])
    if not case.compressive_cache:
        assert cache.counts is None
        return
    assert cache.counts is not None
    assert cache.means is not None
    assert cache.codes is not None
    np.testing.assert_array_equal(cache.codes[:, :, -held:], codes[:, :, old:])
    for b, h, s in np.ndindex(B, H, S):
        chosen = np.asarray(arrays.values)[b, h, :old][np.asarray(codes)[b, h, :old] == s]
        assert cache.counts[b, h, s] == len(chosen)
        mean = chosen.mean(axis=0) if len(chosen) else np.zeros(V)
        np.testing.assert_allclose(cache.means[b, h, s], mean, atol=1e-12)


def test_the_block_length_does_not_change_the_result():
    case = Case(pieces=(29,), block_length=1, window=4)
    one, _, _ = outputs_and_gradients(serial, case)
    for block_length in (3, 29, 64):
        other, _, _ = outputs_and_gradients(serial, case._replace(block_length=block_length))
        np.testing.assert_allclose(other, one, atol=1e-12)
