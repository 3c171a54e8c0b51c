"""Run by test_sharding.py in a process with eight devices: they train as one does."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from model.config import OptimizerConfig
from model.sharding import abstract_state, batch_sharding, make_mesh, on_mesh, replicated
from model.training import train_step
from tests.model import toy

# Wide enough for Adafactor to factor its moments.
WIDE = replace(toy.MODEL64, d_model=128, d_key=128, d_value=160)
HEADS = replace(toy.MODEL64, d_feed_forward=24, n_heads=4)
MODELS = {
    "gated": WIDE,
    "grouped": replace(HEADS, n_kv_heads=2),
    "multi-query": replace(HEADS, n_kv_heads=1),
}
UPDATE_LENGTH = 8
ROWS = 8


def optimizer(name):
    return OptimizerConfig(
        name=name, learning_rate=1e-2, schedule="constant", gradient_clip=1.0, weight_decay=1e-2
    )


@pytest.mark.parametrize(
    ("kind", "name", "axes", "accumulate"),
    [
        ("gated", "adafactor", (2, 2, 2), 2),
        ("grouped", "lion", (2, 2, 2), 1),
        # Splits heads of queries, but not the only one of keys.
        ("multi-query", "adamw", (1, 2, 4), 1),
    ],
)
def test_eight_devices_are_one(float64, kind, name, axes, accumulate):
    """Micro-batches against none as well, and the second update is a spike for all alike."""
    model = MODELS[kind]
    step = functools.partial(
        train_step, model, optimizer(name), UPDATE_LENGTH, spike_deviations=4.0
    )
    state, batch = toy.with_a_spike(toy.state(model, optimizer(name)), toy.rows(ROWS))
    expected = jax.jit(step)(state, batch)
    assert expected[1].applied.tolist() == [True, False, True]
    step = functools.partial(step, accumulate=accumulate)

    data, fsdp, tensor = axes
    mesh = make_mesh(jax.devices(), data=data, fsdp=fsdp, tensor=tensor)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(mesh, model, lambda: state))
    sharded = jax.jit(on_mesh(mesh, step), out_shardings=(shardings, replicated(mesh)))(
        jax.device_put(state, shardings), jax.device_put(batch, batch_sharding(mesh))
    )
    for (path, actual), leaf in zip(
        jax.tree_util.tree_leaves_with_path(sharded), jax.tree.leaves(expected), strict=True
    ):
        # Metrics are float32 whatever the model computes in.
        tolerance = 1e-9 if actual.dtype != np.float32 else 1e-5
        np.testing.assert_allclose(
            np.asarray(actual, np.float64),
            np.asarray(leaf, np.float64),
            atol=tolerance,
            rtol=tolerance,
            err_msg=str(path),
        )
