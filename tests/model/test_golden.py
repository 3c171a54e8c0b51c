"""The published model, number for number: evaluation and training of the official code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.objective import objective
from model.optimizer import apply_gradients, make_optimizer, schedule_multiplier
from model.quantizer import codebook_health, update_codebooks
from model.training import initial_state, train_step
from model.transformer import bind, initial_cache
from tests.model.golden import Golden, Rows


@pytest.fixture(scope="module", params=["g1_enwik8like"])
def golden(request) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="module")
def evaluate(golden):
    def run(cache, inputs):
        network = bind(golden.model, golden.params("params/"), golden.codebooks("params/"))
        features, cache, _ = network(inputs, cache)
        return jax.nn.log_softmax(network.logits(features)), cache

    return jax.jit(run)


@pytest.fixture(scope="module")
def differentiate(golden):
    return jax.jit(
        jax.value_and_grad(functools.partial(objective, config=golden.model), has_aux=True)
    )


def close(actual, expected, tolerance):
    """Within a fraction of the tensor's largest magnitude, leaf by leaf."""

    def check(path, actual, expected):
        expected = np.asarray(expected)
        bound = tolerance * max(np.abs(expected).max(), 1e-30)
        error = np.abs(np.asarray(actual) - expected).max()
        assert error <= bound, (jax.tree_util.keystr(path), error, bound)

    jax.tree_util.tree_map_with_path(check, actual, expected)


def same_cache(actual, expected):
    assert actual.length == expected.length
    np.testing.assert_array_equal(actual.layers.codes, expected.layers.codes)
    np.testing.assert_array_equal(actual.layers.counts, expected.layers.counts)
    # Codewords to the bit would be too much: the official code divides in another order.
    for name in ("keys", "values", "means"):
        close(getattr(actual.layers, name), getattr(expected.layers, name), 5e-6)


def test_evaluation(golden, evaluate):
    cache = initial_cache(golden.model, 2)
    for update in range(golden.n_updates):
        rows = golden.rows(update)
        logprobs, cache = evaluate(cache, rows.inputs)
        prefix = f"eval/u{update}/"
        np.testing.assert_allclose(logprobs, golden[prefix + "logprobs"], atol=2e-5, rtol=0)
        nats = -np.take_along_axis(np.asarray(logprobs), rows.targets[..., None], -1)[..., 0]
        np.testing.assert_allclose(
            np.sum(nats * rows.loss_mask), golden[prefix + "nll_sum"], rtol=1e-5
        )
        same_cache(cache, golden.cache(prefix + "state/"))


def before(golden, update):
    """Parameters, codebooks and cache that the official code began an update with."""
    if update == 0:
        cache = initial_cache(golden.model, 2)
        return golden.params("params/"), golden.codebooks("params/"), cache
    prefix = f"train/u{update - 1}/"
    return (
        golden.params(prefix + "params_after/"),
        golden.codebooks(prefix + "params_after/"),
        golden.cache(prefix + "state/"),
    )


@pytest.mark.parametrize("update", [0, 1, 2])
def test_training_gradients_and_codebooks(golden, differentiate, update):
    params, codebooks, cache = before(golden, update)
    rows, prefix = golden.rows(update), f"train/u{update}/"
    divisor = jnp.float32(rows.inputs.size)
    (loss, parts), gradients = differentiate(
        params, codebooks, cache, rows.inputs, rows.targets, rows.loss_mask, divisor
    )
    assert loss == pytest.approx(golden[prefix + "loss_total"], rel=1e-5)
    assert parts.nats / divisor == pytest.approx(golden[prefix + "loss_lm"], rel=1e-5)
    assert parts.commitment == pytest.approx(golden[prefix + "loss_commit"], rel=1e-5)
    close(gradients, golden.params(prefix + "grads/"), 1e-5)
    same_cache(parts.cache, golden.cache(prefix + "state/"))
    new = update_codebooks(codebooks, parts.statistics, golden.model.codebook_decay)
    close(new, golden.codebooks(prefix + "params_after/"), 1e-5)
    relative_error = codebook_health(parts.statistics).relative_error
    expected = golden[prefix + "metrics/relative_err_mean"]
    if rows.loss_mask.all():  # the official metric counts padding
        assert relative_error == pytest.approx(expected, rel=1e-4)


def test_optimizer_from_the_official_gradients(golden):
    config = golden.optimizer
    state = make_optimizer(config).init(golden.params("params/"))
    for update in range(golden.n_updates):
        prefix = f"train/u{update}/"
        applied = apply_gradients(
            config,
            before(golden, update)[0],
            state,
            golden.params(prefix + "grads/"),
            jnp.int32(update),
        )
        state = applied.optimizer
        multiplier = schedule_multiplier(config, jnp.int32(update))
        assert multiplier == pytest.approx(golden[prefix + "lr_multiplier"], abs=1e-6)
        for actual, expected in zip(
            jax.tree.leaves(applied.params),
            jax.tree.leaves(golden.params(prefix + "params_after/")),
            strict=True,
        ):
            np.testing.assert_allclose(actual, expected, atol=5e-7, rtol=1e-6)


def test_three_updates_of_a_batch_in_one_step(golden):
    """The scan over updates, nothing teacher-forced: metrics and state after the whole batch."""
    parts = [golden.rows(update) for update in range(golden.n_updates)]
    columns = zip(*(part[:4] for part in parts), strict=True)
    batch = Rows(*(np.concatenate(arrays, axis=1) for arrays in columns), rows=parts[0].rows)
    state = initial_state(golden.model, golden.optimizer, seed=0)._replace(
        params=golden.params("params/"), codebooks=golden.codebooks("params/")
    )
    step = functools.partial(train_step, golden.model, golden.optimizer, golden.update_length)
    state, metrics = jax.jit(step)(state, batch)
    for update in range(golden.n_updates):
        prefix = f"train/u{update}/"
        per_token = golden[prefix + "loss_lm"] / golden[prefix + "loss_mask_mean"]
        assert metrics.loss[update] == pytest.approx(per_token, rel=2e-5)
        assert metrics.commitment[update] == pytest.approx(golden[prefix + "loss_commit"], rel=2e-5)
        norm = float(optax.tree.norm(golden.params(prefix + "grads/")))
        assert metrics.gradient_norm[update] == pytest.approx(norm, rel=1e-4)
        assert metrics.tokens[update] == parts[update].loss_mask.sum()
    last = f"train/u{golden.n_updates - 1}/params_after/"
    close(state.codebooks, golden.codebooks(last), 1e-4)
    assert state.updates == golden.n_updates
    assert state.batches == 1
    assert metrics.finite.all()
