"""How sure a ratio of sums is: a bootstrap over what the sums are of.

The draws are computed from their numbers, not taken from a library's stream of random numbers:
the same seed gives the same interval on every version and machine.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from pipeline.order import mix

LEAST = 10
"""Of fewer items than this no interval is made: a bootstrap of a handful is far too narrow."""
_DRAWS_AT_ONCE = 2**20


def interval(
    numerators: npt.NDArray[np.float64],
    denominators: npt.NDArray[np.int64],
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """The two-sided percentile interval of sum(numerators) / sum(denominators).

    Each resample draws as many items [n] as there are, with replacement. None for fewer than
    LEAST items.
    """
    n = len(numerators)
    if n < LEAST:
        return None
    key = np.frombuffer(hashlib.sha512(f"tvq bootstrap 1 {seed}".encode()).digest(), "<u8")[0]
    ratios = np.empty(resamples)
    at_once = max(1, _DRAWS_AT_ONCE // n)
    for first in range(0, resamples, at_once):
        last = min(first + at_once, resamples)
        draws = mix(np.arange(first * n, last * n, dtype=np.uint64), key).reshape(-1, n)
        # The upper 32 bits as a fraction of n: uniform to one part in 2**32 / n.
        items = ((draws >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32)
        ratios[first:last] = numerators[items].sum(axis=1) / denominators[items].sum(axis=1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
