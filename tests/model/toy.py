"""A model small enough to compile in a second, and data for it."""

import functools
from dataclasses import replace

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

from model.config import ModelConfig, OptimizerConfig
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


def equations(jaxpr):
    """All equations of a program, those inside its loops too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)
