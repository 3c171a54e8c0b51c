"""A hundred thousand tokens in bfloat16: counts, means and attention stay right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.attention import Projections, Scoring, empty_cache
from model.block_attention import Options, attend_serial
from model.parallel_attention import attend_parallel

pytestmark = pytest.mark.compiles

T, M, L, S, K, V = 131_072, 64, 512, 4, 8, 3
OPTIONS = Options(block_length=L, window_gradient=True, gradient_through_cache=True)


def tokens(length: int, values_dtype: str) -> tuple[Projections, Scoring]:
    """Nine in ten tokens have code 0, which bfloat16 could not count."""
    rng = np.random.default_rng(0)
    codes = np.where(rng.random((1, 1, length)) < 0.9, 0, rng.integers(0, S, (1, 1, length)))
    codewords = rng.normal(size=(1, S, K)).astype(np.float32)
    projections = Projections(
        queries=jnp.asarray(rng.normal(size=(1, 1, 1, length, K)), jnp.float32),
        keys=jnp.asarray(codewords[0][codes]),
        values=jnp.asarray(1 + rng.normal(size=(1, 1, length, V)), values_dtype),
        codes=jnp.asarray(codes, jnp.int32),
        documents=None,
    )
    bias = jnp.zeros((1, 1, K))
    distances = jnp.asarray(rng.normal(size=(1, M + 1, K)), jnp.float32)
    return projections, Scoring(jnp.asarray(codewords), bias, bias, distances)


def cache(values_dtype: str):
    return empty_cache(
        (1, 1),
        capacity=M,
        n_codes=S,
        d_key=K,
        d_value=V,
        isolated=False,
        dtype=jnp.dtype(values_dtype),
        statistics_dtype=jnp.dtype("float32"),
    )


def last_value(projections: Projections, scoring: Scoring) -> np.ndarray:
    """What the last query gets, over all T tokens, in double precision."""
    queries, keys, values, distances = (
        np.asarray(a, np.float64)
        for a in (projections.queries[0, 0, 0], projections.keys[0, 0], projections.values[0, 0],
                  scoring.distances[0])
    )  # fmt: skip
    scores = keys @ queries[-1]
    scores[-M - 1 :] += distances[::-1] @ queries[-1]
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


@pytest.mark.parametrize(
    ("values_dtype", "form", "tolerance"),
    [("float32", "serial", 1e-5), ("bfloat16", "serial", 1e-2), ("bfloat16", "parallel", 1e-2)],
)
def test_131072_tokens(values_dtype, form, tolerance):
    projections, scoring = tokens(T, values_dtype)

    @jax.jit
    def run(projections, scoring):
        arguments = (projections, scoring, cache(values_dtype), jnp.int32(0), OPTIONS)
        if form == "serial":
            return attend_serial(*arguments)
        return attend_parallel(*arguments, blocks_per_group=8)

    attended, after = run(projections, scoring)
    assert after.counts is not None
    assert after.means is not None
    assert after.counts.dtype == after.means.dtype == jnp.float32
    assert jnp.isfinite(attended).all()
    codes = np.asarray(projections.codes)[0, 0, :-M]
    values = np.asarray(projections.values[0, 0, :-M], np.float64)
    for code in range(S):
        assert after.counts[0, 0, code] == (codes == code).sum()
        mean = values[codes == code].mean(axis=0)
        np.testing.assert_allclose(after.means[0, 0, code], mean, rtol=1e-4)
    np.testing.assert_allclose(
        np.asarray(attended[0, 0, 0, -1], np.float64),
        last_value(projections, scoring),
        rtol=tolerance,
    )


def test_token_by_token_counts_beyond_256_in_bfloat16():
    """The official code's counts stop there: 256 + 1 = 256."""
    length = 1000
    projections, scoring = tokens(length, "bfloat16")

    @jax.jit
    def run(projections, scoring):
        def step(memory, n):
            part = Projections(
                jax.lax.dynamic_slice_in_dim(projections.queries, n, 1, 3),
                jax.lax.dynamic_slice_in_dim(projections.keys, n, 1, 2),
                jax.lax.dynamic_slice_in_dim(projections.values, n, 1, 2),
                jax.lax.dynamic_slice_in_dim(projections.codes, n, 1, 2),
                None,
            )
            attended, memory = attend_serial(part, scoring, memory, n, OPTIONS)
            return memory, attended[0, 0, 0, 0]

        return jax.lax.scan(step, cache("bfloat16"), jnp.arange(length))

    after, attended = run(projections, scoring)
    codes = np.asarray(projections.codes)[0, 0, :-M]
    assert after.counts is not None
    assert after.counts[0, 0, 0] == (codes == 0).sum() > 600
    np.testing.assert_allclose(
        np.asarray(attended[-1], np.float64), last_value(projections, scoring), rtol=1e-2
    )
    assert jnp.isfinite(attended).all()
