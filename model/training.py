"""The train state, the training of one batch, and evaluation.

B batch, T tokens of a window, U tokens of an update, N = T/U updates of a batch.
"""

import functools
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from model.config import ConfigError, ModelConfig, OptimizerConfig, validate, validate_update_length
from model.layers import Randomness
from model.objective import objective, token_nats
from model.optimizer import apply_gradients, make_optimizer
from model.quantizer import (
    CodeStatistics,
    codebook_health,
    dead_codes,
    move_to_means,
    revive_codes,
    spread_centres,
    update_codebooks,
)
from model.transformer import Cache, bind, initial_cache, initial_network

UPDATE_STREAM, BATCH_STREAM, CODEBOOK_STREAM = 0, 1, 2
"""Keys of random numbers that are drawn anew each update, once a batch, and before the first."""

CANDIDATES_PER_CODE = 16
"""Keys of the first update over codewords that k-means is given, at most."""

LOGITS_AT_ONCE = 2**24
"""Logits of the global batch that an evaluation holds at a time (64 MiB in float32), unless those
of a single position are more."""

SPIKE_MEMORY = 100
"""Updates that the loss's moving mean and variance look back."""


@runtime_checkable
class Batch(Protocol):
    """What a batch of windows has; the loader's NamedTuple of arrays is one."""

    @property
    def inputs(self) -> Int[Array, "B T"]:
        """int32 tokens that the model reads."""
        ...

    @property
    def targets(self) -> Int[Array, "B T"]:
        """int32 tokens that it predicts."""
        ...

    @property
    def loss_mask(self) -> Bool[Array, "B T"]:
        """Where a target counts."""
        ...

    @property
    def rows(self) -> UInt[Array, " B"]:
        """uint32 numbers of the rows in the training's endless sequence; dropouts read them."""
        ...


class SpikeStatistics(NamedTuple):
    """The recent course of the loss, and what was left out of it."""

    mean: Float[Array, ""]
    """Moving mean of the loss, nats per token."""
    variance: Float[Array, ""]
    """Moving variance of the loss around that mean."""
    seen: Int[Array, ""]
    """int32 updates in them."""
    skipped: Int[Array, ""]
    """int32 updates that were skipped as not finite, or after one that was, in their batch."""


class TrainState(NamedTuple):
    """Everything that training goes on from."""

    params: dict
    codebooks: dict
    optimizer: optax.OptState
    updates: Int[Array, ""]
    """int32 updates so far, skipped ones included: the axis of schedule and metrics."""
    batches: Int[Array, ""]
    """int32 batches so far: the position of the input."""
    key: UInt[Array, "2"]
    """Threefry key of the run."""
    spikes: SpikeStatistics


class UpdateMetrics(NamedTuple):
    """Figures of each update of a batch: arrays [N]."""

    loss: Float[Array, "*N"]
    """Nats per unmasked token."""
    commitment: Float[Array, "*N"]
    """Commitment loss, before its weight."""
    tokens: Int[Array, "*N"]
    """int32 unmasked tokens."""
    gradient_norm: Float[Array, "*N"]
    """Global norm before clipping."""
    learning_rate: Float[Array, "*N"]
    finite: Bool[Array, "*N"]
    """Whether the update was applied: false from the first loss or gradient that is not finite to
    the end of the batch."""
    loss_spike_sigmas: Float[Array, "*N"]
    """Standard deviations of the loss above its moving mean; 0 while there is no mean."""
    skipped_updates: Int[Array, "*N"]
    """int32 updates skipped in the whole training so far."""
    codebook_perplexity: Float[Array, "*N"]
    codebook_usage: Float[Array, "*N"]
    """Fraction of the codes drawn."""
    relative_error: Float[Array, "*N"]
    """Distance of keys to their codewords over the keys' norm."""
    dead_codes: Float[Array, "*N"]
    """Codes of a codebook that the moving averages leave with a count below DEAD_BELOW, revived or
    not."""


def initial_state(
    model: ModelConfig, optimizer: OptimizerConfig, seed: int | Int[Array, ""]
) -> TrainState:
    """The state before the first batch. Raises ConfigError naming a field that cannot work."""
    validate(model, optimizer)
    if model.dtype == "float64" and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ConfigError(
            "model.dtype: float64 needs the environment variable JAX_ENABLE_X64=1, got it off"
        )
    key = jax.random.key(seed, impl="threefry2x32")
    params, codebooks = initial_network(model, key)
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return TrainState(
        params=params,
        codebooks=codebooks,
        optimizer=make_optimizer(optimizer).init(params),
        updates=none,
        batches=none,
        key=jax.random.key_data(key),
        spikes=SpikeStatistics(mean=zero, variance=zero, seen=none, skipped=none),
    )


def train_step(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    update_length: int,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, UpdateMetrics]:
    """Trains on one batch: N optimizer steps along its windows, the cache carried and gradients
    cut between them (MODEL.md section 1.6). The cache begins empty.

    Pure; meant for jit with the first three arguments bound and the state donated. Under sharded
    arguments its sums are over the global batch.
    """
    B, T = batch.inputs.shape
    validate_update_length(T, update_length)

    def pieces(array: Array) -> Array:
        return jnp.moveaxis(array.reshape(B, T // update_length, update_length), 1, 0)

    randomness = _randomness(state, batch.rows)
    step = functools.partial(_update, model, optimizer, randomness)
    carry = (state, initial_cache(model, B, T), jnp.ones((), bool))
    data = (pieces(batch.inputs), pieces(batch.targets), pieces(batch.loss_mask))
    (state, _, _), metrics = lax.scan(step, carry, data)
    return state._replace(batches=state.batches + 1), metrics


def _randomness(state: TrainState, rows: UInt[Array, " B"]) -> Randomness:
    """That of a batch; its updates are yet to fold their number into `update`."""
    key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
    return Randomness(
        update=jax.random.fold_in(key, UPDATE_STREAM),
        batch=jax.random.fold_in(jax.random.fold_in(key, BATCH_STREAM), state.batches),
        rows=rows,
    )


def kmeans_codebooks(
    model: ModelConfig, update_length: int, state: TrainState, batch: Batch
) -> TrainState:
    """The state with codebooks from k-means over keys that its next update will see, a random
    sample of its unmasked ones; meant for the first batch, before `train_step`.

    Layer after layer, as the keys of one depend on the codewords of those below. Each takes a
    forward pass through the whole network, so it costs as much as n_layers / 3 updates.
    Counts are 1, as in random codebooks. Pure; meant for jit with the first two arguments bound.
    """
    B, T = batch.inputs.shape
    validate_update_length(T, update_length)
    inputs, loss_mask = (a[:, :update_length] for a in (batch.inputs, batch.loss_mask))
    randomness = _randomness(state, batch.rows)
    randomness = randomness._replace(update=jax.random.fold_in(randomness.update, state.updates))
    key = jax.random.fold_in(
        jax.random.wrap_key_data(state.key, impl="threefry2x32"), CODEBOOK_STREAM
    )

    def cluster(layer: Int[Array, ""], codebooks: dict) -> dict:
        statistics = bind(model, state.params, codebooks)(
            inputs,
            initial_cache(model, B),
            loss_mask=loss_mask,
            randomness=randomness,
            n_candidates=CANDIDATES_PER_CODE * model.n_codes,
        ).statistics
        assert statistics is not None  # because keys are quantised and there is a loss mask
        candidates = jax.tree.map(lambda leaf: leaf[layer], statistics.candidates)
        centres = spread_centres(candidates, model.n_codes, jax.random.fold_in(key, layer))
        centres = move_to_means(centres, candidates, model.kmeans_iterations)
        old = codebooks["layers"]["codebook"]
        new = {
            "sums": old["sums"].at[layer].set(centres),
            "counts": old["counts"].at[layer].set(1),
        }
        return {"layers": {"codebook": new}}

    return state._replace(codebooks=lax.fori_loop(0, model.n_layers, cluster, state.codebooks))


def _update(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    randomness: Randomness,
    carry: tuple[TrainState, Cache, Bool[Array, ""]],
    data: tuple[Int[Array, "B U"], Int[Array, "B U"], Bool[Array, "B U"]],
) -> tuple[tuple[TrainState, Cache, Bool[Array, ""]], UpdateMetrics]:
    """One optimizer step, or none if it or an earlier one of the batch is not finite."""
    state, cache, sound = carry
    inputs, targets, loss_mask = data
    tokens = jnp.sum(loss_mask, dtype=jnp.int32)
    counted = tokens if optimizer.loss_divisor == "targets" else jnp.asarray(inputs.size)
    divisor = jnp.maximum(counted, 1).astype(jnp.float32)

    randomness = randomness._replace(update=jax.random.fold_in(randomness.update, state.updates))
    differentiate = jax.value_and_grad(functools.partial(objective, config=model), has_aux=True)
    (_, parts), gradients = differentiate(
        state.params, state.codebooks, cache, inputs, targets, loss_mask, divisor, randomness
    )
    applied = apply_gradients(optimizer, state.params, state.optimizer, gradients, state.updates)
    loss = (parts.nats / jnp.maximum(tokens, 1)).astype(jnp.float32)
    sound = sound & jnp.isfinite(loss) & jnp.isfinite(applied.gradient_norm)
    spikes, sigmas = _watch(state.spikes, loss, sound)
    codebooks, dead = _move_codebooks(model, state.codebooks, parts.statistics)
    moved = (applied.params, applied.optimizer, codebooks, parts.cache)
    kept = (state.params, state.optimizer, state.codebooks, cache)
    params, optimizer_state, codebooks, cache = jax.tree.map(
        lambda new, old: jnp.where(sound, new, old), moved, kept
    )
    health = codebook_health(parts.statistics)
    metrics = UpdateMetrics(
        loss=loss,
        commitment=parts.commitment.astype(jnp.float32),
        tokens=tokens,
        gradient_norm=applied.gradient_norm.astype(jnp.float32),
        learning_rate=applied.learning_rate,
        finite=sound,
        loss_spike_sigmas=sigmas,
        skipped_updates=spikes.skipped,
        codebook_perplexity=health.perplexity.astype(jnp.float32),
        codebook_usage=health.usage.astype(jnp.float32),
        relative_error=health.relative_error.astype(jnp.float32),
        dead_codes=dead.astype(jnp.float32),
    )
    state = state._replace(
        params=params,
        codebooks=codebooks,
        optimizer=optimizer_state,
        updates=state.updates + 1,
        spikes=spikes,
    )
    return (state, cache, sound), metrics


def _move_codebooks(
    model: ModelConfig, codebooks: dict, statistics: CodeStatistics | None
) -> tuple[dict, Float[Array, ""]]:
    """The codebooks after an update, and how many codes its moving averages left dead."""
    if statistics is None:
        return codebooks, jnp.zeros(())
    codebooks = update_codebooks(codebooks, statistics, model.codebook_decay)
    dead = dead_codes(codebooks)
    if model.revive_below:
        assert statistics.candidates is not None  # because the objective asks for them
        codebooks = revive_codes(codebooks, statistics.candidates, model.revive_below)
    return codebooks, dead


def _watch(
    spikes: SpikeStatistics, loss: Float[Array, ""], sound: Bool[Array, ""]
) -> tuple[SpikeStatistics, Float[Array, ""]]:
    """The statistics after an update, and how far the loss lay above them before it."""
    difference = loss - spikes.mean
    deviation = jnp.sqrt(spikes.variance)
    sigmas = jnp.where(deviation > 0, difference / jnp.maximum(deviation, 1e-30), 0)
    # A plain mean and variance to begin with, then moving ones.
    weight = 1 / jnp.minimum(spikes.seen + 1, SPIKE_MEMORY).astype(jnp.float32)
    with_it = SpikeStatistics(
        mean=spikes.mean + weight * difference,
        variance=(1 - weight) * (spikes.variance + weight * difference**2),
        seen=spikes.seen + 1,
        skipped=spikes.skipped,
    )
    without_it = spikes._replace(skipped=spikes.skipped + 1)
    return jax.tree.map(lambda new, old: jnp.where(sound, new, old), with_it, without_it), sigmas


def evaluation_step(
    model: ModelConfig, params: dict, codebooks: dict, batch: Batch
) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats, float32, 0 where masked.

    The cache begins empty and is carried along the window. Logits are made and used in pieces of
    positions, LOGITS_AT_ONCE.
    """
    B, T = batch.inputs.shape
    network = bind(model, params, codebooks)
    features = network(batch.inputs, initial_cache(model, B, T)).features
    n_pieces = -(-T // max(1, LOGITS_AT_ONCE // (B * model.vocab_size)))
    length = -(-T // n_pieces)

    def pieces(array: Array) -> Array:
        array = jnp.pad(array, [(0, 0), (0, n_pieces * length - T)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(array.reshape(B, n_pieces, length, *array.shape[2:]), 1, 0)

    nats = lax.map(
        lambda piece: token_nats(network.logits(piece[0]), *piece[1:]),
        (pieces(features), pieces(batch.targets), pieces(batch.loss_mask)),
    )
    return jnp.moveaxis(nats, 0, 1).reshape(B, -1)[:, :T].astype(jnp.float32)
