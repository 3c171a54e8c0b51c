"""Import of the official code's checkpoints: a flax msgpack TrainState, with the script's flags.

That is the published version with caches (MODEL.md section 1). The later one normalises without
gains and has no output bias: another model.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util

from model.config import ConfigError, ModelConfig, OptimizerConfig, validate
from model.transformer import Network, initial_network

NETWORK_LEAVES = {
    "token_embedder/embs": ("embedding/table",),
    "token_embedder/bias_out": ("embedding/bias",),
    "position_embedder/scale": ("position/scale",),
    "out_ln/g": ("output_norm/gain",),
    "out_ln/b": ("output_norm/bias",),
    "out_proj/kernel": ("output/kernel",),
    "out_proj/bias": ("output/bias",),
}
"""Official leaves and the parameters of ours in them. Which there are depends on the flags."""

LAYER_LEAVES = {
    "input_ln/g": ("norm/gain",),
    "input_ln/b": ("norm/bias",),
    "q_proj/kernel": ("query",),
    "kvg_proj/kernel": ("key", "value", "gate"),
    "r_proj/kernel": ("distance",),
    "res_proj/kernel": ("output",),
    "u": ("content_bias",),
    "v": ("position_bias",),
    "quantizer/c_sum": ("codebook/sums",),
    "quantizer/c_count": ("codebook/counts",),
}
"""The same of one gated attention unit; several parameters lie side by side on the last axis."""

PAIR = "transformer_layers_"
"""Pairs of units are named this and their number."""


class Imported(NamedTuple):
    """What a checkpoint of the official code is here."""

    model: ModelConfig
    optimizer: OptimizerConfig | None
    """None if the flags state none, or the schedule inv_sqrt, which grows to infinity and is not
    here."""
    network: Network
    """numpy arrays, in the dtype of parameters."""
    updates: int
    """Optimizer steps that it was trained for."""


def read_checkpoint(data: bytes, flags: str | Mapping[str, Any]) -> Imported:
    """The network in a TrainState file's bytes, whose optimizer state is left.

    `flags` are those of the official script, as a JSON object or what one decodes to; the
    vocabulary's size, which the script takes from its data set, may be missing. Raises ConfigError
    naming the flag or leaf that does not fit.
    """
    updates, leaves = _trained(data)
    flags = _decoded(flags)
    if table_shape := np.shape(leaves.get("token_embedder/embs", ())):
        flags = {"n_vocab": table_shape[0]} | flags
    model, optimizer = read_flags(flags)
    return Imported(model, optimizer, network_from(model, leaves), updates)


def read_flags(flags: str | Mapping[str, Any]) -> tuple[ModelConfig, OptimizerConfig | None]:
    """The configurations that the official script's flags mean; see `Imported`.

    Raises ConfigError naming a flag that is missing, unknown or cannot be had.
    """
    flags = {name: value for name, value in _decoded(flags).items() if name not in _UNREAD_FLAGS}
    for name in sorted(flags.keys() - {*_MODEL_FLAGS, *_OPTIMIZER_FLAGS, *_FIXED_FLAGS}):
        raise ConfigError(
            f"official flag {name}: must be a flag of the version with caches, got {flags[name]!r}"
        )
    for name, needed in _FIXED_FLAGS.items():
        if flags.get(name, needed) != needed:
            raise ConfigError(f"official flag {name}: must be {needed}, got {flags[name]!r}")
    flags = {"pe_lam": 100_000, "grad_clip": None} | flags  # the script's own defaults
    model = ModelConfig(**_fields(flags, _MODEL_FLAGS))
    optimizer = None
    if flags.get("lr_max") is not None:
        fields = _fields(flags, _OPTIMIZER_FLAGS)
        if fields["schedule"] != "inv_sqrt":
            optimizer = OptimizerConfig(
                **fields, weight_decay_form="unscaled", loss_divisor="positions"
            )
    try:
        validate(model, optimizer)
    except ConfigError as error:
        raise ConfigError(_in_flags(str(error))) from None
    return model, optimizer


def network_from(model: ModelConfig, leaves: Mapping[str, Any]) -> Network:
    """The network, or its gradients, in official leaves by their path, the params collection's
    name left out. numpy arrays in the dtype of parameters, layers stacked.

    Raises ConfigError naming a leaf that is missing, left over, of another shape or no float.
    """
    pairs = len({name.partition("/")[0] for name in leaves if name.startswith(PAIR)})
    if 2 * pairs != model.n_layers:
        raise ConfigError(
            f"official flag n_layer: must be the checkpoint's {pairs} pairs of layers, "
            f"got {model.n_layers // 2}"
        )
    unread = dict(leaves)
    expected = jax.eval_shape(lambda: initial_network(model, jax.random.key(0)))
    shapes = {
        _name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(expected)
    }
    arrays: dict[str, np.ndarray] = {}
    for official, names in NETWORK_LEAVES.items():
        if names[0] in shapes:
            widths = [shapes[name] for name in names]
            arrays |= zip(names, _split(_take(unread, official, widths), widths), strict=True)
    for official, names in LAYER_LEAVES.items():
        names = [f"layers/{name}" for name in names]
        widths = [shapes[name][1:] for name in names]
        stacked = np.stack(
            [
                _take(unread, f"{PAIR}{n // 2}/scanned_attn{n % 2 + 1}/{official}", widths)
                for n in range(model.n_layers)
            ]
        )
        arrays |= zip(names, _split(stacked, widths), strict=True)
    for name in unread:
        raise ConfigError(
            f"official leaf {name}: must have a place in the model of these flags, "
            f"got shape {np.shape(unread[name])}"
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: arrays[_name(path)].astype(leaf.dtype), expected
    )


def _name(path: tuple) -> str:
    """A leaf's path in params or codebooks, slashes between."""
    return jax.tree_util.keystr(path[1:], simple=True, separator="/")


def _take(unread: dict[str, Any], name: str, shapes: list[tuple[int, ...]]) -> np.ndarray:
    """Removes the leaf that holds arrays of these shapes side by side."""
    shape = shapes[0] if len(shapes) == 1 else (*shapes[0][:-1], sum(s[-1] for s in shapes))
    if name not in unread:
        raise ConfigError(f"official leaf {name}: must be there with shape {shape}, got none")
    leaf = np.asarray(unread.pop(name))
    if leaf.shape != shape:
        raise ConfigError(f"official leaf {name}: must have shape {shape}, got {leaf.shape}")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ConfigError(f"official leaf {name}: must be of floats, got {leaf.dtype}")
    return leaf


def _split(array: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    if len(shapes) == 1:
        return [array]
    return np.split(array, np.cumsum([shape[-1] for shape in shapes[:-1]]), axis=-1)


def _trained(data: bytes) -> tuple[int, dict[str, Any]]:
    """The steps made, and the parameters' leaves by their path."""
    try:
        state = serialization.msgpack_restore(data)
    except Exception as error:  # msgpack, numpy and flax each raise their own of damaged bytes
        raise ConfigError(
            f"official checkpoint: must be a flax msgpack file, got {len(data)} bytes that are "
            f"none ({' '.join(str(error).split()) or type(error).__name__})"
        ) from error
    params = state.get("params") if isinstance(state, dict) else None
    if isinstance(params, dict) and isinstance(params.get("params"), dict):
        params = params["params"]  # a variables dict, its collection not taken out
    if not isinstance(params, dict):
        found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ConfigError(f"official checkpoint: must be a TrainState with params, got {found}")
    step = np.asarray(state["step"]) if "step" in state else None
    if step is None or step.shape or not np.issubdtype(step.dtype, np.integer) or step < 0:
        raise ConfigError(
            f"official checkpoint: step must be a whole number of updates, got {step}"
        )
    flat = traverse_util.flatten_dict(params)
    return int(step), {"/".join(map(str, path)): leaf for path, leaf in flat.items()}


# ---- Flags ---------------------------------------------------------------------------------------


def _decoded(flags: str | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(flags, str):
        try:
            flags = json.loads(flags)
        except ValueError as error:
            raise ConfigError(f"official flags: must be JSON, got {error}") from None
    if not isinstance(flags, Mapping):
        raise ConfigError(f"official flags: must be a JSON object, got {type(flags).__name__}")
    return dict(flags)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("a whole number")
    return value


def _pairs(value: Any) -> int:
    return 2 * _whole(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("a number")
    return float(value)


def _number_or_null(value: Any) -> float | None:
    return None if value is None else _number(value)


def _switch(value: Any) -> bool:
    if value not in (0, 1):
        raise TypeError("0 or 1")
    return bool(value)


def _one_of(*allowed: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in allowed:
            raise TypeError(f"one of {', '.join(allowed)}")
        return value

    return check


_MODEL_FLAGS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "n_vocab": ("vocab_size", _whole),
    "n_layer": ("n_layers", _pairs),
    "d_model": ("d_model", _whole),
    "n_head": ("n_heads", _whole),
    "d_k": ("d_key", _whole),
    "d_v": ("d_value", _whole),
    "n_code": ("n_codes", _whole),
    "block_len": ("gradient_block", _whole),
    "mem_len": ("window", _whole),
    "agg_cache": ("compressive_cache", _switch),
    "grad_thru_cache": ("gradient_through_cache", _switch),
    "pe_lam": ("position_base", _number),
    "pe_abs": ("absolute_positions", _switch),
    "e_tie": ("tied_embeddings", _switch),
    "e_preln": ("output_norm", _switch),
    "e_scale": ("output_scale", _number),
    "c_beta": ("commitment_weight", _number),
    "c_gamma": ("codebook_decay", _number),
    "p_dropemb": ("embedding_dropout", _number),
    "p_dropsin": ("sinusoid_dropout", _number),
    "p_dropres": ("residual_dropout", _number),
    "p_droplyr": ("layer_dropout", _number),
    "dtype": ("dtype", _one_of("float32", "bfloat16")),
}
"""Flags, our fields of the same meaning, and how a value is read."""

_OPTIMIZER_FLAGS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "optimizer": ("name", _one_of("adamw", "lion", "adafactor")),
    "lr_max": ("learning_rate", _number),
    "lr_schedule": ("schedule", _one_of("cosine", "linear", "inv_sqrt")),
    "n_warmup_step": ("warmup_steps", _whole),
    "n_max_step": ("schedule_steps", _whole),
    "grad_clip": ("gradient_clip", _number_or_null),
    "wd_lam": ("weight_decay", _number),
}

_FIXED_FLAGS = {"d_ff": 0, "no_emb": 0}
"""Flags of parts that the published models do not have."""

_UNREAD_FLAGS = {
    "multihost", "command", "dataset", "data_dir", "vocab_path", "prng_seed", "global_batch_size",
    "sequence_len", "update_len", "param_dtype", "p_nucleus", "n_extra_step", "n_print_step",
    "n_save_step", "n_eval_step", "n_save_keep", "in_checkpoint_dir", "out_checkpoint_dir",
    "model_name", "run_id", "is_train",
}  # fmt: skip
"""Flags of the run and its data, which the network does not depend on. Parameters are float32
here whatever their dtype there."""


def _fields(
    flags: Mapping[str, Any], table: Mapping[str, tuple[str, Callable[[Any], Any]]]
) -> dict[str, Any]:
    """The fields that the flags of a table give."""
    fields = {}
    for name, (field, read) in table.items():
        if name not in flags:
            raise ConfigError(f"official flag {name}: must be given, got none")
        try:
            fields[field] = read(flags[name])
        except TypeError as error:
            raise ConfigError(
                f"official flag {name}: must be {error}, got {flags[name]!r}"
            ) from None
    return fields


def _in_flags(message: str) -> str:
    """An error of a configuration, with the flag in the place of our field."""
    section, _, rest = message.partition(".")
    field, _, need = rest.partition(":")
    table = _MODEL_FLAGS if section == "model" else _OPTIMIZER_FLAGS
    names = {ours: name for name, (ours, _) in table.items()}
    return f"official flag {names.get(field, field)}:{need}"
