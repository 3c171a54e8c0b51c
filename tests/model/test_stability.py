"""What is skipped: against a numpy account of the same losses, and the training without it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.objective import objective
from model.optimizer import apply_gradients
from model.quantizer import update_codebooks
from model.stability import SPIKE_MEMORY, judge, no_statistics
from model.training import train_step
from model.transformer import initial_cache
from tests.model import toy

LIMIT = 4.0
U = 8
"""Tokens of an update."""


def numpy_account(losses, limit):
    """Which losses are skipped, by sums over the ones kept with the weights of a moving mean."""
    kept, skipped = [], []
    for loss in losses:
        if len(kept) >= SPIKE_MEMORY:
            # The first SPIKE_MEMORY count alike; each later one takes a hundredth of the weight.
            age = np.arange(len(kept))[::-1]
            later = len(kept) - SPIKE_MEMORY
            weights = (1 - 1 / SPIKE_MEMORY) ** np.minimum(age, later) / SPIKE_MEMORY
            mean = np.sum(weights * kept)
            deviation = np.sqrt(np.sum(weights * (np.array(kept) - mean) ** 2))
            if loss > mean + limit * deviation:
                skipped.append(True)
                continue
        kept.append(loss)
        skipped.append(False)
    return skipped


def test_spikes_are_those_of_a_plain_account():
    random = np.random.default_rng(0)
    losses = 3 + 0.1 * random.normal(size=400) - np.linspace(0, 0.3, 400)
    losses[[20, 90]] += 5  # too early to be told
    losses[[150, 151, 300]] += [2, 40, 3]
    losses[250] += 0.2  # within the limit
    expected = numpy_account(losses, LIMIT)
    assert [n for n, skip in enumerate(expected) if skip][-1] == 300
    assert not any(expected[:SPIKE_MEMORY])

    def step(spikes, loss):
        spikes, verdict = judge(spikes, loss, jnp.isfinite(loss), LIMIT)
        return spikes, (verdict.applied, spikes.skipped, spikes.in_a_row)

    _, (applied, skipped, in_a_row) = jax.lax.scan(
        step, no_statistics(), jnp.asarray(losses, jnp.float32)
    )
    assert (~applied).tolist() == expected
    assert skipped.tolist() == np.cumsum(expected).tolist()
    run, runs = 0, []
    for skip in expected:
        run = run + 1 if skip else 0
        runs.append(run)
    assert in_a_row.tolist() == runs


def test_without_a_limit_no_finite_loss_is_skipped():
    spikes = no_statistics()._replace(mean=jnp.float32(3), variance=jnp.float32(0.01))
    spikes = spikes._replace(seen=jnp.int32(1000))
    for limit, expected in ((None, True), (5.0, False)):
        _, verdict = judge(spikes, jnp.float32(1000), jnp.bool_(True), limit)
        assert verdict.applied.item() == expected


@pytest.mark.compiles
def test_a_training_with_a_spike_is_the_one_without_that_update():
    """The third update starts from what the first left, and reads the second's tokens."""
    state, batch = toy.with_a_spike(toy.state(), toy.rows())
    plain = functools.partial(train_step, toy.MODEL, toy.OPTIMIZER, U)
    after, metrics = jax.jit(functools.partial(plain, spike_deviations=LIMIT))(state, batch)
    assert metrics.loss_spike_sigmas[1] > LIMIT
    assert metrics.applied.tolist() == [True, False, True]
    assert metrics.skipped_updates.tolist() == [0, 1, 1]
    assert metrics.skipped_in_a_row.tolist() == [0, 1, 0]
    assert (after.updates, after.batches) == (3, 1)

    def part(update):
        begin, end = U * update, U * (update + 1)
        arrays = (batch.inputs, batch.targets, batch.loss_mask)
        inputs, targets, mask = (jnp.asarray(array[:, begin:end]) for array in arrays)
        return inputs, targets, mask

    once, _ = jax.jit(plain)(
        state, batch._replace(inputs=part(0)[0], targets=part(0)[1], loss_mask=part(0)[2])
    )

    @jax.jit
    def third(state, once):
        read = functools.partial(objective, config=toy.MODEL)
        cache = initial_cache(toy.MODEL, 4)
        cache = read(state.params, state.codebooks, cache, *part(0), jnp.float32(1))[1].cache
        cache = read(once.params, once.codebooks, cache, *part(1), jnp.float32(1))[1].cache
        divisor = jnp.float32(part(2)[2].sum())
        gradients, parts = jax.grad(read, has_aux=True)(
            once.params, once.codebooks, cache, *part(2), divisor
        )
        moved = apply_gradients(toy.OPTIMIZER, once.params, once.optimizer, gradients, jnp.int32(2))
        codebooks = update_codebooks(once.codebooks, parts.statistics, toy.MODEL.codebook_decay)
        return moved.params, moved.optimizer, codebooks

    for actual, expected in zip(
        jax.tree.leaves((after.params, after.optimizer, after.codebooks)),
        jax.tree.leaves(third(state, once)),
        strict=True,
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    unwatched, _ = jax.jit(plain)(state, batch)
    assert not np.allclose(
        after.params["layers"]["query"], unwatched.params["layers"]["query"], 1e-3
    )
