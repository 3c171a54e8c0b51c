"""Units that losses are given in."""

import math
from collections.abc import Callable
from typing import NamedTuple

from jobs.recipe import Recipe
from model.counts import flops_per_token
from pipeline.manifest import Split
from pipeline.mixture import Mixture

NATS_PER_BIT = math.log(2)


def targets_of(split: Split, window: str) -> int:
    """Tokens to predict in a whole split: its own and, in a stream, each document's eos."""
    return split.tokens + (split.documents if window == "stream" else 0)


def bits_per_byte(nats_per_target: float, split: Split, window: str) -> float:
    """A loss in bits per byte of the split's text.

    Exact over a whole split: the eos behind every document of a stream is a target whose nats
    count and whose bytes are none. Over a part of it, the split's ratio of targets to bytes stands
    for the part's.
    """
    return nats_per_target / NATS_PER_BIT * targets_of(split, window) / split.n_bytes


class TrainingUnits(NamedTuple):
    """What figures of a training are given in, besides what the model measures in."""

    bits_per_byte: Callable[[float], float]
    """Of nats per target of the train split."""
    mfu: Callable[[float], float] | None
    """Of tokens a second, the fraction of what the devices are made for; None: unknown."""


def training_units(recipe: Recipe, mixture: Mixture, n_devices: int) -> TrainingUnits:
    """Those of a training on that many devices."""
    window = recipe.data.window
    # A row of training holds as much of each corpus as its weight says.
    epochs = mixture.epochs(1, sequence_length=recipe.data.sequence_length, window=window)
    shares = list(zip(epochs, mixture.splits("train"), strict=True))
    row_targets = sum(share * targets_of(split, window) for share, split in shares)
    row_bytes = sum(share * split.n_bytes for share, split in shares)
    flops = flops_per_token(recipe.model, recipe.data.sequence_length)
    peak = (recipe.cluster.peak_flops or 0) * n_devices
    return TrainingUnits(
        bits_per_byte=lambda nats: nats / NATS_PER_BIT * row_targets / row_bytes,
        mfu=(lambda rate: rate * flops / peak) if peak else None,
    )
