"""What a model costs: its parameters, and the operations of a token.

Imports nothing but the standard library, so that a command line can count without JAX.
"""

from typing import NamedTuple

from model.config import ModelConfig


class ParameterCount(NamedTuple):
    """Numbers a model consists of."""

    trained: int
    """Parameters the optimizer moves."""
    codebook: int
    """Codebook sums and counts, moved by moving averages."""


def parameter_count(config: ModelConfig) -> ParameterCount:
    """Counts the parameters.

    With H key and value heads and G query heads, a unit has DK(G + 2H) (queries, keys, relative
    positions) + DVH (values) + DVG (output) + 2GK (the two score biases) + 2D (norm), DVG more for
    a gate or 2DF + 2D for a feed-forward unit, and HS(K + 1) of codebook; the embeddings
    (vocab_size)(D + 1), the output bias counted when untied too, where the official code keeps an
    unused one. MODEL.md sections 1.1, 1.10 and 1.14.
    """
    D, K, V = config.d_model, config.d_key, config.d_value
    H, G, F = config.kv_heads, config.n_heads, config.d_feed_forward
    unit = D * K * (G + 2 * H) + D * V * (H + G) + 2 * G * K + 2 * D
    unit += D * V * G if config.gated else 0
    unit += 2 * D * F + 2 * D if F is not None else 0
    embeddings = config.vocab_size * (D + 1)
    output = 0 if config.tied_embeddings else config.vocab_size * (D + 1)
    norm = 2 * D if config.output_norm else 0
    scale = 1 if config.absolute_positions else 0
    codebook = H * config.n_codes * (K + 1) if config.quantized_keys else 0
    return ParameterCount(
        trained=config.n_layers * unit + embeddings + output + norm + scale,
        codebook=config.n_layers * codebook,
    )


def flops_per_token(config: ModelConfig, sequence_length: int, *, training: bool = True) -> int:
    """Floating-point operations a token of a window of T costs, two per multiply-add of a matrix
    product.

    Per unit, in multiply-adds, with H key and value heads and G query heads: projections
    D(K(G + H) + V(G + H)), DVG more for a gate or 2DF for a feed-forward unit; scores and weighted
    values G(K + V) for each of the N columns that a query is scored against, positions G(M + 1)K.
    Quantised, N = M + L + S, the whole buffer and the codewords (the buffer without the compressive
    cache), and besides HSK for the nearest code and HSV for merging values into the cache. Of
    unquantised attention only the causal pairs count, N = (T + 1) / 2. In the dense form L = T.
    The output is D times the vocabulary. Training is three times the forward pass, less what has
    one gradient or none: the nearest code none, codewords none as factors of scores, one-hot codes
    none in merging; and HSK more for the codebook sums. Not counted: recomputation, and what is
    done once an update whatever its tokens (`flops_per_update`). With that it is, but for
    unquantised attention, to the last one what the traced program multiplies.
    """
    D, K, V, S = config.d_model, config.d_key, config.d_value, config.n_codes
    H, G, T = config.kv_heads, config.n_heads, sequence_length
    unit = D * (K + V) * (G + H) + G * (config.window + 1) * K
    unit += D * V * G if config.gated else 2 * D * (config.d_feed_forward or 0)
    without_gradient = 0
    if config.attends_all_keys:
        columns = (T + 1) // 2
    else:
        columns = config.window + (T if config.attention_form == "dense" else config.tile)
        if config.compressive_cache:
            columns += S
            unit += H * S * V
            without_gradient += G * S * K + H * S * V
    unit += G * columns * (K + V)
    codes = H * S * K if config.quantized_keys else 0
    forward = config.n_layers * (unit + codes) + D * config.vocab_size
    if not training:
        return 2 * forward
    return 2 * (3 * forward - config.n_layers * (without_gradient + codes))


def flops_per_update(config: ModelConfig, *, training: bool = True) -> int:
    """Those of the projected position table, DK(M + 1) a key head and layer, once a micro-batch of
    an update (an evaluation: once a batch); training has the gradient of its weights besides."""
    table = 2 * config.n_layers * config.kv_heads * config.d_key * config.d_model
    return table * (config.window + 1) * (2 if training else 1)
