"""What a model and its optimizer are made of: configurations, presets and what is impossible.

Imports nothing but the standard library, so that a command line can read and check a recipe
without JAX.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

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
    d_feed_forward: int | None = None
    """null: layers are gated attention units, the published model. Otherwise attention has no gate,
    and is followed by two matrices with a squared ReLU between them, this wide."""
    n_heads: int = 1
    """Query heads. 1 is the paper's gated attention unit."""
    n_kv_heads: int | None = None
    """Key and value heads (H), each with its own codebook; they divide the query heads. null: as
    many as query heads (multi-head attention); 1: multi-query; between: grouped-query."""
    d_key: int = 64
    """Width of a head's queries and keys (K)."""
    d_value: int = 256
    """Width of a head's values and gate (V). The paper takes 2 d_model with one head."""
    quantized_keys: bool = True
    """Attend codewords in the place of keys. Off: plain softmax attention, quadratic in the
    length, the baseline to compare with."""
    n_codes: int = 128
    """Codewords of each head's codebook (S)."""
    window: int = 128
    """Recent tokens attended exactly, with a relative position each (M), besides the query's own.
    """
    compressive_cache: bool = True
    """Attend everything older than the window: through per-code counts and mean values, or through
    all keys if those are not quantised. Off: a plain sliding window of M + 1 keys."""
    isolate_documents: bool = False
    """Attend nothing before the eos that the token's document began with."""
    gradient_block: int | None = None
    """Tokens of the blocks that decide, in the official code, which keys pass gradients on to the
    projections: those no more than M before the query's block. null: those in the query's window,
    whatever the block length."""
    gradient_through_cache: bool = True
    """Within an update, let gradients reach keys and values of earlier blocks. Off needs
    gradient_block."""
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
    kmeans_iterations: int = 0
    """Iterations of k-means over the keys of the first update, from which the codebooks start; 0:
    they start at random, as published."""
    revive_below: float = 0.0
    """Give codes whose moving count falls below this a key of the update to start again from; 0:
    never, as published."""
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
    attention_form: Literal["serial", "parallel", "dense"] = field(
        default="serial", metadata=_OPERATIONAL
    )
    """How the one definition of attention is computed. serial: block after block. parallel: groups
    of blocks at once. dense: all scores at once, the baseline of benchmarks."""
    block_length: int | None = field(default=None, metadata=_OPERATIONAL)
    """Tokens that attention handles at a time (L); a tile of the computation that changes no
    result. null: gradient_block, else the window, at most 256."""
    parallel_blocks: int = field(default=8, metadata=_OPERATIONAL)
    """Blocks of a group in the parallel form."""
    remat: bool = field(default=False, metadata=_OPERATIONAL)
    """Recompute each layer in the backward pass instead of keeping its activations."""
    remat_keeps: Literal["nothing", "products"] = field(default="nothing", metadata=_OPERATIONAL)
    """What remat keeps of a layer all the same. products: those with weight matrices, most of a
    layer's arithmetic in a part of its memory."""
    unrolled_layers: int = field(default=1, metadata=_OPERATIONAL)
    """Layers in one iteration of the scan over layers. All of them spare a shallow network the
    stacking of activations (tiny on a CPU core: 11,400 tokens/s against 9,000) for twice the
    compile time."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads (H)."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def gated(self) -> bool:
        """Whether layers are gated attention units."""
        return self.d_feed_forward is None

    @property
    def attends_all_keys(self) -> bool:
        """Whether every earlier key is attended as it is, so that the cache grows."""
        return self.compressive_cache and not self.quantized_keys

    @property
    def tile(self) -> int:
        """Tokens that attention handles at a time (L)."""
        return self.block_length or self.gradient_block or min(self.window, 256)


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and the learning-rate schedule of the paper. Codebooks are outside all of it."""

    name: Literal["adamw", "lion", "adafactor"] = "adamw"
    """adamw, lion (its momentum in bfloat16), or adafactor (factored second moments, updates
    clipped at a root mean square of 1 and scaled by that of the parameter)."""
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
    b1: float | None = None
    """adamw: decay of the first moment. lion: weight of the momentum in the update. null: as
    published, 0.9 and 0.95. adafactor has none."""
    b2: float | None = None
    """adamw: decay of the second moment. lion: decay of the momentum. null: as published, 0.98.
    adafactor has none."""
    eps: float | None = None
    """adamw: added to the root of the second moment. null: as published, 1e-9. lion and adafactor
    have none."""
    loss_divisor: Literal["targets", "positions"] = "targets"
    """What an update's summed losses are divided by: its unmasked targets, or all B x U positions,
    masked ones too, as the official code has it."""

    @property
    def constants(self) -> dict[str, float]:
        """Those of b1, b2 and eps that the optimizer has: as stated, else as published."""
        return {
            name: published if (stated := getattr(self, name)) is None else stated
            for name, published in _PUBLISHED_CONSTANTS[self.name].items()
        }


_PUBLISHED_CONSTANTS: Mapping[str, Mapping[str, float]] = {
    "adamw": {"b1": 0.9, "b2": 0.98, "eps": 1e-9},
    "lion": {"b1": 0.95, "b2": 0.98},
    "adafactor": {},
}
"""Of the paper's optimizers (MODEL.md section 1.11)."""


def validate(model: ModelConfig, optimizer: OptimizerConfig | None = None) -> None:
    """Raises ConfigError, naming the field, if the configuration cannot work."""
    for name in (
        "n_layers",
        "n_heads",
        "d_model",
        "d_key",
        "d_value",
        "n_codes",
        "window",
        "parallel_blocks",
        "unrolled_layers",
    ):
        _at_least(f"model.{name}", getattr(model, name), 1)
    for name in ("n_kv_heads", "d_feed_forward", "block_length", "gradient_block"):
        if (value := getattr(model, name)) is not None:
            _at_least(f"model.{name}", value, 1)
    if model.n_heads % model.kv_heads:
        raise ConfigError(
            f"model.n_kv_heads: must divide model.n_heads ({model.n_heads}), got {model.kv_heads}"
        )
    _validate_attention(model)
    _at_least("model.vocab_size", model.vocab_size, N_SPECIAL + 1)
    if model.d_model % 2:
        raise ConfigError(f"model.d_model: must be even (sinusoids), got {model.d_model}")
    _positive("model.position_base", model.position_base)
    _positive("model.output_scale", model.output_scale)
    _at_least("model.commitment_weight", model.commitment_weight, 0)
    _between("model.codebook_decay", model.codebook_decay)
    for name in ("embedding_dropout", "sinusoid_dropout", "residual_dropout", "layer_dropout"):
        _between(f"model.{name}", getattr(model, name))
    _one_of("model.remat_keeps", model.remat_keeps, ("nothing", "products"))
    if model.remat_keeps != "nothing" and not model.remat:
        raise ConfigError(
            f"model.remat_keeps: {model.remat_keeps} is kept of what model.remat drops; set"
            " model.remat=true, or remat_keeps=nothing"
        )
    _one_of("model.dtype", model.dtype, ("float32", "bfloat16", "float64"))
    if optimizer is not None:
        _validate_optimizer(optimizer)


def _validate_attention(model: ModelConfig) -> None:
    _one_of("model.attention_form", model.attention_form, ("serial", "parallel", "dense"))
    if model.attention_form == "parallel" and model.attends_all_keys:
        raise ConfigError(
            "model.attention_form: must be serial or dense with model.quantized_keys=false,"
            " got parallel"
        )
    if model.attention_form == "dense" and model.gradient_block is not None:
        raise ConfigError(
            "model.attention_form: must be serial or parallel with model.gradient_block, got dense"
        )
    if not model.gradient_through_cache and model.gradient_block is None:
        raise ConfigError(
            "model.gradient_through_cache: off needs the blocks of model.gradient_block, got null"
        )
    if model.gradient_block and model.block_length not in (None, model.gradient_block):
        raise ConfigError(
            f"model.block_length: must be null or model.gradient_block ({model.gradient_block}),"
            f" got {model.block_length}"
        )
    if not model.quantized_keys:
        for name in ("kmeans_iterations", "revive_below"):
            if value := getattr(model, name):
                raise ConfigError(
                    f"model.{name}: must be 0 with model.quantized_keys=false, got {value}"
                )
    _at_least("model.kmeans_iterations", model.kmeans_iterations, 0)
    _at_least("model.revive_below", model.revive_below, 0)


def _validate_optimizer(optimizer: OptimizerConfig) -> None:
    _one_of("optimizer.name", optimizer.name, tuple(_PUBLISHED_CONSTANTS))
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
    constants = optimizer.constants
    for name in ("b1", "b2", "eps"):
        stated = getattr(optimizer, name)
        if stated is not None and name not in constants:
            raise ConfigError(
                f"optimizer.{name}: must be null with optimizer.name={optimizer.name}, which has"
                f" none, got {stated}"
            )
    for name, value in constants.items():
        (_positive if name == "eps" else _between)(f"optimizer.{name}", value)
    _one_of("optimizer.loss_divisor", optimizer.loss_divisor, ("targets", "positions"))


def validate_update_length(sequence_length: int, update_length: int) -> None:
    """Raises ConfigError unless a window of T tokens is cut into whole updates of U."""
    _divides("training.update_length", update_length, sequence_length, "the sequence length")


def validate_accumulation(rows: int, accumulate: int, whose: str) -> None:
    """Raises ConfigError unless the rows, of a batch or a device (`whose`), make whole
    micro-batches."""
    _divides("training.accumulate", accumulate, rows, f"the rows of {whose},")


def _divides(field: str, value: int, whole: int, what: str) -> None:
    _at_least(field, value, 1)
    if whole % value:
        divisors = (n for n in range(1, whole + 1) if whole % n == 0)
        nearest = min(divisors, key=lambda n: abs(n - value))
        raise ConfigError(
            f"{field}: must divide {what} {whole}, got {value}; the nearest is {nearest}"
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
    window=512,
    gradient_block=512,
    dtype="bfloat16",
    remat=True,
)

PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        # Half a million parameters: what two CPU cores train to readable text in a minute.
        "tiny": ModelConfig(d_key=32, n_codes=64, window=64, unrolled_layers=4),
        # Two million: a serious CPU run, the size of the benchmarks.
        "small": ModelConfig(
            d_model=256, d_key=128, d_value=512, n_codes=256, window=512, unrolled_layers=4
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
