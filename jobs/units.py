"""Units that losses are given in."""

import math

from pipeline.manifest import Split

NATS_PER_BIT = math.log(2)


def bits_per_byte(nats_per_target: float, split: Split, window: str) -> float:
    """A loss in bits per byte of the split's text.

    Exact over a whole split: the eos behind every document of a stream is a target whose nats
    count and whose bytes are none. Over a part of it, the split's ratio of targets to bytes stands
    for the part's.
    """
    targets = split.tokens + (split.documents if window == "stream" else 0)
    return nats_per_target / NATS_PER_BIT * targets / split.n_bytes
