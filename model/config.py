"""What a model and its optimizer are made of: configurations, presets, parameter and FLOP counts.

Imports nothing but the standard library, so that a command line can read and check a recipe
without JAX.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, NamedTuple

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
"""Special tokens of every vocabulary; text begins at id 3."""
N_SPECIAL = 3

_OPERATIONAL = {"operational": True}
"""Metadata of the fields that change memory and speed, not the mathematics: no part of a run's
identity."""


class ConfigError(ValueError):
    """A configuration that cannot work. The message names the field, the need and what it got."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of gated attention units with vector-quantised keys (Transformer-VQ)."""

    vocab_size: int = 259
    """Token ids the model knows: 0 pad, 1 eos, 2 unk, then the text's."""
    n_layers: int = 4
    """Gated attention units (the official code's `n_layer` counts pairs of them)."""
    d_model: int = 128
    """Width of the residual stream (D). Even."""
    n_heads: int = 1
    """Heads (H), each with its own codebook. 1 is the paper's gated attention unit."""
    d_key: int = 64
    """Width of a head's queries and keys (K)."""
    d_value: int = 256
    """Width of a head's values and gate (V). The paper takes 2 d_model with one head."""
    n_codes: int = 128
    """Codewords of each head's codebook (S)."""
    block_length: int = 128
    """Tokens that attention handles at a time (L). With the compressive cache the outputs do not
    depend on it, only the reach of the straight-through key gradients (the keys of the window
    buffer, M before the block's start) does."""
    window: int = 128
    """Recent tokens attended exactly, with a relative position each (M), besides the query's own.
    """
    compressive_cache: bool = True
    """Attend everything older than the window through per-code counts and mean values. Off: a
    plain sliding window of M + 1 keys."""
    gradient_through_cache: bool = True
    """Within an update, let gradients reach keys and values of earlier blocks."""
    position_base: float = 1e5
    """Longest sinusoid wavelength over 2 pi, of relative and absolute positions."""
    absolute_positions: bool = False
    """Add scaled absolute sinusoids to the embeddings; the scale is learnt and starts at 0."""
    tied_embeddings: bool = False
    """Score outputs with the input embeddings instead of a projection of their own."""
    output_norm: bool = True
    """Normalise the residual stream before the output projection."""
    output_scale: float = 1.0
    """Factor on the logits, bias included."""
    commitment_weight: float = 1e-4
    """Weight of the loss that pulls keys to their codewords; summed over layers and heads."""
    codebook_decay: float = 0.99
    """Decay per update of the codebooks' moving sums and counts."""
    embedding_dropout: float = 0.0
    """Fraction of the embeddings' elements set to 0, anew each update."""
    sinusoid_dropout: float = 0.0
    """Fraction of the relative sinusoids' elements set to 0: one mask a layer for a whole batch."""
    residual_dropout: float = 0.0
    """Fraction of the elements that a layer adds set to 0, anew each update."""
    layer_dropout: float = 0.0
    """Chance that a layer adds nothing to a row, for a whole batch."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of activations. Parameters, scores, cache statistics and logits are never narrower than
    float32; float64 makes everything float64 and needs JAX_ENABLE_X64."""
    remat: bool = field(default=False, metadata=_OPERATIONAL)
    """Recompute each layer in the backward pass instead of keeping its activations."""
    unrolled_layers: int = field(default=1, metadata=_OPERATIONAL)
    """Layers in one iteration of the scan over layers. All of them spare a shallow network the
    stacking of activations (tiny on a CPU core: 11,400 tokens/s against 9,000) for twice the
    compile time."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with the learning-rate schedule of the paper. Codebooks are outside all of it."""

    learning_rate: float = 4e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warmup: to a tenth of the peak at `schedule_steps`, or constant at the peak."""
    warmup_steps: int = 0
    """Updates of linear warmup; the first update has multiplier 0 when there are any."""
    schedule_steps: int | None = None
    """Update at which the schedule reaches its floor. Needed by cosine and linear."""
    gradient_clip: float | None = None
    """Largest global norm of the gradient; None leaves it alone."""
    weight_decay: float = 0.0
    """Decay of kernels, embeddings and the position scale; gains and biases have none."""
    weight_decay_form: Literal["scaled", "unscaled"] = "scaled"
    """scaled: times the current learning rate, as AdamW has it. unscaled: the same fraction every
    update whatever the learning rate, as the official Transformer-VQ code has it."""
    b1: float = 0.9
    """Decay of Adam's first moment."""
    b2: float = 0.98
    """Decay of Adam's second moment."""
    eps: float = 1e-9
    """Added to the root of Adam's second moment."""
    loss_divisor: Literal["targets", "positions"] = "targets"
    """What an update's summed losses are divided by: its unmasked targets, or all B x U positions,
    masked ones too, as the official code has it."""


class ParameterCount(NamedTuple):
    """Numbers a model consists of."""

    trained: int
    """Parameters the optimizer moves."""
    codebook: int
    """Codebook sums and counts, moved by moving averages."""


def validate(model: ModelConfig, optimizer: OptimizerConfig | None = None) -> None:
    """Raises ConfigError, naming the field, if the configuration cannot work."""
    for name in (
        "n_layers",
        "n_heads",
        "d_model",
        "d_key",
        "d_value",
        "n_codes",
        "block_length",
        "window",
        "unrolled_layers",
    ):
        _at_least(f"model.{name}", getattr(model, name), 1)
    _at_least("model.vocab_size", model.vocab_size, N_SPECIAL + 1)
    if model.d_model % 2:
        raise ConfigError(f"model.d_model: must be even (sinusoids), got {model.d_model}")
    _positive("model.position_base", model.position_base)
    _positive("model.output_scale", model.output_scale)
    _at_least("model.commitment_weight", model.commitment_weight, 0)
    _between("model.codebook_decay", model.codebook_decay)
    for name in ("embedding_dropout", "sinusoid_dropout", "residual_dropout", "layer_dropout"):
        _between(f"model.{name}", getattr(model, name))
    _one_of("model.dtype", model.dtype, ("float32", "bfloat16", "float64"))
    if optimizer is not None:
        _validate_optimizer(optimizer)


def _validate_optimizer(optimizer: OptimizerConfig) -> None:
    _positive("optimizer.learning_rate", optimizer.learning_rate)
    _one_of("optimizer.schedule", optimizer.schedule, ("cosine", "linear", "constant"))
    _at_least("optimizer.warmup_steps", optimizer.warmup_steps, 0)
    if optimizer.schedule != "constant":
        if optimizer.schedule_steps is None:
            raise ConfigError(
                f"optimizer.schedule_steps: needed by optimizer.schedule={optimizer.schedule}, "
                "got none"
            )
        _at_least("optimizer.schedule_steps", optimizer.schedule_steps, 1)
        if optimizer.schedule_steps <= optimizer.warmup_steps:
            raise ConfigError(
                "optimizer.schedule_steps: must be more than optimizer.warmup_steps "
                f"({optimizer.warmup_steps}), got {optimizer.schedule_steps}"
            )
    if optimizer.gradient_clip is not None:
        _positive("optimizer.gradient_clip", optimizer.gradient_clip)
    _at_least("optimizer.weight_decay", optimizer.weight_decay, 0)
    _one_of("optimizer.weight_decay_form", optimizer.weight_decay_form, ("scaled", "unscaled"))
    _between("optimizer.b1", optimizer.b1)
    _between("optimizer.b2", optimizer.b2)
    _positive("optimizer.eps", optimizer.eps)
    _one_of("optimizer.loss_divisor", optimizer.loss_divisor, ("targets", "positions"))


def validate_update_length(sequence_length: int, update_length: int) -> None:
    """Raises ConfigError unless a window of T tokens is cut into whole updates of U."""
    _at_least("training.update_length", update_length, 1)
    if sequence_length % update_length:
        divisors = (n for n in range(1, sequence_length + 1) if sequence_length % n == 0)
        nearest = min(divisors, key=lambda n: abs(n - update_length))
        raise ConfigError(
            f"training.update_length: must divide the sequence length {sequence_length}, "
            f"got {update_length}; the nearest is {nearest}"
        )


def _at_least(field: str, value: float | int, least: float | int) -> None:
    if not value >= least:
        raise ConfigError(f"{field}: must be at least {least}, got {value}")


def _positive(field: str, value: float | int) -> None:
    if not 0 < value < float("inf"):
        raise ConfigError(f"{field}: must be positive and finite, got {value}")


def _between(field: str, value: float | int) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{field}: must be in [0, 1), got {value}")


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{field}: must be one of {', '.join(allowed)}, got {value}")


_PAPER = ModelConfig(
    n_layers=48,
    d_key=128,
    n_codes=512,
    block_length=512,
    window=512,
    dtype="bfloat16",
    remat=True,
)

PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        # Half a million parameters: what two CPU cores train to readable text in a minute.
        "tiny": ModelConfig(d_key=32, n_codes=64, block_length=64, window=64, unrolled_layers=4),
        # Four million: a serious CPU run, the size of the benchmarks.
        "small": ModelConfig(
            d_model=256, d_key=128, d_value=512, n_codes=256, block_length=512, window=512
        ),
        # The paper's three (MODEL.md section 2.1).
        "enwik8": replace(
            _PAPER,
            d_model=768,
            d_value=1536,
            output_norm=False,
            sinusoid_dropout=0.2,
            residual_dropout=0.5,
            layer_dropout=0.3,
        ),
        "pg19": replace(
            _PAPER,
            vocab_size=32_000,
            d_model=2048,
            d_value=4096,
            tied_embeddings=True,
            output_scale=0.005,
            sinusoid_dropout=0.1,
            residual_dropout=0.1,
            layer_dropout=0.1,
        ),
        "imagenet64": replace(
            _PAPER,
            d_model=2048,
            d_value=4096,
            absolute_positions=True,
            tied_embeddings=True,
            output_scale=0.005,
            sinusoid_dropout=0.1,
        ),
    }
)
"""Models by name. The sizes of the paper's three are those of its code."""


def parameter_count(config: ModelConfig) -> ParameterCount:
    """Counts the parameters.

    A unit has 2DKH (queries, relative positions) + D(K + 2V)H (keys, values, gate) + VHD (output)
    + 2HK (the two score biases) + 2D (norm), and HS(K + 1) of codebook; the embeddings
    (vocab_size)(D + 1), the output bias counted when untied too, where the official code keeps an
    unused one. MODEL.md sections 1.1 and 1.10.
    """
    D, H, K, V = config.d_model, config.n_heads, config.d_key, config.d_value
    unit = 2 * D * K * H + D * (K + 2 * V) * H + V * H * D + 2 * H * K + 2 * D
    embeddings = config.vocab_size * (D + 1)
    output = 0 if config.tied_embeddings else config.vocab_size * (D + 1)
    norm = 2 * D if config.output_norm else 0
    scale = 1 if config.absolute_positions else 0
    return ParameterCount(
        trained=config.n_layers * unit + embeddings + output + norm + scale,
        codebook=config.n_layers * H * config.n_codes * (K + 1),
    )


def flops_per_token(config: ModelConfig, *, training: bool = True) -> int:
    """Floating-point operations a token costs, two per multiply-add of a matrix product.

    Per unit and head, in multiply-adds: projections D(2K + 3V); nearest code SK; scores against
    the window buffer and the codewords (M + L + S)K, positions (M + 1)K; weighted values
    (M + L + S)V; merging values into the cache SV. The output is D times the vocabulary. Training
    is three times the forward pass, plus SK for the codebook sums; recomputation (`remat`) and
    the projected position table (once an update) are not counted.
    """
    D, K, V, S = config.d_model, config.d_key, config.d_value, config.n_codes
    M, L = config.window, config.block_length
    attended = M + L + (S if config.compressive_cache else 0)
    merge = S * V if config.compressive_cache else 0
    head = D * (2 * K + 3 * V) + S * K + attended * (K + V) + (M + 1) * K + merge
    forward = config.n_layers * config.n_heads * head + D * config.vocab_size
    if not training:
        return 2 * forward
    return 2 * (3 * forward + config.n_layers * config.n_heads * S * K)
