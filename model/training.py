"""The train state, the training of one batch, and evaluation.

B batch, T tokens of a window, U tokens of an update, N = T/U updates of a batch.
"""

import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from model.accumulation import (
    MicroBatches,
    accumulated_gradients,
    initial_caches,
    merge_candidates,
    no_candidates,
    split_rows,
)
from model.config import (
    ConfigError,
    ModelConfig,
    OptimizerConfig,
    validate,
    validate_accumulation,
    validate_update_length,
)
from model.layers import Randomness
from model.optimizer import apply_gradients, make_optimizer
from model.quantizer import (
    Candidates,
    CodeStatistics,
    codebook_health,
    dead_codes,
    move_to_means,
    revive_codes,
    spread_centres,
    update_codebooks,
)
from model.scoring import token_scores
from model.stability import SpikeStatistics, judge, no_statistics
from model.transformer import Cache, bind, initial_cache, initial_network

UPDATE_STREAM, BATCH_STREAM, CODEBOOK_STREAM, SAMPLE_STREAM = 0, 1, 2, 3
"""Keys of random numbers that are drawn anew each update, once a batch, before the first, and by
what is written meanwhile."""

CANDIDATES_PER_CODE = 16
"""Keys of the first update over codewords that k-means is given, at most."""


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
    applied: Bool[Array, "*N"]
    """Whether the update moved anything: false for a spike, and from the first loss or gradient
    that is not finite to the end of the batch."""
    loss_spike_sigmas: Float[Array, "*N"]
    """Standard deviations of the loss above its moving mean; 0 while there is no mean."""
    skipped_updates: Int[Array, "*N"]
    """int32 updates skipped in the whole training so far."""
    skipped_in_a_row: Int[Array, "*N"]
    """int32 updates skipped since the last one that was applied."""
    codebook_perplexity: Float[Array, "*N"]
    codebook_usage: Float[Array, "*N"]
    """Fraction of the codes drawn."""
    relative_error: Float[Array, "*N"]
    """Distance of keys to their codewords over the keys' norm."""
    dead_codes: Float[Array, "*N"]
    """Codes of a codebook that the moving averages leave with a count below DEAD_BELOW, revived or
    not."""
    collapsed_layers: Int[Array, "*N"]
    """int32 layers with a codebook that all keys share a code or two of."""


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
    none = jnp.zeros((), jnp.int32)
    return TrainState(
        params=params,
        codebooks=codebooks,
        optimizer=make_optimizer(optimizer).init(params),
        updates=none,
        batches=none,
        key=jax.random.key_data(key),
        spikes=no_statistics(),
    )


def train_step(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    update_length: int,
    state: TrainState,
    batch: Batch,
    *,
    accumulate: int = 1,
    spike_deviations: float | None = None,
) -> tuple[TrainState, UpdateMetrics]:
    """Trains on one batch: N optimizer steps along its windows, the cache carried and gradients
    cut between them (MODEL.md section 1.6). The cache begins empty.

    Pure; meant for jit with all but `state` and `batch` bound and the state donated. Under sharded
    arguments its sums are over the global batch.

    Args:
        model, optimizer, update_length: of the recipe.
        state: before the batch.
        batch: its windows.
        accumulate: micro-batches that an update's rows are split into; they change nothing but the
            memory that it takes.
        spike_deviations: skip an update whose loss is so many deviations above the mean (`judge`).
    """
    B, T = batch.inputs.shape
    validate_update_length(T, update_length)
    validate_accumulation(B, accumulate, "the batch")

    def pieces(array: Array) -> Array:
        parts = split_rows(array, accumulate)
        return jnp.moveaxis(parts.reshape(*parts.shape[:2], -1, update_length), 2, 0)

    randomness = _randomness(state, split_rows(batch.rows, accumulate))
    step = functools.partial(_update, model, optimizer, spike_deviations, randomness)
    carry = (state, initial_caches(model, B, T, accumulate), jnp.ones((), bool))
    data = MicroBatches(pieces(batch.inputs), pieces(batch.targets), pieces(batch.loss_mask))
    (state, _, _), metrics = lax.scan(step, carry, data)
    return state._replace(batches=state.batches + 1), metrics


def go_on_from(earlier: TrainState, now: TrainState) -> TrainState:
    """The earlier state at the position of the present one: counters never go back."""
    spikes = earlier.spikes._replace(
        skipped=now.spikes.skipped, in_a_row=jnp.zeros_like(now.spikes.in_a_row)
    )
    return earlier._replace(updates=now.updates, batches=now.batches, spikes=spikes)


def _randomness(state: TrainState, rows: UInt[Array, "A b"]) -> Randomness:
    """That of a batch in micro-batches; its updates are yet to fold their number into `update`."""
    key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
    return Randomness(
        update=jax.random.fold_in(key, UPDATE_STREAM),
        batch=jax.random.fold_in(jax.random.fold_in(key, BATCH_STREAM), state.batches),
        rows=rows,
    )


def kmeans_codebooks(
    model: ModelConfig,
    update_length: int,
    state: TrainState,
    batch: Batch,
    *,
    accumulate: int = 1,
) -> TrainState:
    """The state with codebooks from k-means over keys that its next update will see, a random
    sample of its unmasked ones; meant for the first batch, before `train_step`.

    Layer after layer, as the keys of one depend on the codewords of those below. Each takes a
    forward pass through the whole network, so it costs as much as n_layers / 3 updates.
    Counts are 1, as in random codebooks. Pure; meant for jit with all but state and batch bound.
    """
    B, T = batch.inputs.shape
    validate_update_length(T, update_length)
    validate_accumulation(B, accumulate, "the batch")
    n_candidates = CANDIDATES_PER_CODE * model.n_codes
    inputs, loss_mask, rows = (
        split_rows(array, accumulate)
        for array in (
            batch.inputs[:, :update_length],
            batch.loss_mask[:, :update_length],
            batch.rows,
        )
    )
    randomness = _randomness(state, rows)
    randomness = randomness._replace(update=jax.random.fold_in(randomness.update, state.updates))
    key = jax.random.fold_in(
        jax.random.wrap_key_data(state.key, impl="threefry2x32"), CODEBOOK_STREAM
    )

    def cluster(layer: Int[Array, ""], codebooks: dict) -> dict:
        def draw(part: tuple[Array, Array, Array]) -> Candidates:
            inputs, loss_mask, rows = part
            statistics = bind(model, state.params, codebooks)(
                inputs,
                initial_cache(model, len(inputs)),
                loss_mask=loss_mask,
                randomness=randomness._replace(rows=rows),
                n_candidates=n_candidates,
            ).statistics
            # Because keys are quantised and there is a loss mask.
            assert statistics is not None
            assert statistics.candidates is not None
            return jax.tree.map(lambda leaf: leaf[layer], statistics.candidates)

        parts = (inputs, loss_mask, rows)
        none = no_candidates(
            jax.eval_shape(draw, jax.tree.map(lambda leaf: leaf[0], parts)),
            min(n_candidates, inputs.size),
        )
        candidates, _ = lax.scan(
            lambda drawn, part: (merge_candidates(drawn, draw(part)), None), none, parts
        )
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
    spike_deviations: float | None,
    randomness: Randomness,
    carry: tuple[TrainState, Cache, Bool[Array, ""]],
    batch: MicroBatches,
) -> tuple[tuple[TrainState, Cache, Bool[Array, ""]], UpdateMetrics]:
    """One optimizer step, or none if it is a spike or if it or an earlier one of the batch is not
    finite.

    What a spike's tokens left in the cache stays there: the tokens after them were written to be
    read after them. Of an update that is not finite, nothing stays.
    """
    state, caches, sound = carry
    tokens = jnp.sum(batch.loss_mask, dtype=jnp.int32)
    counted = tokens if optimizer.loss_divisor == "targets" else jnp.asarray(batch.inputs.size)
    divisor = jnp.maximum(counted, 1).astype(jnp.float32)

    randomness = randomness._replace(update=jax.random.fold_in(randomness.update, state.updates))
    gradients, parts = accumulated_gradients(
        model, state.params, state.codebooks, caches, batch, divisor, randomness
    )
    applied = apply_gradients(optimizer, state.params, state.optimizer, gradients, state.updates)
    loss = (parts.nats / jnp.maximum(tokens, 1)).astype(jnp.float32)
    sound = sound & jnp.isfinite(loss) & jnp.isfinite(applied.gradient_norm)
    spikes, verdict = judge(state.spikes, loss, sound, spike_deviations)
    codebooks, dead = _move_codebooks(model, state.codebooks, parts.statistics)

    def chosen(right: Bool[Array, ""], new: Any, old: Any) -> Any:
        return jax.tree.map(functools.partial(jnp.where, right), new, old)

    health = codebook_health(parts.statistics)
    metrics = UpdateMetrics(
        loss=loss,
        commitment=parts.commitment.astype(jnp.float32),
        tokens=tokens,
        gradient_norm=applied.gradient_norm.astype(jnp.float32),
        learning_rate=applied.learning_rate,
        applied=verdict.applied,
        loss_spike_sigmas=verdict.sigmas,
        skipped_updates=spikes.skipped,
        skipped_in_a_row=spikes.in_a_row,
        codebook_perplexity=health.perplexity.astype(jnp.float32),
        codebook_usage=health.usage.astype(jnp.float32),
        relative_error=health.relative_error.astype(jnp.float32),
        dead_codes=dead.astype(jnp.float32),
        collapsed_layers=health.collapsed_layers,
    )
    state = TrainState(
        params=chosen(verdict.applied, applied.params, state.params),
        codebooks=chosen(verdict.applied, codebooks, state.codebooks),
        optimizer=chosen(verdict.applied, applied.optimizer, state.optimizer),
        updates=state.updates + 1,
        batches=state.batches,
        key=state.key,
        spikes=spikes,
    )
    return (state, chosen(sound, parts.cache, caches), sound), metrics


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


def evaluation_step(
    model: ModelConfig, params: dict, codebooks: dict, batch: Batch
) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats, float32, 0 where masked.

    The cache begins empty and is carried along the window.
    """
    B, T = batch.inputs.shape
    cache = initial_cache(model, B, T)
    targets = (batch.inputs, batch.targets, batch.loss_mask)
    return token_scores(model, params, codebooks, cache, *targets).nats
