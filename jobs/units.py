"""Units that losses are given in."""

import math

from pipeline.manifest import Split

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
