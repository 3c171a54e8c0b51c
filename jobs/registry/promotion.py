"""Whether one model is better than another on the same text: paired differences, bootstrapped.

Pure: takes what an evaluation summed over each document (or 64 KiB block), decides nothing else.
"""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from jobs.evaluation.bootstrap import LEAST, interval
from jobs.metric_names import EVAL_LOSS
from jobs.units import NATS_PER_BIT

LEVEL = 0.95

Outcome = Literal["promoted", "inconclusive", "worse", "refused"]


class Scored(NamedTuple):
    """A model's sums over the items of a split, in stored order: columns of one length."""

    fingerprint: str
    """Of the split."""
    nats: npt.NDArray[np.float64]
    n_tokens: npt.NDArray[np.int64]
    n_bytes: npt.NDArray[np.int64]
    items: str = "documents"
    """What the items are, in words."""

    @property
    def bits_per_byte(self) -> float:
        """Of the split as a whole."""
        return float(self.nats.sum() / self.n_bytes.sum()) / NATS_PER_BIT


class Decision(NamedTuple):
    """What a comparison came to."""

    outcome: Outcome
    why: str
    """In words, with the figures."""
    difference: float | None = None
    """Of the metric, candidate less champion; lower is better. None where refused."""
    low: float | None = None
    high: float | None = None
    """Ends of the two-sided interval of LEVEL of the difference, by a bootstrap over the items."""


def decide(candidate: Scored, champion: Scored, metric: str, min_delta: float = 0.0) -> Decision:
    """Promoted if the whole interval of the difference lies below -min_delta.

    Refused if the two were not scored on the same targets; inconclusive if there are too few items
    to draw from, or if the interval leaves it open; worse if the whole interval lies above 0.
    """
    if candidate.fingerprint != champion.fingerprint:
        return Decision(
            "refused",
            "the two were validated on different splits (fingerprints"
            f" {candidate.fingerprint[:16]} and {champion.fingerprint[:16]})",
        )
    same = all(
        np.array_equal(getattr(candidate, column), getattr(champion, column))
        for column in ("n_tokens", "n_bytes")
    )
    if not same:
        return Decision(
            "refused",
            "the two count the targets of the split differently (data.window is not the same)",
        )
    unit, denominators = NATS_PER_BIT, champion.n_bytes
    if metric == EVAL_LOSS:
        unit, denominators = 1.0, champion.n_tokens
    numerators = (candidate.nats - champion.nats) / unit
    difference = float(numerators.sum() / denominators.sum())
    bounds = interval(numerators, denominators, level=LEVEL)
    if bounds is None:
        return Decision(
            "inconclusive",
            f"{metric} {difference:+.4f}, but the split has {len(numerators)} {candidate.items},"
            f" and fewer than {LEAST} are too few to tell chance from more",
            difference,
        )
    low, high = bounds
    facts = (
        f"{metric} {difference:+.4f} ({LEVEL:.0%} of {low:+.4f} to {high:+.4f}, paired over"
        f" {len(numerators)} {candidate.items})"
    )
    if high < -min_delta:
        return Decision("promoted", facts, difference, low, high)
    outcome = "worse" if low > 0 else "inconclusive"
    short = f", which is not below {-min_delta:+.4f} as a whole" if outcome != "worse" else ""
    return Decision(outcome, facts + short, difference, low, high)
