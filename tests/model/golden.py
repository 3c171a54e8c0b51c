"""The official code's numbers (shared/reference/README.md), in this project's names."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from model.attention import LayerCache
from model.config import ModelConfig, OptimizerConfig
from model.transformer import Cache

FOLDER = Path(__file__).parents[1] / "golden"

LAYER_NAMES = {
    "norm/gain": "input_ln/g",
    "norm/bias": "input_ln/b",
    "query": "q_proj/kernel",
    "distance": "r_proj/kernel",
    "output": "res_proj/kernel",
    "content_bias": "u",
    "position_bias": "v",
}


class Rows(NamedTuple):
    """A batch, or the part of one that is an update."""

    inputs: Any
    targets: Any
    documents: Any
    loss_mask: Any
    rows: Any


class Golden:
    """One file of golden data."""

    def __init__(self, name: str):
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = dict(file)
        config = json.loads(str(self.arrays["config_json"]))
        official, optimizer = config["model"], config["optimizer"]
        self.update_length = official["update_len"]
        self.n_updates = config["n_update"]
        self.model = ModelConfig(
            vocab_size=official["n_vocab"],
            n_layers=2 * official["n_layer"],
            d_model=official["d_model"],
            n_heads=official["n_head"],
            d_key=official["d_k"],
            d_value=official["d_v"],
            n_codes=official["n_code"],
            block_length=official["block_len"],
            window=official["mem_len"],
            compressive_cache=bool(official["agg_cache"]),
            gradient_through_cache=bool(official["grad_thru_cache"]),
            position_base=float(official["pe_lam"]),
            absolute_positions=bool(official["pe_abs"]),
            tied_embeddings=bool(official["e_tie"]),
            output_norm=bool(official["e_preln"]),
            output_scale=official["e_scale"],
            commitment_weight=official["c_beta"],
            codebook_decay=official["c_gamma"],
        )
        self.optimizer = OptimizerConfig(
            learning_rate=optimizer["lr_max"],
            schedule=optimizer["lr_schedule"],
            warmup_steps=optimizer["n_warmup_step"],
            schedule_steps=optimizer["n_max_step"],
            gradient_clip=optimizer["grad_clip"],
            weight_decay=optimizer["wd_lam"],
            weight_decay_form="unscaled",
            eps=1e-9,
            loss_divisor="positions",
        )

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def rows(self, update: int) -> Rows:
        """The batch's tokens of an update."""
        part = slice(update * self.update_length, (update + 1) * self.update_length)
        inputs, targets, documents, mask = (
            self[f"batch/{name}"][:, part] for name in ("inputs", "targets", "doc_ids", "loss_mask")
        )
        return Rows(inputs, targets, documents, mask.astype(bool), np.arange(len(inputs)))

    def params(self, prefix: str) -> dict:
        """Parameters, or gradients, under a prefix that ends in a slash."""
        tree: dict = {"embedding": {}, "layers": {"norm": {}}}
        tree["embedding"]["table"] = jnp.asarray(self[prefix + "token_embedder/embs"])
        tree["embedding"]["bias"] = jnp.asarray(self[prefix + "token_embedder/bias_out"])
        if self.model.absolute_positions:
            tree["position"] = {"scale": jnp.asarray(self[prefix + "position_embedder/scale"])}
        if self.model.output_norm:
            tree["output_norm"] = {
                "gain": jnp.asarray(self[prefix + "out_ln/g"]),
                "bias": jnp.asarray(self[prefix + "out_ln/b"]),
            }
        if not self.model.tied_embeddings:
            tree["output"] = {
                "kernel": jnp.asarray(self[prefix + "out_proj/kernel"]),
                "bias": jnp.asarray(self[prefix + "out_proj/bias"]),
            }
        for name, official in LAYER_NAMES.items():
            *folder, leaf = name.split("/")
            target = tree["layers"][folder[0]] if folder else tree["layers"]
            target[leaf] = self._stack(prefix, official)
        H, K, V = self.model.n_heads, self.model.d_key, self.model.d_value
        kvg = self._stack(prefix, "kvg_proj/kernel")
        cuts = (H * K, H * (K + V))
        tree["layers"] |= dict(
            zip(("key", "value", "gate"), jnp.split(kvg, cuts, axis=-1), strict=True)
        )
        return tree

    def codebooks(self, prefix: str) -> dict:
        """Codebooks, or their surrogate gradients, under a prefix."""
        names = {"sums": "quantizer/c_sum", "counts": "quantizer/c_count"}
        return {"layers": {"codebook": {k: self._stack(prefix, name) for k, name in names.items()}}}

    def cache(self, prefix: str) -> Cache:
        """The attention state under a prefix such as eval/u0/state/."""
        names = ("xlcache/k_hat", "xlcache/v", "xlcache/z")
        if self.model.compressive_cache:
            names += ("aggcache/lower", "aggcache/upper_div_lower")
        layers = [
            [jnp.asarray(self[f"{prefix}{n // 2}/{n % 2}/{name}"]) for name in names]
            for n in range(self.model.n_layers)
        ]
        keys, values, codes, *statistics = (jnp.stack(parts) for parts in zip(*layers, strict=True))
        counts, means = statistics or (None, None)
        layer_cache = LayerCache(keys, values, codes if statistics else None, counts, means)
        return Cache(layer_cache, jnp.asarray(self[f"{prefix}0/0/pos_offset"]))

    def _stack(self, prefix: str, name: str) -> jnp.ndarray:
        return jnp.stack(
            [
                jnp.asarray(
                    self[f"{prefix}transformer_layers_{n // 2}/scanned_attn{n % 2 + 1}/{name}"]
                )
                for n in range(self.model.n_layers)
            ]
        )
