"""A model small enough to compile in a second, and data for it."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from model.config import ModelConfig, OptimizerConfig
from model.stability import SPIKE_MEMORY
from model.training import TrainState, initial_state
from tests.model.golden import Rows

MODEL = ModelConfig(
    vocab_size=24,
    n_layers=2,
    d_model=16,
    d_key=8,
    d_value=12,
    n_codes=8,
    block_length=4,
    window=6,
    commitment_weight=1e-2,
)
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, schedule="constant", gradient_clip=1.0, weight_decay=1e-2
)
MODEL64 = replace(MODEL, dtype="float64")


def rows(n_rows: int = 4, length: int = 24, seed: int = 0) -> Rows:
    """A batch whose last row is padding in its last third."""
    tokens = np.random.default_rng(seed).integers(3, 24, (n_rows, length + 1)).astype(np.int32)
    tokens[:, 0] = 1
    tokens[-1, -length // 3 :] = 0
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    documents = np.cumsum(inputs == 1, axis=1, dtype=np.int32)
    return Rows(inputs, targets, documents, targets != 0, np.arange(n_rows, dtype=np.uint32))


@functools.cache
def state(model: ModelConfig = MODEL, optimizer: OptimizerConfig = OPTIMIZER) -> TrainState:
    """A state whose biases and gains are not at 0 and 1, where much would pass unseen."""

    noise = np.random.default_rng(1)
    begin = jax.jit(functools.partial(initial_state, model, optimizer))(0)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * noise.normal(size=leaf.shape).astype(leaf.dtype), begin.params
    )
    return begin._replace(params=params)


def with_a_spike(state: TrainState, batch: Rows) -> tuple[TrainState, Rows]:
    """The same, but that the second of three updates of 8 tokens has one that the model holds for
    all but impossible, after losses of 3.2 with a deviation of 1."""
    rare = 23
    bias = state.params["output"]["bias"].at[rare].set(-400)
    seen = state.spikes._replace(
        mean=jnp.float32(3.2), variance=jnp.float32(1), seen=jnp.int32(SPIKE_MEMORY)
    )
    output = {**state.params["output"], "bias": bias}
    state = state._replace(params={**state.params, "output": output}, spikes=seen)
    inputs, targets = (np.where(a == rare, 4, a) for a in (batch.inputs, batch.targets))
    targets[0, 12] = inputs[0, 13] = rare
    return state, batch._replace(inputs=inputs, targets=targets)


def equations(jaxpr):
    """All equations of a program, those inside its loops too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)
