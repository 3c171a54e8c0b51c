"""What is left out so that one bad update does not spoil a training.

Decided inside the step from sums over the global batch, so that all devices decide alike and the
host learns of it with the other metrics, a batch late.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SPIKE_MEMORY = 100
"""Updates that the loss's moving mean and variance look back; no spike is called one before as many
were seen, because the first losses fall too fast for a mean of theirs to say what comes next."""


class SpikeStatistics(NamedTuple):
    """The recent course of the loss, and what was left out of it."""

    mean: Float[Array, ""]
    """Moving mean of the loss, nats per token."""
    variance: Float[Array, ""]
    """Moving variance of the loss around that mean."""
    seen: Int[Array, ""]
    """int32 updates in them."""
    skipped: Int[Array, ""]
    """int32 updates that were skipped: as not finite or after one that was, in their batch, or as a
    spike."""
    in_a_row: Int[Array, ""]
    """int32 updates skipped since the last one that was not."""


class Verdict(NamedTuple):
    """What was found of an update."""

    applied: Bool[Array, ""]
    """Whether it moves parameters, optimizer and codebooks."""
    sigmas: Float[Array, ""]
    """Standard deviations of its loss above the moving mean; 0 while there is no mean."""


def no_statistics() -> SpikeStatistics:
    """Those before the first update."""
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return SpikeStatistics(mean=zero, variance=zero, seen=none, skipped=none, in_a_row=none)


def judge(
    spikes: SpikeStatistics,
    loss: Float[Array, ""],
    sound: Bool[Array, ""],
    spike_deviations: float | None,
) -> tuple[SpikeStatistics, Verdict]:
    """Whether an update is applied, and the statistics after it.

    Args:
        spikes: the statistics before it.
        loss: nats per token, float32.
        sound: whether it and the updates of its batch before it are finite.
        spike_deviations: a loss so many standard deviations above the mean is a spike; None: none
            is. What is skipped stays out of the statistics: else a spike would hide the next.
    """
    difference = loss - spikes.mean
    deviation = jnp.sqrt(spikes.variance)
    sigmas = jnp.where(deviation > 0, difference / jnp.maximum(deviation, 1e-30), 0)
    applied = sound
    if spike_deviations is not None:
        known = spikes.seen >= SPIKE_MEMORY
        applied = sound & ~(known & (sigmas > spike_deviations))
    # A plain mean and variance to begin with, then moving ones.
    weight = 1 / jnp.minimum(spikes.seen + 1, SPIKE_MEMORY).astype(jnp.float32)
    with_it = SpikeStatistics(
        mean=spikes.mean + weight * difference,
        variance=(1 - weight) * (spikes.variance + weight * difference**2),
        seen=spikes.seen + 1,
        skipped=spikes.skipped,
        in_a_row=jnp.zeros_like(spikes.in_a_row),
    )
    without_it = spikes._replace(skipped=spikes.skipped + 1, in_a_row=spikes.in_a_row + 1)
    after = jax.tree.map(lambda new, old: jnp.where(applied, new, old), with_it, without_it)
    return after, Verdict(applied, sigmas)
