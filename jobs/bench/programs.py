"""What `tvq bench` times: one layer, or a whole training step, with each form of attention."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from jobs.bench.measurement import Program
from jobs.errors import UserError
from model.config import (
    N_SPECIAL,
    ModelConfig,
    OptimizerConfig,
    validate,
    validate_update_length,
)
from model.counts import flops_per_token

FORMS: Mapping[str, Mapping[str, Any]] = {
    "serial": {"quantized_keys": True, "attention_form": "serial"},
    "parallel": {"quantized_keys": True, "attention_form": "parallel"},
    "dense": {"quantized_keys": True, "attention_form": "dense"},
    "full-chunked": {"quantized_keys": False, "attention_form": "serial"},
    "full-dense": {"quantized_keys": False, "attention_form": "dense"},
}
"""What can be compared, by the fields in which it differs from the model that is named: attention
over quantised keys in its three forms; over the keys themselves, with an online softmax over chunks
that leaves out the masked half, and with all scores at once."""


class Geometry(NamedTuple):
    """What the programs are made of."""

    model: ModelConfig
    optimizer: OptimizerConfig
    batch_size: int
    """B: rows of T tokens."""
    update_length: int | None
    """U; None: T, one update a row."""


class RandomBatch(NamedTuple):
    """A batch of random tokens, each of them a target: `model.training.Batch`."""

    inputs: Any
    targets: Any
    loss_mask: Any
    rows: Any


def training_program(geometry: Geometry, form: str, length: int) -> Program:
    """The training step of a batch: forward, backward, optimizer, metrics.

    Raises:
        UserError, ConfigError: an unknown form, or a configuration that cannot work.
    """
    geometry = _of_form(geometry, form)
    model, optimizer = geometry.model, geometry.optimizer
    update_length = geometry.update_length or length
    validate_update_length(length, update_length)

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        from model.training import train_step

        return train_step(model, optimizer, update_length, state, batch)

    return Program(
        form=form,
        length=length,
        tokens=geometry.batch_size * length,
        flops_per_token=flops_per_token(model, length),
        function=step,
        begin=functools.partial(begin_training, geometry, length),
    )


def begin_training(geometry: Geometry, length: int) -> tuple[Any, RandomBatch]:
    """The state before the first batch, and a batch."""
    import jax
    import jax.numpy as jnp

    from model.training import initial_state

    model, shape = geometry.model, (geometry.batch_size, length + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, N_SPECIAL, model.vocab_size, jnp.int32)
    batch = RandomBatch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=jnp.ones((shape[0], length), bool),
        rows=jnp.arange(shape[0], dtype=jnp.uint32),
    )
    return initial_state(model, geometry.optimizer, 0), batch


def attention_program(geometry: Geometry, form: str, length: int) -> Program:
    """One layer, forward and backward: norm, projections, quantisation, attention, output.

    Without the embeddings, the output projection and the optimizer, which are the same in all
    forms; the gradient is that of a random projection of the layer's result. The result itself is
    not asked for, so the compiler leaves out the product that makes it, 2 DVG of what the formula
    says of a token (pg19: 16.8 of 202.0 MFLOP).

    Raises:
        UserError, ConfigError: an unknown form, or a configuration that cannot work.
    """
    geometry = _of_form(geometry, form)
    model = replace(geometry.model, n_layers=1)

    def step(state: Any, inputs: Any) -> tuple[Any, Any]:
        import jax

        params, codebooks = state
        hidden, cotangent = inputs
        layer = functools.partial(_layer, model, params, codebooks)
        _, pullback, rest = jax.vjp(layer, params["layers"], hidden, has_aux=True)
        return state, (pullback(cotangent), rest)

    return Program(
        form=form,
        length=length,
        tokens=geometry.batch_size * length,
        # What a layer adds to a network.
        flops_per_token=flops_per_token(replace(model, n_layers=2), length)
        - flops_per_token(model, length),
        function=step,
        begin=functools.partial(_begin_layer, model, geometry.batch_size, length),
    )


def _layer(model: ModelConfig, params: dict, codebooks: dict, layers: dict, hidden: Any) -> Any:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from model.transformer import bind, initial_cache

    network = bind(model, {**params, "layers": layers}, codebooks)
    graph, arrays = nnx.split(network.layers)
    unit = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], arrays))
    B, T, _ = hidden.shape
    cache = initial_cache(model, B, T)
    layer_cache = jax.tree.map(lambda leaf: leaf[0], cache.layers)
    mask = jnp.ones((B, T), bool)
    out, *rest = unit(hidden, layer_cache, cache.length, network.distances(), loss_mask=mask)
    return out, rest


def _begin_layer(model: ModelConfig, batch_size: int, length: int) -> tuple[Any, Any]:
    import jax

    from model.transformer import initial_network

    shape, keys = (batch_size, length, model.d_model), jax.random.split(jax.random.key(0), 3)
    hidden, cotangent = (jax.random.normal(key, shape, model.dtype) for key in keys[:2])
    return initial_network(model, keys[2]), (hidden, cotangent)


def _of_form(geometry: Geometry, form: str) -> Geometry:
    if form not in FORMS:
        raise UserError(f"--forms: unknown form {form!r}; expected some of {', '.join(FORMS)}")
    geometry = geometry._replace(model=replace(geometry.model, **FORMS[form]))
    validate(geometry.model, geometry.optimizer)
    return geometry
