"""What a network gives each token of a text: its nats, and whether it was the likeliest.

B batch, T tokens, D model width.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from model.config import ModelConfig
from model.objective import token_nats
from model.transformer import Cache, bind

LOGITS_AT_ONCE = 2**24
"""Logits of the global batch that are held at a time (64 MiB in float32), unless those of a single
position are more."""


class TokenScores(NamedTuple):
    """Of each target of a batch."""

    nats: Float[Array, "B T"]
    """float32 negative log-likelihood, 0 where masked."""
    correct: Bool[Array, "B T"]
    """Whether no other token has a greater probability (of equal ones the first counts); false
    where masked."""
    cache: Cache
    """To go on with at the tokens that follow."""


def token_scores(
    model: ModelConfig,
    params: dict,
    codebooks: dict,
    cache: Cache,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
) -> TokenScores:
    """Scores T targets whose inputs follow the tokens in the cache.

    A long text is scored piece by piece with the cache handed on: its size is constant unless the
    network attends all keys. Logits are made and used in pieces of positions, LOGITS_AT_ONCE.
    """
    B, T = inputs.shape
    network = bind(model, params, codebooks)
    features, cache, _ = network(inputs, cache)
    n_pieces = -(-T // max(1, LOGITS_AT_ONCE // (B * model.vocab_size)))
    length = -(-T // n_pieces)

    def pieces(array: Array) -> Array:
        array = jnp.pad(array, [(0, 0), (0, n_pieces * length - T)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(array.reshape(B, n_pieces, length, *array.shape[2:]), 1, 0)

    def whole(array: Array) -> Array:
        return jnp.moveaxis(array, 0, 1).reshape(B, -1)[:, :T]

    def score(piece: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        features, targets, loss_mask = piece
        logits = network.logits(features)
        likeliest = jnp.argmax(logits, axis=-1)
        return token_nats(logits, targets, loss_mask), (likeliest == targets) & loss_mask

    nats, correct = lax.map(score, (pieces(features), pieces(targets), pieces(loss_mask)))
    return TokenScores(whole(nats).astype(jnp.float32), whole(correct), cache)
