"""Whether recipes differ by more than another seed would make: ranges, and Welch's test.

Lower is better in every figure here.
"""

import math
import statistics
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

LEAST_SEEDS = 3
"""Of each recipe for a test: with two, ranges of equal recipes are apart in one of three cases."""
LEVEL = 0.05


class Conclusion(StrEnum):
    """What the seeds say of a difference."""

    EXCEEDS = "exceeds the seed spread"
    """The ranges are apart and Welch's test rejects equal means."""
    WITHIN = "is within the seed spread"
    """The ranges overlap and the test, if there are seeds enough for one, does not reject."""
    OPEN = "cannot be told from the seed spread"
    """Ranges and test disagree, or there are too few seeds to say."""


class Welch(NamedTuple):
    """Welch's test of equal means, variances not assumed equal."""

    t: float
    degrees: float
    """Of freedom, by Welch and Satterthwaite."""
    p: float
    """Two-sided."""


class SeedVerdict(NamedTuple):
    """How a recipe compares with the first one."""

    difference: float
    """Mean of its seeds less the mean of the first one's."""
    ranges_apart: bool
    welch: Welch | None
    """None where a recipe has fewer than LEAST_SEEDS seeds, or all seeds gave one value."""
    p_adjusted: float | None
    """Holm's, over all recipes that are held against the first."""
    conclusion: Conclusion
    why: str
    """The facts, in words."""


def seed_verdicts(first: Sequence[float], others: Sequence[Sequence[float]]) -> list[SeedVerdict]:
    """Holds recipes against the first; each is given as the figures of its seeds, finite, one or
    more of them."""
    tests = [_welch(first, other) for other in others]
    adjusted = iter(_holm([test.p for test in tests if test]))
    return [
        _verdict(first, other, test, next(adjusted) if test else None, len(others))
        for other, test in zip(others, tests, strict=True)
    ]


def _verdict(
    first: Sequence[float],
    other: Sequence[float],
    welch: Welch | None,
    p: float | None,
    comparisons: int,
) -> SeedVerdict:
    difference = statistics.fmean(other) - statistics.fmean(first)
    apart = max(first) < min(other) or max(other) < min(first)
    fewest = min(len(first), len(other))
    seeds = f"{len(first)} and {len(other)} seeds"
    ranges = "the ranges are apart" if apart else "the ranges overlap"
    if fewest == 1:
        conclusion = Conclusion.OPEN
        why = f"{seeds}: one seed shows no spread"
    elif fewest < LEAST_SEEDS:
        conclusion = Conclusion.OPEN if apart else Conclusion.WITHIN
        why = f"{seeds}: {ranges}; a test needs {LEAST_SEEDS} of each"
    elif welch is None or p is None:  # no spread on either side
        conclusion = Conclusion.EXCEEDS if apart else Conclusion.WITHIN
        why = f"{seeds}: all seeds of a recipe gave the same figure"
    else:
        rejects = p < LEVEL
        if apart is not rejects:
            conclusion = Conclusion.OPEN
        else:
            conclusion = Conclusion.EXCEEDS if apart else Conclusion.WITHIN
        adjusted = f", Holm's of {comparisons} comparisons" if comparisons > 1 else ""
        why = (
            f"{seeds}: {ranges}; Welch's t = {welch.t:.2f}, {welch.degrees:.1f} degrees of"
            f" freedom, p = {_shown(p)}{adjusted}"
        )
    return SeedVerdict(difference, apart, welch, p, conclusion, why)


def _welch(first: Sequence[float], other: Sequence[float]) -> Welch | None:
    if min(len(first), len(other)) < LEAST_SEEDS:
        return None
    error_first = statistics.variance(first) / len(first)
    error_other = statistics.variance(other) / len(other)
    error = error_first + error_other
    if error == 0:
        return None
    from scipy.special import stdtr

    t = (statistics.fmean(other) - statistics.fmean(first)) / math.sqrt(error)
    degrees = error**2 / (error_first**2 / (len(first) - 1) + error_other**2 / (len(other) - 1))
    return Welch(t, degrees, 2 * float(stdtr(degrees, -abs(t))))


def _holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjustment: that one of several is below the level by chance is no likelier."""
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, ps[index] * (len(ps) - rank)))
        adjusted[index] = largest
    return adjusted


def _shown(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"
