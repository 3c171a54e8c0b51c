"""Sampling: prompts read at once, then token after token with a state of constant size.

B batch, P prompt tokens, N new tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from model.config import EOS_ID, PAD_ID, UNK_ID, ConfigError, ModelConfig
from model.transformer import Cache, bind, initial_cache


class Filters(NamedTuple):
    """What a token is drawn from. Scalars, and traced ones: another value compiles nothing anew."""

    temperature: float | Float[Array, ""] = 1.0
    """Divides the logits. 0 takes the likeliest token, whatever the rest says."""
    top_k: int | Int[Array, ""] = 0
    """Draw from the k likeliest tokens; 0: from all."""
    top_p: float | Float[Array, ""] = 1.0
    """Draw from the smallest set of likeliest tokens with that probability (a nucleus)."""
    min_p: float | Float[Array, ""] = 0.0
    """Leave out tokens whose probability is below that share of the likeliest one's."""
    ignore_eos: bool | Bool[Array, ""] = False
    """Never draw eos, so that no row ends before its last token."""


class Prefilled(NamedTuple):
    """A prompt that was read, ready to be gone on from."""

    logits: Float[Array, "B vocab"]
    """Of the token after the prompt."""
    cache: Cache


class Decoded(NamedTuple):
    """What was drawn."""

    tokens: Int[Array, "B N"]
    """int32. A row that has drawn eos goes on with pad."""
    cache: Cache
    """Of all tokens but the last drawn; its length tells when the last row ended."""


_Carry = tuple[Int[Array, ""], Bool[Array, " B"], Decoded]
"""Tokens drawn so far, which rows have ended, and what was drawn."""


def prefill(
    model: ModelConfig,
    params: dict,
    codebooks: dict,
    prompt: Int[Array, "B P"],
    capacity: int | None = None,
) -> Prefilled:
    """Reads prompts of one length at once.

    `capacity` is the most tokens, prompt and new, that the cache has to hold: for a model that
    attends all keys, and of no effect on others.

    A prompt begins with eos, as every window that the model was trained on. Prompts of several
    lengths are several calls: the positions of a batch are the same in all rows. Meant for jit
    with `model` and `capacity` bound. Raises ConfigError for an empty prompt.
    """
    B, P = prompt.shape
    if P < 1:
        raise ConfigError("prefill: needs a prompt of at least one token, got none")
    network = bind(model, params, codebooks)
    features, cache, _ = network(prompt, initial_cache(model, B, capacity))
    return Prefilled(network.logits(features[:, -1:])[:, 0], cache)


def take_prompts(prefilled: Prefilled, prompts: Int[Array, " R"]) -> Prefilled:
    """R rows that each go on from the prompt of that number, which may be taken more than once."""
    logits, cache = prefilled

    def take(axis: int, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.take(leaf, prompts, axis), tree)

    layers = take(1, cache.layers)  # axis 0: the layers themselves
    documents = take(0, (cache.document, cache.document_start))
    return Prefilled(take(0, logits), Cache(layers, cache.length, *documents))


def decode(
    model: ModelConfig,
    params: dict,
    codebooks: dict,
    prefilled: Prefilled,
    rows: Int[Array, " B"],
    n_tokens: int,
    key: Array,
    filters: Filters,
) -> Decoded:
    """Draws up to N tokens for each row, until all rows have drawn eos.

    What row b draws depends on (key, rows[b], position), not on the other rows or their number.
    The work of a token does not depend on its position, which is part of the cache: one executable
    serves all. Meant for jit with `model` and `n_tokens` bound. Raises ConfigError if N < 1.
    """
    if n_tokens < 1:
        raise ConfigError(f"decode: needs n_tokens to be at least 1, got {n_tokens}")
    network = bind(model, params, codebooks)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)

    def draw(logits: Float[Array, "B vocab"], position: Int[Array, ""]) -> Int[Array, " B"]:
        own = jax.vmap(lambda key: jax.random.fold_in(key, position))(keys)
        return jax.vmap(jax.random.categorical)(own, filter_logits(logits, filters)).astype(
            jnp.int32
        )

    def unfinished(carry: _Carry) -> Bool[Array, ""]:
        n_drawn, ended, _ = carry
        return (n_drawn < n_tokens) & ~jnp.all(ended)

    def step(carry: _Carry) -> _Carry:
        n_drawn, ended, (tokens, cache) = carry
        last = lax.dynamic_slice_in_dim(tokens, n_drawn - 1, 1, axis=1)
        features, cache, _ = network(last, cache)
        token = draw(network.logits(features)[:, 0], cache.length)
        token = jnp.where(ended, PAD_ID, token)
        tokens = lax.dynamic_update_slice_in_dim(tokens, token[:, None], n_drawn, axis=1)
        return n_drawn + 1, ended | (token == EOS_ID), Decoded(tokens, cache)

    first = draw(prefilled.logits, prefilled.cache.length)
    tokens = jnp.full((len(rows), n_tokens), PAD_ID, jnp.int32).at[:, 0].set(first)
    begin = (jnp.ones((), jnp.int32), first == EOS_ID, Decoded(tokens, prefilled.cache))
    return lax.while_loop(unfinished, step, begin)[2]


def filter_logits(logits: Float[Array, "B vocab"], filters: Filters) -> Float[Array, "B vocab"]:
    """Logits to draw from, -inf for what is not to be drawn.

    In the usual order, each on what the one before it left, with probabilities that sum to 1 again:
    special tokens, temperature, top-k, top-p, min-p. A token is kept by top-k if fewer than k are
    likelier, and by top-p if those that are likelier have less than top_p together. So tokens that
    are as likely share their fate, and the likeliest is always kept. At temperature 0 only that
    one is, the first of several.
    """
    ids = jnp.arange(logits.shape[-1])
    never = (ids == PAD_ID) | (ids == UNK_ID) | ((ids == EOS_ID) & filters.ignore_eos)
    logits = jnp.where(never, -jnp.inf, logits)
    cold = jnp.asarray(filters.temperature) <= 0
    scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled /= jnp.where(cold, 1, filters.temperature)

    descending = jnp.sort(scaled, axis=-1, descending=True)
    kth = jnp.take(descending, jnp.clip(filters.top_k, 1, len(ids)) - 1, axis=-1)[:, None]
    least = jnp.where(jnp.asarray(filters.top_k) > 0, kth, -jnp.inf)

    probabilities = jax.nn.softmax(jnp.where(descending >= least, descending, -jnp.inf), axis=-1)
    likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The sum rounds: it may come to 1 before the last token.
    nucleus = (likelier < filters.top_p) | (jnp.asarray(filters.top_p) >= 1) | (ids == 0)
    least = jnp.maximum(
        least, jnp.min(jnp.where(nucleus, descending, jnp.inf), axis=-1, keepdims=True)
    )

    kept = (scaled >= least) & (jnp.exp(scaled) >= filters.min_p)
    kept = jnp.where(cold, ids == jnp.argmax(scaled, axis=-1, keepdims=True), kept)
    return jnp.where(kept, scaled, -jnp.inf)
