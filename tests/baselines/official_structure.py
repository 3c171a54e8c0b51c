"""The training step as the official code arranges it, for our own to be timed against.

The mathematics is that of `model` (MODEL.md sections 1.2 to 1.5), on the same arrays; what differs
is the arrangement. A layer is one scan over blocks of L tokens that does everything inside: norm,
projections, the projection of the relative positions, quantisation, attention, output. Codes are
looked up and counted by one-hot products; scores of the window and of the cache, their
exponentials, sums and products are kept apart. Layers are unrolled, and recomputed in pairs.

    python -m tests.baselines.official_structure --length 8192

B batch, T tokens, N blocks, L block length, M window, W = M + L buffer columns, H heads, S codes,
K key width, V value width, D model width.
"""

import argparse
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jobs.bench.forms import describe, show
from jobs.bench.measurement import Program, compare
from jobs.bench.programs import Geometry, RandomBatch, begin_training, training_program
from jobs.console import Console
from jobs.training.host_memory import keep_freed_memory
from model.attention import LayerCache
from model.config import PRESETS, ModelConfig, OptimizerConfig
from model.counts import flops_per_token
from model.layers import parameter_dtype, root_mean_square_norm, sinusoids
from model.objective import token_nats
from model.optimizer import apply_gradients
from model.quantizer import SMALLEST_COUNT, CodeStatistics, update_codebooks
from model.training import TrainState
from model.transformer import Cache, Features, bind, initial_cache

BLOCK_LENGTH = 512
"""L of the paper's experiments."""


class Weights(NamedTuple):
    """A layer's arrays, arranged as the official code has them."""

    gain: Float[Array, " D"]
    bias: Float[Array, " D"]
    query: Float[Array, "D HK"]
    key_value_gate: Float[Array, "D HK+2HV"]
    output: Float[Array, "HV D"]
    distance: Float[Array, "D HK"]
    content_bias: Float[Array, "H K"]
    position_bias: Float[Array, "H K"]
    codewords: Float[Array, "H S K"]


def read(
    config: ModelConfig,
    params: dict,
    codebooks: dict,
    tokens: Int[Array, "B T"],
    cache: Cache,
    loss_mask: Bool[Array, "B T"],
    block_length: int = BLOCK_LENGTH,
) -> Features:
    """What `Transformer.__call__` computes, of T tokens that L divides.

    For gated units with a compressive cache, without dropouts, isolation or absolute positions, and
    an even number of layers.
    """
    network = bind(config, params, codebooks)
    x = network.embedding.table[...][tokens].astype(config.dtype)
    layers = [
        (_weights(config, params["layers"], codebooks["layers"], n), _layer_of(cache.layers, n))
        for n in range(config.n_layers)
    ]
    caches: list[LayerCache] = []
    statistics: list[CodeStatistics] = []
    for first, second in zip(layers[::2], layers[1::2], strict=True):
        pair = jax.checkpoint(functools.partial(_pair, config, block_length))
        x, out = pair(x, (first, second), cache.length, loss_mask)
        for layer_cache, layer_statistics in out:
            caches.append(layer_cache)
            statistics.append(layer_statistics)
    if config.output_norm:
        x = network.output_norm(x)
    after = cache._replace(layers=_stack(caches), length=cache.length + tokens.shape[1])
    return Features(x, after, _stack(statistics))


def _layer_of(tree: Any, layer: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[layer], tree)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _weights(config: ModelConfig, params: dict, codebooks: dict, layer: int) -> Weights:
    own, codebook = _layer_of(params, layer), _layer_of(codebooks["codebook"], layer)
    scale = config.d_key**-0.25
    counts = jnp.maximum(codebook["counts"], SMALLEST_COUNT)
    return Weights(
        own["norm"]["gain"],
        own["norm"]["bias"],
        own["query"],
        jnp.concatenate([own["key"], own["value"], own["gate"]], axis=1),
        own["output"],
        own["distance"],
        own["content_bias"].reshape(config.n_heads, -1) * scale,
        own["position_bias"].reshape(config.n_heads, -1) * scale,
        lax.stop_gradient(codebook["sums"] / counts[..., None]),
    )


def _pair(
    config: ModelConfig,
    block_length: int,
    x: Float[Array, "B T D"],
    layers: tuple[tuple[Weights, LayerCache], tuple[Weights, LayerCache]],
    length: Int[Array, ""],
    loss_mask: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T D"], list[tuple[LayerCache, CodeStatistics]]]:
    blocks = _to_blocks(x, block_length)
    masks = _to_blocks(loss_mask, block_length)
    out = []
    for weights, cache in layers:
        step = functools.partial(_block, config, weights)
        (cache, _), (added, statistics) = lax.scan(step, (cache, length), (blocks, masks))
        blocks += added
        out.append((cache, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), statistics)))
    return jnp.moveaxis(blocks, 0, 1).reshape(x.shape), out


def _to_blocks(array: Array, block_length: int) -> Array:
    B, T, *rest = array.shape
    return jnp.moveaxis(array.reshape(B, T // block_length, block_length, *rest), 1, 0)


def _block(
    config: ModelConfig,
    weights: Weights,
    carry: tuple[LayerCache, Int[Array, ""]],
    block: tuple[Float[Array, "B L D"], Bool[Array, "B L"]],
) -> tuple[tuple[LayerCache, Int[Array, ""]], tuple[Float[Array, "B L D"], CodeStatistics]]:
    """One block of one layer, from the residual stream to what is added to it."""
    cache, length = carry
    x, mask = block
    L, M, D = x.shape[1], config.window, config.d_model
    H, K, V = config.n_heads, config.d_key, config.d_value
    scale, wide, dtype = K**-0.25, parameter_dtype(config), x.dtype
    assert cache.codes is not None
    assert cache.counts is not None
    assert cache.means is not None

    def heads(array: Float[Array, "B L HX"]) -> Float[Array, "B H L X"]:
        return jnp.moveaxis(array.reshape(*array.shape[:2], H, -1), 2, 1)

    # ---- Projections -----------------------------------------------------------------------------
    normed = (root_mean_square_norm(x, wide) * weights.gain + weights.bias).astype(dtype)
    queries = heads(jnp.einsum("bld,de->ble", normed, weights.query.astype(dtype)))
    queries = root_mean_square_norm(queries, wide) * scale
    merged = jnp.einsum("bld,de->ble", normed, weights.key_value_gate.astype(dtype))
    new_keys, new_values, gate = jnp.split(merged, [H * K, H * (K + V)], axis=-1)
    new_keys = root_mean_square_norm(heads(new_keys), wide) * scale
    new_values, gate = jax.nn.silu(heads(new_values)), jax.nn.silu(gate)

    # ---- Quantisation ----------------------------------------------------------------------------
    norms = jnp.sum(new_keys**2, axis=-1, keepdims=True)
    products = jnp.einsum("bhlk,hsk->bhls", new_keys, weights.codewords)
    distances = norms - 2 * products + jnp.sum(weights.codewords**2, axis=-1)[None, :, None]
    new_codes = jnp.argmin(lax.stop_gradient(distances), axis=-1).astype(jnp.int32)
    squared = jax.nn.relu(jnp.min(distances, axis=-1))
    drawn = jax.nn.one_hot(new_codes, config.n_codes, dtype=wide)
    nearest = jnp.einsum("bhls,hsk->bhlk", drawn, weights.codewords)
    statistics = _statistics(new_keys, drawn, squared, mask)
    new_keys = lax.stop_gradient(nearest) + (new_keys - lax.stop_gradient(new_keys))

    # ---- Scores: of the window, with positions, and of the cache ---------------------------------
    keys = jnp.concatenate([cache.keys, new_keys], axis=2)
    values = jnp.concatenate([cache.values, new_values], axis=2)
    codes = jnp.concatenate([cache.codes, new_codes], axis=2)
    row, column = jnp.arange(L)[:, None], jnp.arange(M + L)[None, :]
    table = sinusoids(jnp.arange(M + L), D, config.position_base, wide)[::-1].astype(dtype)
    table = jnp.einsum("wd,de->we", table, weights.distance.astype(dtype)).reshape(M + L, H, K)
    position = jnp.einsum("bhlk,whk->bhlw", queries + weights.position_bias[:, None], table * scale)
    content = queries + weights.content_bias[:, None]
    recent = jnp.einsum("bhlk,bhwk->bhlw", content, keys)
    in_window = (column >= row) & (column <= M + row)
    recent += jnp.where(in_window, _relative_shift(position), 0)
    allocated = column >= jax.nn.relu(M - length)
    recent = jnp.where((column <= M + row) & allocated, recent, -1e30)
    old = jnp.einsum("bhlk,hsk->bhls", content, weights.codewords)
    bias = jnp.where(cache.counts > 0, jnp.log(jnp.maximum(cache.counts, 1)), -1e30)
    old += bias[:, :, None]

    # ---- Weighted values, divided before they are summed -----------------------------------------
    most = jnp.maximum(jnp.max(recent, axis=-1), jnp.max(old, axis=-1))[..., None]
    recent = jnp.exp(recent - lax.stop_gradient(most)).astype(dtype)
    old = jnp.exp(old - lax.stop_gradient(most)).astype(dtype)
    total = jnp.sum(recent, axis=-1, keepdims=True) + jnp.sum(old, axis=-1, keepdims=True)
    mixed = jnp.einsum("bhlw,bhwv->bhlv", recent / total, values)
    mixed += jnp.einsum("bhls,bhsv->bhlv", old / total, cache.means.astype(dtype))
    added = jnp.moveaxis(mixed, 1, 2).reshape(gate.shape) * gate
    added = jnp.einsum("ble,ed->bld", added, weights.output.astype(dtype))

    # ---- The cache after the block ---------------------------------------------------------------
    leaving = jax.nn.one_hot(codes[:, :, :L], config.n_codes, dtype=wide)
    counts = cache.counts + jnp.sum(leaving, axis=2)
    divisor = jnp.maximum(counts, 1)
    share = jnp.einsum("bhls,bhlv->bhsv", leaving / divisor[:, :, None], values[:, :, :L])
    cache = cache._replace(
        keys=keys[:, :, L:],
        values=values[:, :, L:],
        codes=codes[:, :, L:],
        counts=counts,
        means=(cache.counts / divisor)[..., None] * cache.means + share,
    )
    return (cache, length + L), (added, statistics)


def _relative_shift(scores: Float[Array, "B H L W"]) -> Float[Array, "B H L W"]:
    """From distance W - 1 - c in column c to distance M + i - j in column j of row i: a column of
    zeros in front, read as W + 1 rows of L, without the first (Dai et al. 2019)."""
    B, H, L, W = scores.shape
    padded = jnp.pad(scores, [(0, 0), (0, 0), (0, 0), (1, 0)])
    return padded.reshape(B, H, W + 1, L)[:, :, 1:].reshape(B, H, L, W)


def _statistics(
    keys: Float[Array, "B H L K"],
    drawn: Float[Array, "B H L S"],
    squared: Float[Array, "B H L"],
    mask: Bool[Array, "B L"],
) -> CodeStatistics:
    counted = mask[:, None, :].astype(keys.dtype)
    keys, squared, drawn = lax.stop_gradient(keys), squared * counted, drawn * counted[..., None]
    norms = jnp.maximum(jnp.linalg.norm(keys, axis=-1), 1e-9)
    return CodeStatistics(
        sums=jnp.einsum("bhls,bhlk->hsk", drawn, keys),
        counts=jnp.einsum("bhls->hs", drawn),
        squared_error=jnp.sum(squared),
        relative_error=jnp.sum(jnp.sqrt(lax.stop_gradient(squared)) / norms),
    )


def loss(
    params: dict,
    codebooks: dict,
    batch: Any,
    *,
    config: ModelConfig,
    block_length: int = BLOCK_LENGTH,
) -> tuple[Float[Array, ""], CodeStatistics]:
    """The loss of a batch that training minimises, from an empty cache."""
    cache = initial_cache(config, batch.inputs.shape[0])
    features, _, statistics = read(
        config, params, codebooks, batch.inputs, cache, batch.loss_mask, block_length
    )
    assert statistics is not None
    logits = bind(config, params, codebooks).logits(features)
    divisor = jnp.maximum(jnp.sum(batch.loss_mask), 1)
    nats = jnp.sum(token_nats(logits, batch.targets, batch.loss_mask)) / divisor
    commitment = jnp.sum(statistics.squared_error) / divisor
    return nats + config.commitment_weight * commitment, statistics


def train_step(
    config: ModelConfig,
    optimizer: OptimizerConfig,
    block_length: int,
    state: TrainState,
    batch: Any,
) -> tuple[TrainState, Float[Array, ""]]:
    """One update over the whole batch: forward, backward, AdamW, codebooks."""
    differentiate = jax.value_and_grad(
        functools.partial(loss, config=config, block_length=block_length), has_aux=True
    )
    (value, statistics), gradients = differentiate(state.params, state.codebooks, batch)
    applied = apply_gradients(optimizer, state.params, state.optimizer, gradients, state.updates)
    moved = state._replace(
        params=applied.params,
        optimizer=applied.optimizer,
        codebooks=update_codebooks(state.codebooks, statistics, config.codebook_decay),
        updates=state.updates + 1,
    )
    return moved, value


def official_program(geometry: Geometry, length: int, block_length: int = BLOCK_LENGTH) -> Program:
    """The official structure's training step, as a program to time."""
    # Its block is as long as its arrangement has it; FLOPs are counted with that.
    model = replace(geometry.model, block_length=None, gradient_block=block_length)

    def step(state: TrainState, batch: RandomBatch) -> tuple[TrainState, Array]:
        return train_step(model, geometry.optimizer, block_length, state, batch)

    return Program(
        form="official",
        length=length,
        tokens=geometry.batch_size * length,
        flops_per_token=flops_per_token(model, length),
        function=step,
        begin=functools.partial(begin_training, geometry, length),
    )


def main() -> None:
    """Times the official structure against our training step in its default form."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--length", type=int, default=8192, help="T, a multiple of 512")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--preset", default="small", choices=PRESETS)
    options = parser.parse_args()
    model = PRESETS[options.preset]
    optimizer = OptimizerConfig(schedule="constant")
    geometry, console = Geometry(model, optimizer, 1, None), Console()
    programs = [
        official_program(geometry, options.length),
        training_program(geometry, model.attention_form, options.length),
    ]
    keep_freed_memory()
    describe(console, "train", options.preset, geometry, options.rounds)
    console.line(f"official  its structure, blocks of {BLOCK_LENGTH}, layers recomputed in pairs")
    show(
        console,
        compare(programs, rounds=options.rounds, seconds=0.5, dtype=model.dtype, console=console),
    )


if __name__ == "__main__":
    main()
