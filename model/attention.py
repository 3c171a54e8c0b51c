"""Attention over vector-quantised keys: the dense definition, and the serial form that is linear.

Both compute, for a query at position i, a softmax over every position j <= i of

    (q_i + u) . k_j  +  [i - j <= M] (q_i + w) . r_{i-j}

where k_j is a codeword (MODEL.md sections 1.3 and 1.5). Because keys that are far are one of S
codewords and carry no position, all those of one code have one score: the serial form keeps their
number and the mean of their values instead of them.

B batch, T tokens, H heads, L block length, M window,
P = M + 1 distances, W = M + L buffer columns, S codes, K key width, V value width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

UNROLLED_BLOCKS = 4
"""Blocks in one iteration of the scan. Less copying of the carried window: on a CPU 4 blocks
train 10% faster than one."""


class Projections(NamedTuple):
    """What attention reads of the tokens."""

    queries: Float[Array, "B H T K"]
    keys: Float[Array, "B H T K"]
    """Quantised: codewords."""
    values: Float[Array, "B H T V"]
    codes: Int[Array, "B H T"]
    """int32 index of each key's codeword."""


class Scoring(NamedTuple):
    """What attention scores with, the same for all tokens. M is known from `distances`."""

    codewords: Float[Array, "H S K"]
    content_bias: Float[Array, "H K"]
    """u: added to queries before they meet keys."""
    position_bias: Float[Array, "H K"]
    """w: added to queries before they meet distances."""
    distances: Float[Array, "H P K"]
    """r: one vector a distance, 0 to M."""


class LayerCache(NamedTuple):
    """What a layer remembers of earlier tokens, of constant size.

    Without the compressive cache `codes`, `counts` and `means` are None.
    """

    keys: Float[Array, "*layers B H M K"]
    """Quantised keys of the last M tokens, the newest last."""
    values: Float[Array, "*layers B H M V"]
    codes: Int[Array, "*layers B H M"] | None
    """int32, S where there was no token yet."""
    counts: Float[Array, "*layers B H S"] | None
    """Tokens older than the window by code. Never narrower than float32: bfloat16 stops at 256."""
    means: Float[Array, "*layers B H S V"] | None
    """Mean value of those tokens, or 0."""


def block_starts(n_tokens: int, block_length: int) -> Int[Array, " T"]:
    """Position of the first token of each token's block."""
    return jnp.arange(n_tokens) // block_length * block_length


def attend_dense(
    tokens: Projections,
    scoring: Scoring,
    starts: Int[Array, " T"],
    *,
    compressive_cache: bool,
    gradient_through_cache: bool,
) -> Float[Array, "B H T V"]:
    """The definition, with all T x T scores: the oracle that every other form is held to.

    `starts` is the first position of each query's block. It does not matter to the result, but to
    its gradients: keys more than M before it are codewords out of the cache, which pass no
    gradient on, and without `gradient_through_cache` nothing before it does.
    """
    queries, keys, values, _ = tokens
    window = scoring.distances.shape[1] - 1
    distance = jnp.arange(len(starts))[:, None] - jnp.arange(len(starts))[None, :]
    own_block = jnp.arange(len(starts))[None, :] >= starts[:, None]
    in_buffer = jnp.arange(len(starts))[None, :] >= starts[:, None] - window
    live = in_buffer if gradient_through_cache else own_block
    live_values = jnp.ones_like(own_block) if gradient_through_cache else own_block

    content = (queries + scoring.content_bias[:, None]) @ keys.mT
    fixed = (queries + scoring.content_bias[:, None]) @ lax.stop_gradient(keys).mT
    position = (queries + scoring.position_bias[:, None]) @ scoring.distances.mT
    position = position[..., jnp.arange(len(starts))[:, None], jnp.clip(distance, 0, window)]
    scores = jnp.where(live, content, fixed) + jnp.where(distance <= window, position, 0)
    attended = (distance >= 0) & (compressive_cache | (distance <= window))
    weights = jax.nn.softmax(jnp.where(attended, scores, -jnp.inf), axis=-1)
    return (weights * live_values) @ values + (weights * ~live_values) @ lax.stop_gradient(values)


def attend_blocks(
    tokens: Projections,
    scoring: Scoring,
    cache: LayerCache,
    length: Int[Array, ""],
    *,
    block_length: int,
    gradient_through_cache: bool,
) -> tuple[Float[Array, "B H T V"], LayerCache]:
    """The same, block after block, with the tokens before them in `cache`.

    `length` tokens were seen before these. The last block is shorter if T does not divide; one
    token alone is a block of one, which is how decoding runs. Memory is O(L + M + S) a token.
    """
    n_tokens = tokens.queries.shape[2]
    n_blocks = n_tokens // block_length
    whole = n_blocks * block_length

    def step(
        carry: tuple[LayerCache, Int[Array, ""]], block: Projections
    ) -> tuple[tuple[LayerCache, Int[Array, ""]], Float[Array, "B H L V"]]:
        cache, length = carry
        if not gradient_through_cache:
            cache = jax.tree.map(lax.stop_gradient, cache)
        attended, cache = _attend_block(block, scoring, cache, length)
        return (cache, length + block.queries.shape[2]), attended

    carry, outputs = (cache, length), []
    if n_blocks > 0:
        blocks = jax.tree.map(lambda a: _to_blocks(a[:, :, :whole], n_blocks), tokens)
        carry, attended = lax.scan(step, carry, blocks, unroll=min(n_blocks, UNROLLED_BLOCKS))
        attended = jnp.moveaxis(attended, 0, 2)
        outputs.append(attended.reshape(*attended.shape[:2], whole, -1))
    if whole < n_tokens:
        carry, attended = step(carry, jax.tree.map(lambda a: a[:, :, whole:], tokens))
        outputs.append(attended)
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2), carry[0]


def _to_blocks(array: Array, n_blocks: int) -> Array:
    B, H, T, *rest = array.shape
    return jnp.moveaxis(array.reshape(B, H, n_blocks, T // n_blocks, *rest), 2, 0)


def _attend_block(
    block: Projections, scoring: Scoring, cache: LayerCache, length: Int[Array, ""]
) -> tuple[Float[Array, "B H L V"], LayerCache]:
    """One block of queries against the codewords, the window and the block itself."""
    queries, dtype = block.queries, block.values.dtype
    L, M, S = queries.shape[2], cache.keys.shape[2], scoring.codewords.shape[1]
    # The buffer: M cached columns, then the block's own. Column j of row i has distance M + i - j.
    keys = jnp.concatenate([cache.keys, block.keys], axis=2)
    values = jnp.concatenate([cache.values, block.values], axis=2)
    row, column = jnp.arange(L)[:, None], jnp.arange(M + L)[None, :]
    attended = (column <= M + row) & (column >= M - length)
    # Columns older than M that are not in the cache yet are attended too, without a position.
    attended &= (column >= row) | (cache.counts is not None)
    position = (queries + scoring.position_bias[:, None]) @ scoring.distances[:, ::-1].mT
    scores = (queries + scoring.content_bias[:, None]) @ keys.mT + _skew(position)
    scores = jnp.where(attended, scores, -jnp.inf)
    if cache.counts is not None and cache.means is not None:
        # One softmax, one product: codewords and mean values stand in front of the buffer.
        known = cache.counts > 0
        bias = jnp.where(known, jnp.log(jnp.maximum(cache.counts, 1)), -jnp.inf)
        codes = (queries + scoring.content_bias[:, None]) @ scoring.codewords.mT
        scores = jnp.concatenate([codes + bias[:, :, None], scores], axis=-1)
        all_values = jnp.concatenate([cache.means.astype(dtype), values], axis=2)
    else:
        all_values = values
    weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.matmul(weights.astype(dtype), all_values, preferred_element_type=total.dtype)
    return (mixed / total).astype(dtype), _shift(cache, keys, values, block.codes, S)


def _skew(scores: Float[Array, "B H L P"]) -> Float[Array, "B H L W"]:
    """Moves row i right by i, zeros around it: from distance M - c in column c to the buffer's
    columns, W = M + L of them (Dai et al. 2019, appendix B, the other way round)."""
    B, H, L, width = scores.shape
    W = width - 1 + L
    padded = jnp.pad(scores, [(0, 0), (0, 0), (0, 0), (0, W + 1 - width)])
    return padded.reshape(B, H, L * (W + 1))[..., : L * W].reshape(B, H, L, W)


def _shift(
    cache: LayerCache,
    keys: Float[Array, "B H W K"],
    values: Float[Array, "B H W V"],
    new_codes: Int[Array, "B H L"],
    n_codes: int,
) -> LayerCache:
    """The cache after a block: the last M columns stay, those that leave are merged."""
    L = new_codes.shape[2]
    if cache.codes is None or cache.counts is None or cache.means is None:
        return LayerCache(keys[:, :, L:], values[:, :, L:], None, None, None)
    codes = jnp.concatenate([cache.codes, new_codes], axis=2)
    counts_dtype = cache.counts.dtype
    # Columns without a token have code S, whose one-hot vector is zero.
    leaving = jax.nn.one_hot(codes[:, :, :L], n_codes, dtype=values.dtype)
    counts = cache.counts + jnp.sum(leaving, axis=2, dtype=counts_dtype)
    divisor = jnp.maximum(counts, 1)
    summed = jnp.matmul(leaving.mT, values[:, :, :L], preferred_element_type=counts_dtype)
    means = (cache.counts / divisor)[..., None] * cache.means + summed / divisor[..., None]
    return LayerCache(keys[:, :, L:], values[:, :, L:], codes[:, :, L:], counts, means)


def empty_cache(
    shape: tuple[int, ...],
    *,
    window: int,
    n_codes: int,
    d_key: int,
    d_value: int,
    compressive_cache: bool,
    dtype: jnp.dtype,
    statistics_dtype: jnp.dtype,
) -> LayerCache:
    """The cache before the first token. `shape` is (B, H), with a layer axis before it or not."""
    return LayerCache(
        keys=jnp.zeros((*shape, window, d_key), statistics_dtype),
        values=jnp.zeros((*shape, window, d_value), dtype),
        codes=jnp.full((*shape, window), n_codes, jnp.int32) if compressive_cache else None,
        counts=jnp.zeros((*shape, n_codes), statistics_dtype) if compressive_cache else None,
        means=(
            jnp.zeros((*shape, n_codes, d_value), statistics_dtype) if compressive_cache else None
        ),
    )
