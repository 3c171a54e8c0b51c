"""Every form of attention against the dense definition, in double precision."""

import functools
import sys
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
    attend_dense,
    empty_cache,
)
from model.block_attention import Options, attend_serial
from model.full_attention import attend_full, attend_full_dense
from model.parallel_attention import attend_parallel

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.compiles]

B, H, S, K, V = 2, 2, 5, 4, 3


class Case(NamedTuple):
    """Shapes and switches of a comparison."""

    pieces: tuple[int, ...]  # tokens of each call, the cache carried between them
    block_length: int
    window: int
    compressive_cache: bool = True
    official_gradient: bool = False
    gradient_through_cache: bool = True
    isolated: bool = False
    query_heads: int = 1  # to each key and value head
    blocks_per_group: int = 2
    dtype: str = "float64"
    seed: int = 7


def valid(case: Case) -> Case:
    """Without gradients through the cache, blocks must be those of the definition."""
    return case if case.gradient_through_cache else case._replace(official_gradient=True)


cases = st.builds(
    Case,
    pieces=st.lists(st.integers(1, 17), min_size=1, max_size=3).map(tuple),
    block_length=st.integers(1, 7),
    window=st.integers(1, 7),
    compressive_cache=st.booleans(),
    official_gradient=st.booleans(),
    gradient_through_cache=st.booleans(),
    isolated=st.booleans(),
    query_heads=st.integers(1, 2),
    blocks_per_group=st.integers(1, 3),
    dtype=st.sampled_from(["float64", "float32"]),
    seed=st.integers(0, 99),
).map(valid)

every_form = pytest.mark.parametrize("form", ["serial", "parallel"])


class Arrays(NamedTuple):
    """What gradients are taken of."""

    queries: Any
    keys: Any
    values: Any
    content_bias: Any
    position_bias: Any
    distances: Any


class Drawn(NamedTuple):
    """A case's data."""

    arrays: Arrays
    codewords: Any
    codes: Any
    documents: Any


def draw(case: Case) -> Drawn:
    rng, T, R = np.random.default_rng(case.seed), sum(case.pieces), case.query_heads
    shapes = Arrays(
        (B, H, R, T, K), (B, H, T, K), (B, H, T, V), (H, R, K), (H, R, K), (H, case.window + 1, K)
    )
    arrays = Arrays(*(jnp.asarray(rng.normal(size=shape), case.dtype) for shape in shapes))
    codes = jnp.asarray(rng.integers(0, S, size=(B, H, T)), jnp.int32)
    documents = np.cumsum(rng.random((B, T)) < 0.2, axis=1, dtype=np.int32)
    codewords = jnp.asarray(rng.normal(size=(H, S, K)), case.dtype)
    return Drawn(arrays, codewords, codes, jnp.asarray(documents) if case.isolated else None)


def build(arrays: Arrays, drawn: Drawn) -> tuple[Projections, Scoring]:
    nearest = jnp.stack([drawn.codewords[h][drawn.codes[:, h]] for h in range(H)], axis=1)
    keys = nearest + (arrays.keys - jax.lax.stop_gradient(arrays.keys))
    tokens = Projections(arrays.queries, keys, arrays.values, drawn.codes, drawn.documents)
    return tokens, Scoring(
        drawn.codewords, arrays.content_bias, arrays.position_bias, arrays.distances
    )


def new_cache(case: Case, capacity: int | None = None) -> LayerCache:
    """Of block attention or, with a capacity, of full attention."""
    return empty_cache(
        (B, H),
        capacity=capacity or case.window,
        n_codes=S if case.compressive_cache and not capacity else None,
        d_key=K,
        d_value=V,
        isolated=case.isolated,
        dtype=jnp.dtype(case.dtype),
        statistics_dtype=jnp.dtype(case.dtype),
    )


def piece(tokens: Projections, begin: int, length: int) -> Projections:
    queries, keys, values, codes, documents = tokens
    part = slice(begin, begin + length)
    return Projections(
        queries[:, :, :, part],
        keys[:, :, part],
        values[:, :, part],
        None if codes is None else codes[:, :, part],
        None if documents is None else documents[:, part],
    )


def in_blocks(form: str, case: Case, arrays: Arrays, drawn: Drawn):
    tokens, scoring = build(arrays, drawn)
    options = Options(case.block_length, not case.official_gradient, case.gradient_through_cache)
    attend = {
        "serial": attend_serial,
        "parallel": functools.partial(attend_parallel, blocks_per_group=case.blocks_per_group),
    }[form]
    cache, length, outputs = new_cache(case), 0, []
    for n in case.pieces:
        part = piece(tokens, length, n)
        attended, cache = attend(part, scoring, cache, jnp.asarray(length), options)
        outputs.append(attended)
        length += n
    return jnp.concatenate(outputs, axis=3), cache


def quadratic(form: str, case: Case, arrays: Arrays, drawn: Drawn):
    """Keys that are not quantised."""
    tokens, scoring = build_unquantized(arrays, drawn)
    cache, length, outputs = new_cache(case, capacity=sum(case.pieces) + 2), 0, []
    for n in case.pieces:
        part = piece(tokens, length, n)
        if form == "chunks":
            attended, cache = attend_full(
                part, scoring, cache, jnp.asarray(length), case.block_length
            )
        else:
            attended, cache = attend_full_dense(part, scoring, cache, jnp.asarray(length))
        outputs.append(attended)
        length += n
    return jnp.concatenate(outputs, axis=3), cache


def dense_unquantized(case: Case, arrays: Arrays, drawn: Drawn):
    tokens, scoring = build_unquantized(arrays, drawn)
    begins = np.cumsum([0, *case.pieces[:-1]])
    starts = jnp.asarray(np.repeat(begins, case.pieces))
    return attend_dense(tokens, scoring, call_starts=starts), None


def build_unquantized(arrays: Arrays, drawn: Drawn) -> tuple[Projections, Scoring]:
    tokens = Projections(arrays.queries, arrays.keys, arrays.values, None, drawn.documents)
    return tokens, Scoring(None, arrays.content_bias, arrays.position_bias, arrays.distances)


def dense(case: Case, arrays: Arrays, drawn: Drawn):
    tokens, scoring = build(arrays, drawn)
    begins = np.cumsum([0, *case.pieces[:-1]])
    blocks = [
        begin + np.arange(n) // case.block_length * case.block_length
        for begin, n in zip(begins, case.pieces, strict=True)
    ]
    return attend_dense(
        tokens,
        scoring,
        compressive_cache=case.compressive_cache,
        call_starts=jnp.asarray(np.repeat(begins, case.pieces)),
        block_starts=jnp.asarray(np.concatenate(blocks)) if case.official_gradient else None,
        gradient_through_cache=case.gradient_through_cache,
    ), None


def outputs_and_gradients(form, case: Case):
    drawn = draw(case)
    shape = (*drawn.arrays.queries.shape[:4], V)
    weights = jnp.asarray(np.random.default_rng(8).normal(size=shape), case.dtype)

    def weighted(arrays):
        attended, cache = form(case, arrays, drawn)
        return jnp.sum(weights * attended), (attended, cache)

    run = jax.jit(jax.value_and_grad(weighted, has_aux=True))
    (_, (attended, cache)), gradients = run(drawn.arrays)
    return attended, gradients, cache


# One token; blocks shorter and longer than the window; T not a multiple of either; no cache; keys
# of earlier blocks as constants; documents that begin anywhere; several query heads to a key.
@every_form
@settings(max_examples=8, derandomize=True, deadline=None, database=None)
@given(case=cases)
@example(case=Case(pieces=(1,), block_length=4, window=3))
@example(case=Case(pieces=(23,), block_length=3, window=5, query_heads=2))
@example(case=Case(pieces=(11, 1, 9), block_length=6, window=2, isolated=True))
@example(case=Case(pieces=(17,), block_length=4, window=4, compressive_cache=False))
@example(case=Case((5, 12), 5, 3, official_gradient=True, gradient_through_cache=False))
@example(case=Case((8, 9), 2, 4, official_gradient=True, isolated=True, blocks_per_group=3))
def test_forms_are_the_dense_definition(form, case):
    check_cache(case, compare(functools.partial(in_blocks, form), dense, case))


@every_form
def test_one_head_is_products_of_plain_matrices_and_the_same(form, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "H", 1)
    case = Case(pieces=(11, 1, 9), block_length=6, window=2, isolated=True, query_heads=2)
    check_cache(case, compare(functools.partial(in_blocks, form), dense, case))


@pytest.mark.parametrize("form", ["chunks", "dense"])
@settings(max_examples=6, derandomize=True, deadline=None, database=None)
@given(case=cases)
@example(case=Case(pieces=(1,), block_length=4, window=3))
@example(case=Case(pieces=(29,), block_length=3, window=4, query_heads=2))
@example(case=Case(pieces=(11, 1, 9), block_length=6, window=2, isolated=True))
def test_full_attention_is_the_dense_definition(form, case):
    cache = compare(functools.partial(quadratic, form), dense_unquantized, case)
    held = sum(case.pieces)
    np.testing.assert_array_equal(cache.keys[:, :, :held], draw(case).arrays.keys)
    assert not cache.keys[:, :, held:].any()


def compare(form, definition, case: Case) -> LayerCache:
    """Outputs and gradients of a form are those of the definition; returns the form's cache."""
    expected, expected_gradients, _ = outputs_and_gradients(definition, case)
    actual, gradients, cache = outputs_and_gradients(form, case)
    tolerance = 1e-10 if case.dtype == "float64" else 1e-5
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=0)
    for name, gradient in expected_gradients._asdict().items():
        bound = tolerance * max(1, np.abs(gradient).max())
        np.testing.assert_allclose(
            getattr(gradients, name), gradient, atol=bound, rtol=0, err_msg=name
        )
    return cache


def check_cache(case: Case, cache: LayerCache):
    """The cache holds the last M tokens, and the number and mean of older values by code."""
    drawn = draw(case)
    values, codes = np.asarray(drawn.arrays.values), np.asarray(drawn.codes)
    old = max(sum(case.pieces) - case.window, 0)
    held = min(sum(case.pieces), case.window)
    np.testing.assert_array_equal(cache.values[:, :, -held:], values[:, :, old:])
    if case.isolated:
        assert cache.documents is not None
        np.testing.assert_array_equal(cache.documents[:, -held:], drawn.documents[:, old:])
        np.testing.assert_array_equal(cache.documents[:, :-held], -1)
    if not case.compressive_cache:
        assert cache.counts is None
        return
    assert cache.counts is not None
    assert cache.means is not None
    assert cache.codes is not None
    np.testing.assert_array_equal(cache.codes[:, :, -held:], codes[:, :, old:])
    for b, h, s in np.ndindex(B, H, S):
        counted = codes[b, h, :old] == s
        if case.isolated and old:
            documents = np.asarray(drawn.documents)[b, :old]
            counted &= documents == documents[-1]
        chosen = values[b, h, :old][counted]
        assert cache.counts[b, h, s] == len(chosen)
        mean = chosen.mean(axis=0) if len(chosen) else np.zeros(V)
        np.testing.assert_allclose(cache.means[b, h, s], mean, atol=1e-6)


@every_form
def test_the_block_length_changes_neither_result_nor_gradient(form):
    case = Case(pieces=(29,), block_length=1, window=4)
    run = functools.partial(in_blocks, form)
    one = outputs_and_gradients(run, case)
    for block_length in (3, 29, 64):
        other = outputs_and_gradients(run, case._replace(block_length=block_length))
        for left, right in zip(jax.tree.leaves(other), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(left, right, atol=1e-12)
