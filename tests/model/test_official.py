"""Checkpoints of the official code become ours: golden ones, made-up ones, damaged ones."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization, traverse_util

from model.config import PRESETS, ConfigError
from model.official import read_checkpoint, read_flags
from model.transformer import bind, initial_cache
from tests.model.golden import Golden

FLAGS = {
    "n_vocab": 11, "n_layer": 1, "d_model": 6, "n_head": 1, "d_k": 4, "d_v": 5, "n_code": 7,
    "block_len": 8, "mem_len": 9, "agg_cache": 1, "grad_thru_cache": 1, "pe_abs": 0,
    "pe_lam": 100_000, "e_tie": 0, "e_preln": 0, "e_scale": 1.0, "c_beta": 1e-4, "c_gamma": 0.99,
    "p_dropemb": 0.0, "p_dropsin": 0.2, "p_dropres": 0.5, "p_droplyr": 0.3, "dtype": "bfloat16",
}  # fmt: skip
OPTIMIZER_FLAGS = {
    "optimizer": "adamw", "lr_max": 4e-4, "lr_schedule": "cosine", "wd_lam": 2e-4,
    "grad_clip": 0.1, "n_warmup_step": 10_000, "n_max_step": 125_000,
}  # fmt: skip


def official_leaves(flags: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random parameters of the official shapes, as MODEL.md and the golden data's README say."""
    noise = np.random.default_rng(seed)
    D, H, K, V, S = (flags[name] for name in ("d_model", "n_head", "d_k", "d_v", "n_code"))
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedder/embs": (flags["n_vocab"], D),
        "token_embedder/bias_out": (flags["n_vocab"],),
    }
    if flags["pe_abs"]:
        shapes["position_embedder/scale"] = ()
    if flags["e_preln"]:
        shapes |= {"out_ln/g": (D,), "out_ln/b": (D,)}
    if not flags["e_tie"]:
        shapes |= {"out_proj/kernel": (D, flags["n_vocab"]), "out_proj/bias": (flags["n_vocab"],)}
    for pair in range(flags["n_layer"]):
        for unit in ("scanned_attn1", "scanned_attn2"):
            shapes |= {
                f"transformer_layers_{pair}/{unit}/{name}": shape
                for name, shape in {
                    "input_ln/g": (D,),
                    "input_ln/b": (D,),
                    "q_proj/kernel": (D, H * K),
                    "kvg_proj/kernel": (D, H * (K + 2 * V)),
                    "r_proj/kernel": (D, H * K),
                    "res_proj/kernel": (H * V, D),
                    "u": (H * K,),
                    "v": (H * K,),
                    "quantizer/c_sum": (H, S, K),
                    "quantizer/c_count": (H, S),
                }.items()
            }
    return {
        name: np.asarray(noise.normal(size=shape), np.float32) for name, shape in shapes.items()
    }


def file_of(leaves: dict, *, collection: bool = False) -> bytes:
    """A TrainState's file, its optimizer state of the same names, as Adam's is."""
    params = traverse_util.unflatten_dict(leaves, sep="/")
    params = {"params": params} if collection else params
    moments = jax.tree.map(lambda leaf: np.full_like(leaf, 7), params)
    optimizer = {"inner_states": {"main": {"inner_state": {"0": {"mu": moments, "nu": moments}}}}}
    return serialization.msgpack_serialize(
        {"step": 125_000, "params": params, "opt_state": optimizer}
    )


@pytest.mark.parametrize(
    "name",
    [
        "g1_enwik8like",
        *(pytest.param(n, marks=pytest.mark.compiles) for n in ("g2_pg19like_h4", "g4_noagg")),
    ],
)
def test_golden_checkpoints_give_the_golden_probabilities(name):
    golden = Golden(name)
    data, flags = file_of(golden.leaves("params/")), json.dumps(golden.flags)
    model, optimizer, network, _ = read_checkpoint(data, flags)
    assert optimizer is not None
    assert optimizer.weight_decay_form == "unscaled"

    @jax.jit
    def run(network, inputs):
        bound = bind(model, *network)
        return jax.nn.log_softmax(bound.logits(bound(inputs, initial_cache(model, 2)).features))

    expected = golden["eval/u0/logprobs"]
    np.testing.assert_allclose(run(network, golden.rows(0).inputs), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "collection"),
    [
        ({}, False),
        ({"n_head": 3, "n_layer": 2}, True),
        ({"pe_abs": 1, "e_tie": 1, "e_preln": 1}, False),
        ({"n_head": 2, "agg_cache": 0, "grad_thru_cache": 0, "e_preln": 1, "n_layer": 3}, True),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_number_has_its_place(changes, collection, dtype):
    flags = FLAGS | changes
    leaves = {name: leaf.astype(jnp.dtype(dtype)) for name, leaf in official_leaves(flags).items()}
    model, _, (params, codebooks), updates = read_checkpoint(
        file_of(leaves, collection=collection), flags
    )
    assert updates == 125_000
    leaves = {name: leaf.astype(np.float32) for name, leaf in leaves.items()}
    same = np.testing.assert_array_equal

    same(params["embedding"]["table"], leaves["token_embedder/embs"])
    same(params["embedding"]["bias"], leaves["token_embedder/bias_out"])
    assert ("position" in params, "output_norm" in params, "output" in params) == (
        bool(flags["pe_abs"]), bool(flags["e_preln"]), not flags["e_tie"]
    )  # fmt: skip
    if flags["pe_abs"]:
        same(params["position"]["scale"], leaves["position_embedder/scale"])
    if flags["e_preln"]:
        same(params["output_norm"]["gain"], leaves["out_ln/g"])
        same(params["output_norm"]["bias"], leaves["out_ln/b"])
    if not flags["e_tie"]:
        same(params["output"]["kernel"], leaves["out_proj/kernel"])
        same(params["output"]["bias"], leaves["out_proj/bias"])

    H, K, V = flags["n_head"], flags["d_k"], flags["d_v"]
    layers, codebook = params["layers"], codebooks["layers"]["codebook"]
    assert model.n_layers == len(layers["query"]) == 2 * flags["n_layer"]
    for n in range(model.n_layers):
        own = f"transformer_layers_{n // 2}/scanned_attn{1 + n % 2}/"
        same(layers["norm"]["gain"][n], leaves[own + "input_ln/g"])
        same(layers["norm"]["bias"][n], leaves[own + "input_ln/b"])
        same(layers["query"][n], leaves[own + "q_proj/kernel"])
        same(layers["distance"][n], leaves[own + "r_proj/kernel"])
        same(layers["output"][n], leaves[own + "res_proj/kernel"])
        same(layers["content_bias"][n], leaves[own + "u"])
        same(layers["position_bias"][n], leaves[own + "v"])
        same(codebook["sums"][n], leaves[own + "quantizer/c_sum"])
        same(codebook["counts"][n], leaves[own + "quantizer/c_count"])
        columns = leaves[own + "kvg_proj/kernel"]
        for h in range(H):
            keys, values = slice(h * K, (h + 1) * K), slice(h * V, (h + 1) * V)
            same(layers["key"][n][:, keys], columns[:, keys])
            same(layers["value"][n][:, values], columns[:, H * K :][:, values])
            same(layers["gate"][n][:, values], columns[:, H * (K + V) :][:, values])
    assert {leaf.dtype for leaf in jax.tree.leaves((params, codebooks))} == {np.dtype("float32")}


def test_flags_of_the_published_enwik8_are_the_preset():
    flags = FLAGS | OPTIMIZER_FLAGS
    flags |= {"n_vocab": 259, "n_layer": 24, "d_model": 768, "d_k": 128, "d_v": 1536}
    flags |= {"n_code": 512, "block_len": 512, "mem_len": 512, "d_ff": 0, "run_id": None}
    model, optimizer = read_flags(json.dumps(flags))
    assert model == replace(PRESETS["enwik8"], remat=False)
    assert optimizer is not None
    assert optimizer.learning_rate == 4e-4
    assert (optimizer.warmup_steps, optimizer.schedule_steps) == (10_000, 125_000)
    assert (optimizer.gradient_clip, optimizer.weight_decay) == (0.1, 2e-4)
    assert optimizer.constants == {"b1": 0.9, "b2": 0.98, "eps": 1e-9}
    assert (optimizer.weight_decay_form, optimizer.loss_divisor) == ("unscaled", "positions")


def test_what_the_script_does_not_state_or_we_do_not_have():
    unstated = {name: value for name, value in FLAGS.items() if name not in ("n_vocab", "pe_lam")}
    model, optimizer, *_ = read_checkpoint(file_of(official_leaves(FLAGS)), unstated)
    assert (model.vocab_size, model.position_base) == (11, 1e5)
    assert optimizer is None
    assert read_flags(FLAGS | OPTIMIZER_FLAGS | {"lr_schedule": "inv_sqrt"})[1] is None
    for name in ("lion", "adafactor"):
        optimizer = read_flags(FLAGS | OPTIMIZER_FLAGS | {"optimizer": name})[1]
        assert optimizer is not None
        assert optimizer.name == name


LAYER = "transformer_layers_0/scanned_attn2/"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_v": 6}, r"leaf .*1/kvg_proj/kernel: must have shape \(6, 16\), got \(6, 14\)"),
        ({"n_vocab": 12}, r"leaf token_embedder/embs: must have shape \(12, 6\), got \(11, 6\)"),
        ({"n_layer": 2}, "flag n_layer: must be the checkpoint's 1 pairs of layers, got 2"),
        ({"n_layer": 0}, "flag n_layer: must be at least 1, got 0"),
        ({"e_preln": 1}, r"leaf out_ln/g: must be there with shape \(6,\), got none"),
        ({"e_tie": 1}, r"leaf out_proj/\w+: must have a place .*, got shape \(.*11.*\)"),
        ({"mem_len": 0}, "flag mem_len: must be at least 1, got 0"),
        ({"d_k": "4"}, "flag d_k: must be a whole number, got '4'"),
        ({"pe_abs": 2}, "flag pe_abs: must be 0 or 1, got 2"),
        ({"e_scale": None}, "flag e_scale: must be a number, got None"),
        ({"p_dropres": 1.0}, r"flag p_dropres: must be in \[0, 1\), got 1.0"),
        ({"dtype": "float16"}, "flag dtype: must be one of float32, bfloat16, got 'float16'"),
        ({"d_ff": 24}, "flag d_ff: must be 0, got 24"),
        ({"attn_type": "full"}, "flag attn_type: must be a flag of .*, got 'full'"),
        (OPTIMIZER_FLAGS | {"optimizer": "sgd"}, "flag optimizer: must be one of .*, got 'sgd'"),
        (OPTIMIZER_FLAGS | {"lr_max": 0.0}, "flag lr_max: must be positive and finite, got 0.0"),
        ({"lr_max": 1e-3}, "flag optimizer: must be given, got none"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_flags_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ConfigError, match=f"^official {message}$"):
        read_checkpoint(file_of(official_leaves(FLAGS)), FLAGS | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": None}, r"leaf NAME: must be there with shape \(4,\), got none"),
        ({"u": np.zeros(5, np.float32)}, r"leaf NAME: must have shape \(4,\), got \(5,\)"),
        ({"u": np.zeros(4, np.int32)}, "leaf NAME: must be of floats, got int32"),
        ({"u": "text"}, r"leaf NAME: must have shape \(4,\), got \(\)"),
        ({"w": np.zeros(3)}, r"leaf NAME: must have a place in .*, got shape \(3,\)"),
    ],
)
def test_leaves_that_do_not_fit_are_named(changes, message):
    [(name, leaf)] = changes.items()
    leaves = official_leaves(FLAGS) | {LAYER + name: leaf}
    leaves = {path: leaf for path, leaf in leaves.items() if leaf is not None}
    if isinstance(leaf, str):
        data = serialization.msgpack_serialize(
            {"step": 1, "params": traverse_util.unflatten_dict(leaves, sep="/")}
        )
    else:
        data = file_of(leaves)
    message = message.replace("NAME", LAYER + name)
    with pytest.raises(ConfigError, match=f"^official {message}$"):
        read_checkpoint(data, FLAGS)


def test_files_that_are_none():
    good = file_of(official_leaves(FLAGS))
    for data in (b"", b"PK\x03\x04 a zip", good[:-1], good + b"\x00", b"\xc1"):
        with pytest.raises(ConfigError, match=r"^official checkpoint: must be a flax msgpack file"):
            read_checkpoint(data, FLAGS)
    for content in (7, [1], {"step": 1}, {"params": 3}, {"params": {"params": 3}}):
        data = serialization.msgpack_serialize(content)
        with pytest.raises(ConfigError, match=r"^official "):
            read_checkpoint(data, FLAGS)
    params = traverse_util.unflatten_dict(official_leaves(FLAGS), sep="/")
    for step in ({}, {"step": -1}, {"step": 1.5}, {"step": "1"}, {"step": np.array([1, 1])}):
        data = serialization.msgpack_serialize({"params": params, **step})
        with pytest.raises(ConfigError, match=r"^official checkpoint: step must be .*, got"):
            read_checkpoint(data, FLAGS)
    for flags in ("[]", "7", "{", "null"):
        with pytest.raises(
            ConfigError, match=r"^official flags: must be (JSON|a JSON object), got"
        ):
            read_checkpoint(good, flags)
