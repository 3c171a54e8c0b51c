"""Micro-batches: a batch in parts moves parameters and codebooks as the whole of it does."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.accumulation import merge_candidates, no_candidates, split_rows
from model.config import ConfigError
from model.quantizer import Candidates
from model.training import kmeans_codebooks, train_step
from tests.model import toy

UPDATE_LENGTH = 8
# All that draws random numbers, and that sums over rows.
MODEL = replace(
    toy.MODEL64,
    embedding_dropout=0.1,
    residual_dropout=0.2,
    sinusoid_dropout=0.1,
    layer_dropout=0.2,
    kmeans_iterations=3,
    revive_below=1.0,
)


def trained(accumulate: int, rows: int = 8, n_batches: int = 2):
    """State and metrics after the batches, k-means first."""
    begin = jax.jit(
        functools.partial(kmeans_codebooks, MODEL, UPDATE_LENGTH, accumulate=accumulate)
    )
    step = jax.jit(
        functools.partial(train_step, MODEL, toy.OPTIMIZER, UPDATE_LENGTH, accumulate=accumulate)
    )
    state = begin(toy.state(MODEL), toy.rows(rows))
    metrics = []
    for seed in range(n_batches):
        state, figures = step(state, toy.rows(rows, seed=seed))
        metrics.append(figures)
    return state, metrics


@pytest.mark.compiles
@pytest.mark.timeout(600)
def test_micro_batches_train_as_the_batch_does(float64):
    """Six updates, with every dropout, k-means and revival: each row draws what it draws in the
    whole batch, and the candidates of the parts are those of the whole."""
    (expected, expected_metrics) = trained(1)
    assert all(metrics.applied.all() for metrics in expected_metrics)
    for accumulate in (2, 8):
        state, metrics = trained(accumulate)
        for (path, actual), leaf in zip(
            jax.tree_util.tree_leaves_with_path((state, metrics)),
            jax.tree.leaves((expected, expected_metrics)),
            strict=True,
        ):
            # Metrics are float32 whatever the model computes in.
            tolerance = 1e-9 if actual.dtype != np.float32 else 1e-5
            np.testing.assert_allclose(
                np.asarray(actual, np.float64),
                np.asarray(leaf, np.float64),
                atol=tolerance,
                rtol=tolerance,
                err_msg=f"{accumulate} {path}",
            )


def test_micro_batches_are_one_loop_whatever_their_number():
    def length(accumulate: int) -> int:
        """Equations of a step over micro-batches of 2 rows."""
        step = functools.partial(
            train_step, toy.MODEL, toy.OPTIMIZER, UPDATE_LENGTH, accumulate=accumulate
        )
        traced = jax.make_jaxpr(step)(toy.state(), toy.rows(2 * accumulate))
        return len(list(toy.equations(traced.jaxpr)))

    assert length(2) == length(5)


def test_every_device_has_its_share_of_every_part():
    rows = jnp.arange(12)
    parts = split_rows(rows, 3)
    assert sorted(parts.ravel().tolist()) == list(range(12))
    for device in (range(6), range(6, 12)):
        assert [len(set(part.tolist()) & set(device)) for part in parts] == [2, 2, 2]


def test_candidates_of_the_parts_are_those_of_the_whole():
    random = np.random.default_rng(0)
    layers, heads, drawn, width, room = 2, 3, 20, 4, 5
    keys = random.normal(size=(layers, heads, drawn, width)).astype(np.float32)
    # Some tokens are masked: their priority is 0.
    priorities = random.permutation(drawn).astype(np.uint32)[None] * np.array([[1], [3]], np.uint32)
    merged = no_candidates(Candidates(jnp.asarray(keys), jnp.asarray(priorities)), room)
    for part in np.array_split(np.arange(drawn), 4):
        merged = merge_candidates(
            merged, Candidates(jnp.asarray(keys[:, :, part]), jnp.asarray(priorities[:, part]))
        )
    for layer in range(layers):
        best = np.argsort(-priorities[layer].astype(int))[:room]
        assert merged.priorities[layer].tolist() == priorities[layer, best].tolist()
        np.testing.assert_array_equal(merged.keys[layer], keys[layer][:, best])


@pytest.mark.parametrize(("accumulate", "nearest"), [(3, 2), (7, 8), (100, 8)])
def test_what_does_not_divide_is_refused(accumulate, nearest):
    step = functools.partial(
        train_step, toy.MODEL, toy.OPTIMIZER, UPDATE_LENGTH, accumulate=accumulate
    )
    message = (
        rf"^training\.accumulate: must divide .* 8, got {accumulate}; the nearest is {nearest}\b"
    )
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(step, toy.state(), toy.rows(8))
