"""The network: embeddings, stacked attention units, output; its cache and initialisation.

B batch, T tokens, M window, P = M + 1 distances, D model width.

A network is two plain nested dicts of arrays, parameters and codebooks, and the functions here
that take them. Layers lie stacked on the first axis of everything under `layers`, and are scanned.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from model.attention import LayerCache, empty_cache
from model.config import EOS_ID, ConfigError, ModelConfig
from model.layers import (
    AttentionUnit,
    Norm,
    Purpose,
    Randomness,
    keep_by_row,
    kernel,
    parameter_dtype,
    sinusoids,
)
from model.quantizer import CodebookVariable, CodeStatistics
from model.sharding import by_row, gathered, gathered_again

REMAT = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What is kept of a layer that is recomputed, by `remat_keeps`. (Products of activations with each
other, scores above all, have batch axes; those with weights are of two plain matrices.)"""


class Network(NamedTuple):
    """The arrays a network consists of, as nested dicts with readable names."""

    params: dict
    """What the optimizer moves."""
    codebooks: dict
    """What moving averages move."""


class Cache(NamedTuple):
    """What the network remembers of earlier tokens; of constant size unless it attends all keys."""

    layers: LayerCache
    """With the layers stacked on the first axis."""
    length: Int[Array, ""]
    """int32 number of tokens seen."""
    document: Int[Array, " B"] | None
    """int32 number of the newest token's document; None unless documents are isolated."""
    document_start: Int[Array, " B"] | None
    """int32 position of that document's first token."""


class Features(NamedTuple):
    """What the layers make of the tokens."""

    features: Float[Array, "B T D"]
    """Ready for the output projection."""
    cache: Cache
    statistics: CodeStatistics | None
    """Stacked over layers; None unless asked for by a loss mask."""


class Embedding(nnx.Module):
    """The table of token vectors, and a bias for when it is the output projection as well.

    The official code makes the bias in any case; untied it stays 0.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape, dtype = (config.vocab_size, config.d_model), parameter_dtype(config)
        self.table = nnx.Param(jax.random.normal(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, dtype))


class Output(nnx.Module):
    """The output projection of a network whose embeddings are not tied."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype = parameter_dtype(config)
        self.kernel = kernel(rngs, config.d_model, config.vocab_size, dtype)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, dtype))


class AbsolutePosition(nnx.Module):
    """The learnt scale of absolute sinusoids."""

    def __init__(self, config: ModelConfig):
        self.scale = nnx.Param(jnp.zeros((), parameter_dtype(config)))


class Transformer(nnx.Module):
    """The whole network (MODEL.md section 1.1)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.n_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> AttentionUnit:
            return AttentionUnit(config, rngs=rngs)

        self.config = config
        self.embedding = Embedding(config, rngs=rngs)
        self.layers = stack(rngs)
        if config.absolute_positions:
            self.position = AbsolutePosition(config)
        if config.output_norm:
            self.output_norm = Norm(config.d_model, dtype=parameter_dtype(config))
        if not config.tied_embeddings:
            self.output = Output(config, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        *,
        loss_mask: Bool[Array, "B T"] | None = None,
        randomness: Randomness | None = None,
        n_candidates: int = 0,
    ) -> Features:
        """Reads T tokens that follow those in the cache.

        With a loss mask, code statistics of its tokens come along; with randomness, dropouts act,
        and statistics have `n_candidates`, or as many as there are tokens.
        """
        config = self.config
        table = gathered(self.embedding.table[...], "embedding/table", config)
        x = by_row(table[tokens].astype(config.dtype))
        documents, starts = _documents(tokens, cache)
        if config.absolute_positions:
            positions = cache.length + jnp.arange(tokens.shape[1])
            if starts is not None:
                positions = positions - starts
            x += self._sinusoids(positions) * self.position.scale[...].astype(config.dtype)
        if randomness is not None and (rate := config.embedding_dropout):
            x *= keep_by_row(
                randomness.update, Purpose.EMBEDDING, randomness.rows, x.shape[1:], rate, x.dtype
            )
        distances = self.distances()
        unit, params, codebooks = nnx.split(self.layers, nnx.Param, CodebookVariable)

        def layer(
            x: Float[Array, "B T D"], inputs: tuple[Any, Any, LayerCache, Int[Array, ""]]
        ) -> tuple[Float[Array, "B T D"], tuple[LayerCache, CodeStatistics | None]]:
            params, codebook, layer_cache, index = inputs
            params = gathered(
                nnx.to_pure_dict(params), "layers", config, dtype=config.dtype, layer=True
            )
            attend = nnx.merge(unit, nnx.State(params), codebook)
            own = None if randomness is None else randomness.of_layer(index)
            x, layer_cache, statistics = attend(
                x,
                layer_cache,
                cache.length,
                distances,
                documents,
                loss_mask,
                own,
                n_candidates,
            )
            return by_row(x), (layer_cache, statistics)

        keep = REMAT[config.remat_keeps]
        x, (layers, statistics) = lax.scan(
            jax.checkpoint(layer, policy=keep) if config.remat else gathered_again(layer),
            x,
            (params, codebooks, cache.layers, jnp.arange(config.n_layers)),
            unroll=min(config.unrolled_layers, config.n_layers),
        )
        if config.output_norm:
            x = self.output_norm(x)
        cache = Cache(
            layers,
            cache.length + tokens.shape[1],
            None if documents is None else documents[:, -1],
            None if starts is None else starts[:, -1],
        )
        return Features(x, cache, statistics)

    def logits(self, features: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        """Unnormalised log-probabilities of the next tokens, in the parameters' dtype."""
        whole = functools.partial(gathered, model=self.config, dtype=self.config.dtype)
        if self.config.tied_embeddings:
            weights = whole(self.embedding.table[...], "embedding/table").T
            bias = self.embedding.bias[...]
        else:
            weights = whole(self.output.kernel[...], "output/kernel")
            bias = self.output.bias[...]
        B, T, D = features.shape
        logits = jnp.matmul(  # of two plain matrices: see layers.project
            features.reshape(B * T, D),
            weights.astype(features.dtype),
            preferred_element_type=bias.dtype,
        )
        return ((logits + bias) * self.config.output_scale).reshape(B, T, -1)

    def distances(self) -> Float[Array, "P D"]:
        """The sinusoids of the distances that have a position term, 0 to M."""
        return self._sinusoids(jnp.arange(self.config.window + 1))

    def _sinusoids(self, positions: Int[Array, "*P"]) -> Float[Array, "*P D"]:
        config = self.config
        dtype = parameter_dtype(config)
        table = sinusoids(positions, config.d_model, config.position_base, dtype)
        return table.astype(config.dtype)


def initial_network(config: ModelConfig, key: Array) -> Network:
    """A network of the official initial values (MODEL.md section 1.10), from a PRNG key."""
    _, params, codebooks = nnx.split(
        Transformer(config, rngs=nnx.Rngs(params=key)), nnx.Param, CodebookVariable
    )
    return Network(nnx.to_pure_dict(params), nnx.to_pure_dict(codebooks))


def bind(config: ModelConfig, params: dict, codebooks: dict) -> Transformer:
    """The network over these arrays, to be called within the function that was given them."""
    return nnx.merge(_graph(config), nnx.State(params), nnx.State(codebooks))


@functools.lru_cache(maxsize=16)
def _graph(config: ModelConfig) -> nnx.GraphDef:
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0)))
    return nnx.split(abstract, nnx.Param, CodebookVariable)[0]


def initial_cache(config: ModelConfig, batch_size: int, capacity: int | None = None) -> Cache:
    """The cache of B rows before their first token.

    `capacity` is the most tokens that it will see; only a network that attends all keys needs it,
    and raises ConfigError without.
    """
    if config.attends_all_keys and capacity is None:
        raise ConfigError(
            "capacity: the cache of unquantised attention grows with the length, expected the"
            " most tokens that it will see, got none"
        )
    columns = capacity if config.attends_all_keys and capacity else config.window
    summarized = config.compressive_cache and config.quantized_keys
    layers = empty_cache(
        (config.n_layers, batch_size, config.kv_heads),
        capacity=columns,
        n_codes=config.n_codes if summarized else None,
        d_key=config.d_key,
        d_value=config.d_value,
        isolated=config.isolate_documents,
        dtype=jnp.dtype(config.dtype),
        statistics_dtype=parameter_dtype(config),
    )
    none = jnp.zeros(batch_size, jnp.int32) if config.isolate_documents else None
    return Cache(layers, jnp.zeros((), jnp.int32), none, none)


def _documents(
    tokens: Int[Array, "B T"], cache: Cache
) -> tuple[Int[Array, "B T"] | None, Int[Array, "B T"] | None]:
    """Number and first position of each token's document, which an eos begins."""
    if cache.document is None or cache.document_start is None:
        return None, None
    begins = tokens == EOS_ID
    positions = cache.length + jnp.arange(tokens.shape[1])
    documents = cache.document[:, None] + jnp.cumsum(begins, axis=1, dtype=jnp.int32)
    starts = lax.cummax(jnp.where(begins, positions, 0), axis=1)
    return documents, jnp.maximum(cache.document_start[:, None], starts)
