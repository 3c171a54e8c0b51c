"""The official code's numbers (shared/reference/README.md), in this project's names."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.official import network_from, read_flags
from model.transformer import Cache, Network, initial_cache

FOLDER = Path(__file__).parents[1] / "golden"

CACHE_NAMES = {
    "keys": "xlcache/k_hat",
    "values": "xlcache/v",
    "codes": "xlcache/z",
    "counts": "aggcache/lower",
    "means": "aggcache/upper_div_lower",
}


class Rows(NamedTuple):
    """A batch, or the part of one that is an update."""

    inputs: Any
    targets: Any
    documents: Any
    loss_mask: Any
    rows: Any


def arrays_of(name: str) -> dict[str, np.ndarray]:
    """What a file holds, by key."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


class Golden:
    """One file of golden data, for a model that computes in `dtype`."""

    def __init__(self, name: str, dtype: str = "float32"):
        self.name = name
        self.arrays = arrays_of(name)
        config = json.loads(str(self.arrays["config_json"]))
        self.flags = config["model"] | config["optimizer"]
        self.update_length = self.flags["update_len"]
        self.n_updates = config["n_update"]
        model, optimizer = read_flags(self.flags)
        assert optimizer is not None
        self.model, self.optimizer = replace(model, dtype=dtype), optimizer

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def rows(self, update: int) -> Rows:
        """The batch's tokens of an update."""
        part = slice(update * self.update_length, (update + 1) * self.update_length)
        inputs, targets, documents, mask = (
            self[f"batch/{name}"][:, part] for name in ("inputs", "targets", "doc_ids", "loss_mask")
        )
        rows = np.arange(len(inputs), dtype=np.uint32)
        return Rows(inputs, targets, documents, mask.astype(bool), rows)

    def leaves(self, prefix: str) -> dict[str, np.ndarray]:
        """The official leaves under a prefix that ends in a slash, by the path after it."""
        return {
            key.removeprefix(prefix): array
            for key, array in self.arrays.items()
            if key.startswith(prefix)
        }

    def network(self, prefix: str) -> Network:
        """Parameters and codebooks, or their gradients, under such a prefix."""
        return jax.tree.map(jnp.asarray, network_from(self.model, self.leaves(prefix)))

    def params(self, prefix: str) -> dict:
        """Parameters, or gradients, under such a prefix."""
        return self.network(prefix).params

    def codebooks(self, prefix: str) -> dict:
        """Codebooks, or their surrogate gradients, under such a prefix."""
        return self.network(prefix).codebooks

    def cache(self, prefix: str) -> Cache:
        """The attention state under a prefix such as eval/u0/state/."""
        cache = initial_cache(self.model, len(self["batch/inputs"]))
        empty = cache.layers

        def stacked(name: str, like: jnp.ndarray) -> jnp.ndarray:
            layers = [
                self[f"{prefix}{n // 2}/{n % 2}/{CACHE_NAMES[name]}"]
                for n in range(self.model.n_layers)
            ]
            return jnp.asarray(np.stack(layers), like.dtype)

        present = {name: like for name, like in empty._asdict().items() if like is not None}
        layers = empty._replace(**{name: stacked(name, like) for name, like in present.items()})
        return cache._replace(layers=layers, length=jnp.asarray(self[f"{prefix}0/0/pos_offset"]))
