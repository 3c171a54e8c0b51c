"""A run with parameters of our choice, as if it had been trained to them."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from jobs import recipe as recipes
from jobs.checkpoints.import_official import save_as_run
from jobs.recipe import DataConfig, Recipe
from jobs.runs.run_directory import RunDirectory
from model.config import ModelConfig
from model.transformer import Network, initial_network
from pipeline.manifest import Manifest

MODEL = ModelConfig(
    n_layers=2, d_model=16, d_key=8, d_value=16, n_codes=8, block_length=8, window=8
)


@functools.cache
def network_of(model: ModelConfig, seed: int = 0, scale: float = 3.0) -> Network:
    """Initial values, made larger, so that what is attended shows in the logits."""
    network = initial_network(model, jax.random.key(seed))
    grown = jax.tree.map(lambda leaf: leaf * scale, network.params["layers"])
    return network._replace(params={**network.params, "layers": grown})


def unigram(network: Network, logits: Any) -> Network:
    """A network that gives every token these logits [vocab], whatever it reads."""
    output = network.params["output"]
    head = {"kernel": output["kernel"] * 0, "bias": output["bias"] * 0 + logits}
    return network._replace(params={**network.params, "output": head})


def make_run(
    folder: Path,
    name: str,
    corpus: Path,
    network: Network,
    *,
    model: ModelConfig = MODEL,
    updates: int = 4,
    **data: Any,
) -> RunDirectory:
    """Stores it under `folder`; `data` are further fields of the recipe's data section."""
    recipe = Recipe(model=model, data=DataConfig(corpus=str(corpus), **data))
    training = dataclasses.replace(
        recipe.training, steps=updates, update_length=recipe.data.sequence_length
    )
    optimizer = dataclasses.replace(recipe.optimizer, schedule="constant")
    recipe = recipes.resolve(dataclasses.replace(recipe, training=training, optimizer=optimizer))
    run = RunDirectory(folder / name)
    fingerprints = {k: split.fingerprint for k, split in Manifest.load(corpus).splits.items()}
    save_as_run(run, recipe, network=network, updates=updates, fingerprints=fingerprints)
    return run
