"""Attention over vector-quantised keys: what every form takes and gives, and its dense definition.

A query at position i attends every position j <= i by a softmax over

    (q_i + u) . k_j  +  [i - j <= M] (q_i + w) . r_{i-j}

where k_j is a codeword (MODEL.md sections 1.3 and 1.5). Keys that are far are one of S codewords
and carry no position, so all those of one code have one score: `block_attention` keeps their number
and the mean of their values instead of them. Without quantisation k_j is the key itself and every
pair of positions is scored (`full_attention`).

B batch, T tokens, H key and value heads, R query heads to each of them, M window,
P = M + 1 distances, S codes, K key width, V value width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

NO_DOCUMENT = -1
"""Document of a place that holds no token yet."""


class Projections(NamedTuple):
    """What attention reads of the tokens."""

    queries: Float[Array, "B H R T K"]
    keys: Float[Array, "B H T K"]
    """Codewords if quantised: the straight-through gradient reaches the keys behind them."""
    values: Float[Array, "B H T V"]
    codes: Int[Array, "B H T"] | None
    """int32 index of each key's codeword; None if keys are not quantised."""
    documents: Int[Array, "B T"] | None
    """int32 number of each token's document, never falling; None: nothing is isolated."""


class Scoring(NamedTuple):
    """What attention scores with, the same for all tokens. M is known from `distances`."""

    codewords: Float[Array, "H S K"] | None
    """None if keys are not quantised."""
    content_bias: Float[Array, "H R K"]
    """u: added to queries before they meet keys."""
    position_bias: Float[Array, "H R K"]
    """w: added to queries before they meet distances."""
    distances: Float[Array, "H P K"]
    """r: one vector a distance, 0 to M."""

    @property
    def window(self) -> int:
        """M: the farthest distance that has a vector."""
        return self.distances.shape[1] - 1


class LayerCache(NamedTuple):
    """What a layer remembers of earlier tokens. Constants to the gradient.

    Of block attention C = M: the last M tokens, the newest last; of constant size. Of full
    attention: all tokens, each at its position, C of them at most.
    `codes`, `counts` and `means` are None without the compressive cache, and `documents` and
    `counted_document` unless documents are isolated.
    """

    keys: Float[Array, "*layers B H C K"]
    values: Float[Array, "*layers B H C V"]
    codes: Int[Array, "*layers B H C"] | None
    """int32, S where there was no token yet."""
    counts: Float[Array, "*layers B H S"] | None
    """Tokens older than the window by code. Never narrower than float32: bfloat16 stops at 256."""
    means: Float[Array, "*layers B H S V"] | None
    """Mean value of those tokens, or 0."""
    documents: Int[Array, "*layers B C"] | None
    """int32, NO_DOCUMENT where there was no token yet."""
    counted_document: Int[Array, "*layers B"] | None
    """int32 document of the tokens in `counts`: the newest that is older than the window."""


def empty_cache(
    shape: tuple[int, ...],
    *,
    capacity: int,
    n_codes: int | None,
    d_key: int,
    d_value: int,
    isolated: bool,
    dtype: jnp.dtype,
    statistics_dtype: jnp.dtype,
) -> LayerCache:
    """The cache before the first token.

    `shape` is (B, H), with a layer axis before it or not; without `n_codes` there is no compressive
    cache.
    """

    def documents(*sizes: int) -> Int[Array, "..."] | None:
        return jnp.full((*shape[:-1], *sizes), NO_DOCUMENT, jnp.int32) if isolated else None

    compressive = n_codes is not None
    return LayerCache(
        keys=jnp.zeros((*shape, capacity, d_key), statistics_dtype),
        values=jnp.zeros((*shape, capacity, d_value), dtype),
        codes=jnp.full((*shape, capacity), n_codes, jnp.int32) if compressive else None,
        counts=jnp.zeros((*shape, n_codes), statistics_dtype) if compressive else None,
        means=jnp.zeros((*shape, n_codes, d_value), statistics_dtype) if compressive else None,
        documents=documents(capacity),
        counted_document=documents() if compressive else None,
    )


def attend_dense(
    tokens: Projections,
    scoring: Scoring,
    *,
    compressive_cache: bool = True,
    call_starts: Int[Array, " T"] | None = None,
    block_starts: Int[Array, " T"] | None = None,
    gradient_through_cache: bool = True,
) -> Float[Array, "B H R T V"]:
    """The definition, with all T x T scores: the oracle that every other form is held to.

    The rest changes gradients alone, not the result. `call_starts` is the first position of the
    call that each token comes in, when a cache is carried between calls: gradients end there.
    Quantised keys pass gradients on to queries no more than M after them or, with `block_starts`
    (the first position of each query's block, the official definition), to queries of blocks that
    begin no more than M after them; without `gradient_through_cache`, keys and values only to
    queries of their own block.
    """
    queries, keys, values, codes, documents = tokens
    window, position = scoring.window, jnp.arange(keys.shape[2])
    distance = position[:, None] - position
    live_values = jnp.ones_like(distance, bool)
    if call_starts is not None:
        live_values &= position >= call_starts[:, None]
    live_keys = live_values
    if block_starts is not None:
        if not gradient_through_cache:
            live_values &= position >= block_starts[:, None]
        live_keys = live_values & (position >= block_starts[:, None] - window)
    elif codes is not None:
        live_keys &= distance <= window

    content = queries + scoring.content_bias[:, :, None]
    scores = jnp.where(
        live_keys,
        jnp.einsum("bhrik,bhjk->bhrij", content, keys),
        jnp.einsum("bhrik,bhjk->bhrij", content, lax.stop_gradient(keys)),
    )
    by_distance = jnp.einsum(
        "bhrik,hpk->bhrip", queries + scoring.position_bias[:, :, None], scoring.distances
    )
    near = by_distance[..., position[:, None], jnp.clip(distance, 0, window)]
    attended = (distance >= 0) & (compressive_cache | (distance <= window))
    if documents is not None:
        same = documents[:, :, None] == documents[:, None, :]
        attended = attended & same[:, None, None]
    scores = jnp.where(attended, scores + jnp.where(distance <= window, near, 0), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bhrij,bhjv->bhriv", weights * live_values, values) + jnp.einsum(
        "bhrij,bhjv->bhriv", weights * ~live_values, lax.stop_gradient(values)
    )
