"""Losses and their parts.

B batch, T tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.config import ModelConfig
from model.layers import Randomness
from model.quantizer import CodeStatistics
from model.transformer import Cache, bind


class Objective(NamedTuple):
    """What comes of a forward pass over an update's tokens besides the loss that is minimised."""

    nats: Float[Array, ""]
    """Negative log-likelihood, summed over the unmasked targets."""
    commitment: Float[Array, ""]
    """Squared distance of keys to codewords, summed over layers and heads, over the divisor."""
    cache: Cache
    statistics: CodeStatistics | None
    """None if keys are not quantised."""


def token_nats(
    logits: Float[Array, "B T vocab"],
    targets: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats, 0 where masked."""
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - target_logits
    return jnp.where(loss_mask, nats, 0)


def objective(
    params: dict,
    codebooks: dict,
    cache: Cache,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    divisor: Float[Array, ""],
    randomness: Randomness | None = None,
    *,
    config: ModelConfig,
) -> tuple[Float[Array, ""], Objective]:
    """The loss that training minimises: next-token nats plus the weighted commitment loss, both
    summed over the unmasked tokens and over `divisor`. MODEL.md section 1.4.
    """
    network = bind(config, params, codebooks)
    features, cache, statistics = network(
        inputs,
        cache,
        loss_mask=loss_mask,
        randomness=randomness,
        n_candidates=config.n_codes if config.revive_below else 0,
    )
    nats = jnp.sum(token_nats(network.logits(features), targets, loss_mask))
    squared_error = jnp.zeros((), nats.dtype) if statistics is None else statistics.squared_error
    commitment = jnp.sum(squared_error) / divisor
    loss = nats / divisor + config.commitment_weight * commitment
    return loss, Objective(nats, commitment, cache, statistics)
