"""The parts of a layer: norms, sinusoids, dropouts, and the gated attention unit.

B batch, T tokens, H heads, M window, P = M + 1 distances, S codes, K key width, V value width,
D model width.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from model.attention import LayerCache, Projections, Scoring, attend_blocks
from model.config import ModelConfig
from model.quantizer import Codebook, CodeStatistics, code_statistics, quantize

NORM_EPSILON = 1e-6


def parameter_dtype(config: ModelConfig) -> jnp.dtype:
    """dtype of parameters, scores and statistics: float32, or float64 if everything is."""
    return jnp.dtype("float64" if config.dtype == "float64" else "float32")


def root_mean_square_norm(x: Float[Array, "*axes D"], dtype: jnp.dtype) -> Float[Array, "*axes D"]:
    """x over its root mean square in the last axis, computed in `dtype`."""
    x = x.astype(dtype)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + NORM_EPSILON)


def sinusoids(
    positions: Int[Array, " P"], width: int, base: float, dtype: jnp.dtype
) -> Float[Array, "P D"]:
    """Sines, then cosines, of the positions at width/2 wavelengths (MODEL.md section 1.3)."""
    frequencies = base ** (-2 * jnp.arange(width // 2, dtype=dtype) / width)
    angles = positions.astype(dtype)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def kernel(rngs: nnx.Rngs, fan_in: int, fan_out: int, dtype: jnp.dtype) -> nnx.Param:
    """A matrix of normal numbers of standard deviation fan_in^-1/2."""
    return nnx.Param(fan_in**-0.5 * jax.random.normal(rngs.params(), (fan_in, fan_out), dtype))


def project(x: Float[Array, "B T X"], kernel: nnx.Param) -> Float[Array, "B T Y"]:
    """x times the kernel, in x's dtype.

    A product of two plain matrices: with B and T apart, XLA's CPU backward pass for the kernel
    copies its operands transposed (2048 tokens, 128 x 256, then silu: 4.9 ms; this: 2.6 ms).
    """
    B, T, width = x.shape
    return (x.reshape(B * T, width) @ kernel[...].astype(x.dtype)).reshape(B, T, -1)


class Purpose(enum.IntEnum):
    """What random numbers are drawn for; part of their key."""

    EMBEDDING = 0
    RESIDUAL = 1
    SINUSOID = 2
    LAYER = 3


class Randomness(NamedTuple):
    """Where dropout masks come from.

    All but the sinusoids', which the rows of a batch share, are drawn row by row, so that a row's
    are the same in whatever batch, micro-batch or device it is.
    """

    update: Array
    """PRNG key of this update."""
    batch: Array
    """PRNG key of this batch, the same for all its updates."""
    rows: UInt[Array, " B"]
    """uint32 number of each row in the training's endless sequence of rows."""

    def of_layer(self, layer: Int[Array, ""]) -> "Randomness":
        """The same for one layer."""
        update, batch = (jax.random.fold_in(key, layer) for key in (self.update, self.batch))
        return Randomness(update, batch, self.rows)


def keep(
    key: Array, purpose: Purpose, shape: tuple[int, ...], rate: float, dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """A dropout mask: 0 with probability `rate`, otherwise 1 / (1 - rate)."""
    kept = jax.random.bernoulli(jax.random.fold_in(key, purpose), 1 - rate, shape)
    return kept.astype(dtype) / (1 - rate)


def keep_by_row(
    key: Array,
    purpose: Purpose,
    rows: UInt[Array, " B"],
    shape: tuple[int, ...],
    rate: float,
    dtype: jnp.dtype,
) -> Float[Array, "B *shape"]:
    """Dropout masks of that shape, one a row."""
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    return jax.vmap(lambda key: keep(key, purpose, shape, rate, dtype))(keys)


class Norm(nnx.Module):
    """Root-mean-square norm with a gain and a bias, computed in the parameters' dtype."""

    def __init__(self, width: int, *, dtype: jnp.dtype):
        self.gain = nnx.Param(jnp.ones(width, dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The normalised x, in x's dtype."""
        normed = root_mean_square_norm(x, self.gain[...].dtype)
        return (normed * self.gain[...] + self.bias[...]).astype(x.dtype)


class GatedAttentionUnit(nnx.Module):
    """Norm, gated attention over quantised keys, residual (MODEL.md section 1.2)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, H, K, V = config.d_model, config.n_heads, config.d_key, config.d_value
        dtype = parameter_dtype(config)
        self.norm = Norm(D, dtype=dtype)
        self.query = kernel(rngs, D, H * K, dtype)
        self.key = kernel(rngs, D, H * K, dtype)
        self.value = kernel(rngs, D, H * V, dtype)
        self.gate = kernel(rngs, D, H * V, dtype)
        self.output = kernel(rngs, H * V, D, dtype)
        self.distance = kernel(rngs, D, H * K, dtype)
        self.content_bias = nnx.Param(jnp.zeros(H * K, dtype))
        self.position_bias = nnx.Param(jnp.zeros(H * K, dtype))
        self.codebook = Codebook(H, config.n_codes, K, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache,
        length: Int[Array, ""],
        distances: Float[Array, "P D"],
        loss_mask: Bool[Array, "B T"] | None,
        randomness: Randomness | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache, CodeStatistics | None]:
        """Transforms T tokens that follow the `length` tokens in `cache`.

        `distances` are the sinusoids of 0 to M. Code statistics are of the tokens in `loss_mask`;
        without one there are none. Dropout needs this layer's randomness; without, there is none.
        """
        config = self.config
        K = config.d_key
        # Every q, k, r, u and w carries K^-1/4, so that scores carry K^-1/2.
        scale = K**-0.25
        wide = parameter_dtype(config)
        if randomness is not None and config.sinusoid_dropout:
            distances *= keep(
                randomness.batch,
                Purpose.SINUSOID,
                distances.shape,
                config.sinusoid_dropout,
                distances.dtype,
            )
        normed = self.norm(x)
        queries = root_mean_square_norm(self._heads(normed, self.query), wide) * scale
        keys = root_mean_square_norm(self._heads(normed, self.key), wide) * scale
        values = jax.nn.silu(self._heads(normed, self.value))
        gate = jax.nn.silu(project(normed, self.gate))

        codewords = self.codebook.codewords()
        quantized = quantize(keys, codewords)
        attended, cache = attend_blocks(
            Projections(queries, quantized.keys, values, quantized.codes),
            Scoring(
                codewords,
                self.content_bias[...].reshape(-1, K) * scale,
                self.position_bias[...].reshape(-1, K) * scale,
                self._heads(distances[None], self.distance)[0] * scale,
            ),
            cache,
            length,
            block_length=config.block_length,
            gradient_through_cache=config.gradient_through_cache,
        )
        merged = jnp.moveaxis(attended, 1, 2).reshape(*x.shape[:2], -1)
        added = project(merged * gate, self.output)
        if randomness is not None:
            added = self._drop(added, randomness)
        x = x + added
        if loss_mask is None:
            return x, cache, None
        return x, cache, code_statistics(keys, quantized, config.n_codes, loss_mask)

    def _drop(self, added: Float[Array, "B T D"], randomness: Randomness) -> Float[Array, "B T D"]:
        config, rows, shape = self.config, randomness.rows, added.shape[1:]
        if rate := config.residual_dropout:
            added *= keep_by_row(
                randomness.update, Purpose.RESIDUAL, rows, shape, rate, added.dtype
            )
        if rate := config.layer_dropout:
            added *= keep_by_row(randomness.batch, Purpose.LAYER, rows, (1, 1), rate, added.dtype)
        return added

    def _heads(self, x: Float[Array, "B T D"], kernel: nnx.Param) -> Float[Array, "B H T X"]:
        B, T, _ = x.shape
        return jnp.moveaxis(project(x, kernel).reshape(B, T, self.config.n_heads, -1), 2, 1)
