"""Vector quantisation of keys: nearest codewords, straight-through gradients, moving averages, and
new beginnings for codes that no key is near.

B batch, T tokens, H heads, S codes, K key width, C candidates.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from model.products import times_table
from model.reductions import row_min

SMALLEST_COUNT = 0.01
"""Counts are divided by at least this, so that a code nobody uses shrinks to zero in the end."""

DEAD_BELOW = 1.0
"""A code is counted as dead while its moving count, in tokens an update, is below this."""

COLLAPSED_BELOW = 2.0
"""Perplexity of a codebook that has collapsed: all keys share what amounts to fewer codes than two,
and attention beyond the window is to one mean of everything. (Of tiny's 64 codes, text begins at 18
to 22; one layer passed through 4.4.)"""

REVIVED_COUNT = 2.0
"""Moving count of a revived code over `revive_below`: unused, it is given another key after
log 2 / (1 - decay) updates, 69 at a decay of 0.99."""


class CodebookVariable(nnx.Variable):
    """Codebook state: moved by sums over the data, never by gradients or the optimizer."""


class Quantized(NamedTuple):
    """Keys and the codewords that stand for them."""

    keys: Float[Array, "B H T K"]
    """The nearest codewords exactly; gradients pass straight through to the keys they replace."""
    codes: Int[Array, "B H T"]
    """int32 index of the nearest codeword."""


class Candidates(NamedTuple):
    """Keys of an update that codewords may start from: C of its unmasked tokens, drawn at random
    without repetition, the same tokens for all heads of a layer.

    Each token's priority is of its row and position alone. So the candidates of a batch are those
    of highest priority among the candidates of its micro-batches.
    """

    keys: Float[Array, "*layers H C K"]
    priorities: UInt[Array, "*layers C"]
    """uint32, falling; 0 where the unmasked tokens were fewer than C."""


class CodeStatistics(NamedTuple):
    """Sums over the unmasked tokens of an update, the whole batch's under a sharded jit."""

    sums: Float[Array, "*layers H S K"]
    """Keys summed by code."""
    counts: Float[Array, "*layers H S"]
    """Tokens by code."""
    squared_error: Float[Array, "*layers"]
    """Squared distance of keys to their codewords, summed over tokens and heads; its gradient
    reaches the keys."""
    relative_error: Float[Array, "*layers"]
    """That distance over the key's norm, summed over tokens and heads."""
    candidates: Candidates | None = None
    """None unless asked for."""


class CodebookHealth(NamedTuple):
    """How well the codes of an update were used, mean over layers and heads."""

    perplexity: Float[Array, ""]
    """exp of the entropy of the codes drawn, between 1 and S."""
    usage: Float[Array, ""]
    """Fraction of the codes drawn at least once."""
    relative_error: Float[Array, ""]
    """Distance of a key to its codeword over the key's norm, mean over the tokens."""
    collapsed_layers: Int[Array, ""]
    """int32 layers with a head whose perplexity is below COLLAPSED_BELOW, not a mean."""


class Codebook(nnx.Module):
    """Moving sums and counts, whose quotients are the codewords, one codebook a head."""

    def __init__(self, n_heads: int, n_codes: int, d_key: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        shape = (n_heads, n_codes, d_key)
        scale = (n_heads * n_codes) ** -0.5
        sums = scale * jax.random.normal(rngs.params(), shape, dtype)
        self.sums = CodebookVariable(sums)
        self.counts = CodebookVariable(jnp.ones(shape[:2], dtype))

    def codewords(self) -> Float[Array, "H S K"]:
        """The codewords, constants to the gradient."""
        counts = jnp.maximum(self.counts[...], SMALLEST_COUNT)
        return lax.stop_gradient(self.sums[...] / counts[..., None])


def quantize(keys: Float[Array, "B H T K"], codewords: Float[Array, "H S K"]) -> Quantized:
    """Replaces keys by their nearest codewords (MODEL.md section 1.4).

    Products are taken at the highest precision: a rounded one may flip a code.
    """
    products = times_table(keys, codewords.mT, precision=lax.Precision.HIGHEST)
    distances = jnp.sum(codewords**2, axis=-1)[:, None, :] - 2 * products
    codes = first_smallest(lax.stop_gradient(distances))
    nearest = jax.vmap(lambda table, index: table[index], in_axes=(0, 1), out_axes=1)(
        codewords, codes
    )
    return Quantized(nearest + (keys - lax.stop_gradient(keys)), codes)


def first_smallest(distances: Float[Array, "B H T S"]) -> Int[Array, "B H T"]:
    """int32 argmin over the codes, in two reductions: XLA's CPU compiler takes ten times as long
    for its reduction of pairs (2% of a layer of `small`)."""
    n_codes = distances.shape[-1]
    index = jnp.arange(n_codes, dtype=jnp.int32)
    # Where nothing equals it, as it is not a number, there is a code all the same.
    codes = jnp.where(distances == row_min(distances), index, n_codes - 1)
    return row_min(codes)[..., 0]


def code_statistics(
    keys: Float[Array, "B H T K"],
    quantized: Quantized,
    n_codes: int,
    loss_mask: Bool[Array, "B T"],
) -> CodeStatistics:
    """What the commitment loss, the moving averages and the health metrics need of an update."""
    mask = loss_mask[:, None, :].astype(keys.dtype)
    constant = lax.stop_gradient(keys)
    drawn = jax.nn.one_hot(quantized.codes, n_codes, dtype=keys.dtype) * mask[..., None]
    squared = jnp.sum((keys - lax.stop_gradient(quantized.keys)) ** 2, axis=-1) * mask
    norms = jnp.maximum(jnp.linalg.norm(constant, axis=-1), 1e-9)
    return CodeStatistics(
        sums=jnp.einsum("bhts,bhtk->hsk", drawn, constant, precision=lax.Precision.HIGHEST),
        counts=jnp.sum(drawn, axis=(0, 2)),
        squared_error=jnp.sum(squared),
        relative_error=jnp.sum(jnp.sqrt(lax.stop_gradient(squared)) / norms),
    )


def update_codebooks(codebooks: dict, statistics: CodeStatistics, decay: float) -> dict:
    """The codebooks after an update: decayed, plus the new sums and counts (MODEL.md 1.4)."""
    old = codebooks["layers"]["codebook"]
    new = {
        "sums": decay * old["sums"] + (1 - decay) * statistics.sums,
        "counts": decay * old["counts"] + (1 - decay) * statistics.counts,
    }
    return {"layers": {"codebook": new}}


def codebook_health(statistics: CodeStatistics | None) -> CodebookHealth:
    """Health of the codebooks in an update, from statistics with a leading layer axis; all 0 if
    keys are not quantised."""
    if statistics is None:
        none = jnp.zeros(())
        return CodebookHealth(none, none, none, jnp.zeros((), jnp.int32))
    counts = statistics.counts
    totals = jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1)
    perplexities = jnp.exp(jnp.sum(jax.scipy.special.entr(counts / totals), axis=-1))
    collapsed = jnp.any(perplexities < COLLAPSED_BELOW, axis=-1)
    return CodebookHealth(
        perplexity=jnp.mean(perplexities),
        usage=jnp.mean(counts > 0),
        relative_error=jnp.sum(statistics.relative_error) / jnp.sum(totals),
        collapsed_layers=jnp.sum(collapsed, dtype=jnp.int32),
    )


def draw_candidates(
    keys: Float[Array, "B H T K"],
    loss_mask: Bool[Array, "B T"],
    row_keys: Array,
    n_candidates: int,
) -> Candidates:
    """The keys of at most that many unmasked tokens, from one PRNG key a row."""
    B, T = loss_mask.shape
    drawn = jax.vmap(lambda key: jax.random.bits(key, (T,), jnp.uint32))(row_keys)
    priorities = jnp.where(loss_mask, drawn | 1, 0).reshape(B * T)
    priorities, tokens = lax.top_k(priorities, min(n_candidates, B * T))
    chosen = lax.stop_gradient(keys)[tokens // T, :, tokens % T]
    return Candidates(jnp.moveaxis(chosen, 0, -2), priorities)


def revive_codes(codebooks: dict, candidates: Candidates, below: float) -> dict:
    """The codebooks with a candidate key as the codeword of each code whose moving count is under
    `below`: in order, the first such code of a head takes the first candidate, as far as they go.
    """
    old = codebooks["layers"]["codebook"]
    dead = old["counts"] < below
    turn = jnp.cumsum(dead, axis=-1, dtype=jnp.int32) - 1
    n_drawn = jnp.sum(candidates.priorities > 0, axis=-1, dtype=jnp.int32)
    revived = dead & (turn < n_drawn[:, None, None])
    keys = jnp.take_along_axis(candidates.keys, turn[..., None], axis=-2, mode="clip")
    # Codewords are sums over counts of at least SMALLEST_COUNT.
    count = max(REVIVED_COUNT * below, SMALLEST_COUNT)
    new = {
        "sums": jnp.where(revived[..., None], count * keys, old["sums"]),
        "counts": jnp.where(revived, count, old["counts"]),
    }
    return {"layers": {"codebook": new}}


def dead_codes(codebooks: dict) -> Float[Array, ""]:
    """Codes of a codebook whose moving count is below DEAD_BELOW, mean over layers and heads."""
    counts = codebooks["layers"]["codebook"]["counts"]
    return jnp.mean(jnp.sum(counts < DEAD_BELOW, axis=-1))


def spread_centres(candidates: Candidates, n_codes: int, key: Array) -> Float[Array, "H S K"]:
    """Beginnings for k-means from one layer's candidates: the first, then each drawn with a
    probability in proportion to its squared distance from the nearest centre so far (k-means++).

    Drawn evenly, many would be the same: without absolute positions, the first layer has one key a
    token value. Centres beyond the number of distinct keys are the first one again.
    """
    keys = candidates.keys
    H, C, K = keys.shape

    def distances(centre: Float[Array, "H 1 K"]) -> Float[Array, "H C"]:
        squared = jnp.sum((keys - centre) ** 2, axis=-1)
        return jnp.where(candidates.priorities > 0, squared, 0)

    def add(
        code: Int[Array, ""], carry: tuple[Float[Array, "H S K"], Float[Array, "H C"]]
    ) -> tuple[Float[Array, "H S K"], Float[Array, "H C"]]:
        centres, nearest = carry
        # The largest of logarithms plus Gumbel noise is a draw by weight.
        noise = jax.random.gumbel(jax.random.fold_in(key, code), (H, C), keys.dtype)
        index = jnp.argmax(jnp.log(nearest) + noise, axis=-1)
        centre = jnp.take_along_axis(keys, index[:, None, None], axis=1)
        centres = lax.dynamic_update_slice_in_dim(centres, centre, code, axis=1)
        return centres, jnp.minimum(nearest, distances(centre))

    first = keys[:, :1]
    begin = (jnp.broadcast_to(first, (H, n_codes, K)), distances(first))
    return lax.fori_loop(1, n_codes, add, begin)[0]


def move_to_means(
    centres: Float[Array, "H S K"], candidates: Candidates, iterations: int
) -> Float[Array, "H S K"]:
    """Centres after iterations of k-means (Lloyd's): each becomes the mean of the candidates that
    it is nearest to, and one that is nearest to none stays."""
    points, mask = candidates.keys[None], (candidates.priorities > 0)[None]

    def move(_: Int[Array, ""], centres: Float[Array, "H S K"]) -> Float[Array, "H S K"]:
        nearest = quantize(points, centres)
        statistics = code_statistics(points, nearest, centres.shape[1], mask)
        counts = statistics.counts[..., None]
        return jnp.where(counts > 0, statistics.sums / jnp.maximum(counts, 1), centres)

    return lax.fori_loop(0, iterations, move, centres)
