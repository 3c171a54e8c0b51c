"""The optimizer against optax's own AdamW, and on stacked layers against unstacked ones."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.config import OptimizerConfig
from model.optimizer import apply_gradients, decay_mask, make_optimizer, schedule_multiplier
from tests.model import toy

pytestmark = pytest.mark.compiles

CONFIG = OptimizerConfig(
    learning_rate=1e-2,
    schedule="cosine",
    warmup_steps=3,
    schedule_steps=9,
    gradient_clip=0.5,
    weight_decay=0.1,
)


def gradients(params, update):
    def draw(leaf):
        size = jax.random.fold_in(jax.random.key(update), leaf.size)
        return jax.random.normal(size, leaf.shape, leaf.dtype)

    return jax.tree.map(draw, params)


def run(config, params, n_updates=4):
    state = make_optimizer(config).init(params)
    for update in range(n_updates):
        applied = apply_gradients(
            config, params, state, gradients(params, update), jnp.int32(update)
        )
        params, state = applied.params, applied.optimizer
    return params


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules(schedule):
    config = replace(CONFIG, schedule=schedule)
    after = {
        "cosine": optax.cosine_decay_schedule(1.0, 6, alpha=0.1),
        "linear": optax.linear_schedule(1.0, 0.1, 6),
        "constant": optax.constant_schedule(1.0),
    }[schedule]
    expected = optax.join_schedules([optax.linear_schedule(0.0, 1.0, 3), after], [3])
    for update in range(14):
        actual = schedule_multiplier(config, jnp.int32(update))
        assert actual == pytest.approx(np.asarray(expected(update)).item(), abs=1e-6)
    assert schedule_multiplier(replace(config, warmup_steps=0), jnp.int32(0)) == 1


def test_scaled_decay_is_adamw():
    params = toy.state().params
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, 1e-2, 3), optax.cosine_decay_schedule(1e-2, 6, alpha=0.1)], [3]
    )
    reference = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(schedule, b1=0.9, b2=0.98, eps=1e-9, weight_decay=0.1, mask=decay_mask),
    )
    expected, state = params, reference.init(params)
    for update in range(4):
        moves, state = reference.update(gradients(params, update), state, expected)
        expected = optax.apply_updates(expected, moves)
    for actual, leaf in zip(
        jax.tree.leaves(run(CONFIG, params)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(actual, leaf, atol=1e-6)


def unstack(params):
    """Layers apart, by number, as the official code has them."""
    layers = {
        str(n): jax.tree.map(lambda leaf, n=n: leaf[n], params["layers"])
        for n in range(toy.MODEL.n_layers)
    }
    return {**params, "layers": layers}


@pytest.mark.parametrize("form", ["scaled", "unscaled"])
def test_stacked_layers_are_optimized_like_unstacked_ones(form):
    config = replace(CONFIG, weight_decay_form=form)
    params = toy.state().params
    flat = unstack(params)
    # What decays is what has more than one axis, or none, in the unstacked network.
    by_rank = jax.tree.map(lambda leaf: leaf.ndim != 1, flat)
    assert decay_mask(flat) == by_rank
    assert unstack_mask(decay_mask(params)) == by_rank
    state, unstacked_state = make_optimizer(config).init(params), make_optimizer(config).init(flat)
    for update in range(3):
        moves = gradients(params, update)
        step = jnp.int32(update)
        params, state, *_ = apply_gradients(config, params, state, moves, step)
        flat, unstacked_state, *_ = apply_gradients(
            config, flat, unstacked_state, unstack(moves), step
        )
    for actual, expected in zip(
        jax.tree.leaves(unstack(params)), jax.tree.leaves(flat), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def unstack_mask(mask):
    return {**mask, "layers": {str(n): mask["layers"] for n in range(toy.MODEL.n_layers)}}
