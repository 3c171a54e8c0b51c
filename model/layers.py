"""The parts of a layer: norms, sinusoids, dropouts, attention units and feed-forward units.

B batch, T tokens, H key and value heads, R query heads to each, M window, P = M + 1 distances,
S codes, K key width, V value width, D model width.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from model.attention import LayerCache, Projections, Scoring
from model.block_attention import Options, attend_serial
from model.config import ModelConfig
from model.full_attention import attend_full, attend_full_dense
from model.parallel_attention import attend_parallel
from model.quantizer import Codebook, CodeStatistics, code_statistics, draw_candidates, quantize

NORM_EPSILON = 1e-6


def parameter_dtype(config: ModelConfig) -> jnp.dtype:
    """dtype of parameters, scores and statistics: float32, or float64 if everything is."""
    return jnp.dtype("float64" if config.dtype == "float64" else "float32")


def root_mean_square_norm(x: Float[Array, "*axes D"], dtype: jnp.dtype) -> Float[Array, "*axes D"]:
    """x over its root mean square in the last axis, computed in `dtype`."""
    x = x.astype(dtype)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + NORM_EPSILON)


def sinusoids(
    positions: Int[Array, "*P"], width: int, base: float, dtype: jnp.dtype
) -> Float[Array, "*P D"]:
    """Sines, then cosines, of the positions at width/2 wavelengths (MODEL.md section 1.3)."""
    frequencies = base ** (-2 * jnp.arange(width // 2, dtype=dtype) / width)
    angles = positions.astype(dtype)[..., None] * frequencies
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


@jax.checkpoint
def silu(x: Float[Array, "*axes X"]) -> Float[Array, "*axes X"]:
    """x sigmoid(x). The sigmoid is computed again for the gradient, not kept: writing and reading
    it costs more (a step of `small` at 8,192 tokens on two cores is 5% faster)."""
    return jax.nn.silu(x)


class Purpose(enum.IntEnum):
    """What random numbers are drawn for; part of their key."""

    EMBEDDING = 0
    RESIDUAL = 1
    SINUSOID = 2
    LAYER = 3
    FEED_FORWARD = 4
    CANDIDATES = 5


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


def keys_by_row(key: Array, purpose: Purpose, rows: UInt[Array, " B"]) -> Array:
    """PRNG keys [B] of one purpose, one a row."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), purpose))(rows)


def keep_by_row(
    key: Array,
    purpose: Purpose,
    rows: UInt[Array, " B"],
    shape: tuple[int, ...],
    rate: float,
    dtype: jnp.dtype,
) -> Float[Array, "B *shape"]:  # noqa: F821 - axes, not names
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


def drop_residual(
    added: Float[Array, "B T D"],
    config: ModelConfig,
    randomness: Randomness | None,
    purpose: Purpose,
) -> Float[Array, "B T D"]:
    """What a layer adds, with the dropouts of its elements and of the whole layer."""
    if randomness is None:
        return added
    rows, dtype = randomness.rows, added.dtype
    if rate := config.residual_dropout:
        added *= keep_by_row(randomness.update, purpose, rows, added.shape[1:], rate, dtype)
    if rate := config.layer_dropout:
        added *= keep_by_row(randomness.batch, Purpose.LAYER, rows, (1, 1), rate, dtype)
    return added


class FeedForward(nnx.Module):
    """Norm, two matrices with a squared ReLU between them, residual (MODEL.md section 1.14)."""

    def __init__(self, config: ModelConfig, width: int, *, rngs: nnx.Rngs):
        dtype = parameter_dtype(config)
        self.norm = Norm(config.d_model, dtype=dtype)
        self.expand = kernel(rngs, config.d_model, width, dtype)
        self.contract = kernel(rngs, width, config.d_model, dtype)
        self.config = config

    def __call__(
        self, x: Float[Array, "B T D"], randomness: Randomness | None
    ) -> Float[Array, "B T D"]:
        """Transforms each token by itself."""
        hidden = jnp.square(jax.nn.relu(project(self.norm(x), self.expand)))
        added = project(hidden, self.contract)
        return x + drop_residual(added, self.config, randomness, Purpose.FEED_FORWARD)


class AttentionUnit(nnx.Module):
    """Norm, attention, residual: gated (MODEL.md section 1.2), or followed by a feed-forward
    unit (section 1.14)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, K, V = config.d_model, config.d_key, config.d_value
        H, query_heads = config.kv_heads, config.n_heads
        dtype = parameter_dtype(config)
        self.norm = Norm(D, dtype=dtype)
        self.query = kernel(rngs, D, query_heads * K, dtype)
        self.key = kernel(rngs, D, H * K, dtype)
        self.value = kernel(rngs, D, H * V, dtype)
        if config.gated:
            self.gate = kernel(rngs, D, query_heads * V, dtype)
        self.output = kernel(rngs, query_heads * V, D, dtype)
        self.distance = kernel(rngs, D, H * K, dtype)
        self.content_bias = nnx.Param(jnp.zeros(query_heads * K, dtype))
        self.position_bias = nnx.Param(jnp.zeros(query_heads * K, dtype))
        if config.quantized_keys:
            self.codebook = Codebook(H, config.n_codes, K, dtype=dtype, rngs=rngs)
        if config.d_feed_forward is not None:
            self.feed_forward = FeedForward(config, config.d_feed_forward, rngs=rngs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache,
        length: Int[Array, ""],
        distances: Float[Array, "P D"],
        documents: Int[Array, "B T"] | None = None,
        loss_mask: Bool[Array, "B T"] | None = None,
        randomness: Randomness | None = None,
        n_candidates: int = 0,
    ) -> tuple[Float[Array, "B T D"], LayerCache, CodeStatistics | None]:
        """Transforms T tokens that follow the `length` tokens in `cache`.

        `distances` are the sinusoids of 0 to M. Documents of the tokens are needed to isolate them.
        Code statistics are of the tokens in `loss_mask`; without one, and without codes, there are
        none. Dropout and candidates need this layer's randomness; without, there are none.
        """
        config = self.config
        H, K = config.kv_heads, config.d_key
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
        queries = self._heads(normed, self.query, config.n_heads)
        queries = root_mean_square_norm(queries, wide) * scale
        B, _, T, _ = queries.shape
        keys = root_mean_square_norm(self._heads(normed, self.key, H), wide) * scale
        values = self._heads(normed, self.value, H)
        if config.gated:
            values = silu(values)
        codewords = self.codebook.codewords() if config.quantized_keys else None
        quantized = None if codewords is None else quantize(keys, codewords)
        attended, cache = attend(
            config,
            Projections(
                queries.reshape(B, H, -1, T, K),
                keys if quantized is None else quantized.keys,
                values,
                None if quantized is None else quantized.codes,
                documents,
            ),
            Scoring(
                codewords,
                self.content_bias[...].reshape(H, -1, K) * scale,
                self.position_bias[...].reshape(H, -1, K) * scale,
                self._heads(distances[None], self.distance, H)[0].astype(wide) * scale,
            ),
            cache,
            length,
        )
        merged = jnp.moveaxis(attended.reshape(B, config.n_heads, T, -1), 1, 2).reshape(B, T, -1)
        if config.gated:
            merged *= silu(project(normed, self.gate))
        added = project(merged, self.output)
        x = x + drop_residual(added, config, randomness, Purpose.RESIDUAL)
        if config.d_feed_forward is not None:
            x = self.feed_forward(x, randomness)
        if loss_mask is None or quantized is None:
            return x, cache, None
        statistics = code_statistics(keys, quantized, config.n_codes, loss_mask)
        if n_candidates and randomness is not None:
            row_keys = keys_by_row(randomness.update, Purpose.CANDIDATES, randomness.rows)
            drawn = draw_candidates(keys, loss_mask, row_keys, n_candidates)
            statistics = statistics._replace(candidates=drawn)
        return x, cache, statistics

    def _heads(
        self, x: Float[Array, "B T D"], kernel: nnx.Param, n_heads: int
    ) -> Float[Array, "B heads T X"]:
        B, T, _ = x.shape
        return jnp.moveaxis(project(x, kernel).reshape(B, T, n_heads, -1), 2, 1)


def attend(
    config: ModelConfig,
    tokens: Projections,
    scoring: Scoring,
    cache: LayerCache,
    length: Int[Array, ""],
) -> tuple[Float[Array, "B H R T V"], LayerCache]:
    """Attention in the form that the configuration names."""
    form = config.attention_form
    if config.attends_all_keys:
        if form == "dense":
            return attend_full_dense(tokens, scoring, cache, length)
        return attend_full(tokens, scoring, cache, length, config.tile)
    options = Options(
        # One block of all tokens has all their scores at once.
        block_length=tokens.keys.shape[2] if form == "dense" else config.tile,
        window_gradient=config.gradient_block is None,
        gradient_through_cache=config.gradient_through_cache,
    )
    if form == "parallel":
        return attend_parallel(tokens, scoring, cache, length, options, config.parallel_blocks)
    return attend_serial(tokens, scoring, cache, length, options)
