"""Vector quantisation of keys: nearest codewords, straight-through gradients, moving averages.

B batch, T tokens, H heads, S codes, K key width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

SMALLEST_COUNT = 0.01
"""Counts are divided by at least this, so that a code nobody uses shrinks to zero in the end."""


class CodebookVariable(nnx.Variable):
    """Codebook state: moved by sums over the data, never by gradients or the optimizer."""


class Quantized(NamedTuple):
    """Keys and the codewords that stand for them."""

    keys: Float[Array, "B H T K"]
    """The nearest codewords exactly; gradients pass straight through to the keys they replace."""
    codes: Int[Array, "B H T"]
    """int32 index of the nearest codeword."""


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


class CodebookHealth(NamedTuple):
    """How well the codes of an update were used, mean over layers and heads."""

    perplexity: Float[Array, ""]
    """exp of the entropy of the codes drawn, between 1 and S."""
    usage: Float[Array, ""]
    """Fraction of the codes drawn at least once."""
    relative_error: Float[Array, ""]
    """Distance of a key to its codeword over the key's norm, mean over the tokens."""


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
    products = jnp.einsum("bhtk,hsk->bhts", keys, codewords, precision=lax.Precision.HIGHEST)
    distances = jnp.sum(codewords**2, axis=-1)[:, None, :] - 2 * products
    codes = jnp.argmin(lax.stop_gradient(distances), axis=-1).astype(jnp.int32)
    nearest = jax.vmap(lambda table, index: table[index], in_axes=(0, 1), out_axes=1)(
        codewords, codes
    )
    return Quantized(nearest + (keys - lax.stop_gradient(keys)), codes)


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


def codebook_health(statistics: CodeStatistics) -> CodebookHealth:
    """Health of the codebooks in an update, from statistics with a leading layer axis."""
    counts = statistics.counts
    totals = jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1)
    entropy = jnp.sum(jax.scipy.special.entr(counts / totals), axis=-1)
    return CodebookHealth(
        perplexity=jnp.mean(jnp.exp(entropy)),
        usage=jnp.mean(counts > 0),
        relative_error=jnp.sum(statistics.relative_error) / jnp.sum(totals),
    )
