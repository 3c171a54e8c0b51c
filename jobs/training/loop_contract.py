"""What the training loop is given and what it gives back; needs no JAX, so that the driver can."""

from dataclasses import dataclass
from typing import NamedTuple

from jobs.recipe import Recipe
from jobs.training.stopping import StopReason


@dataclass(frozen=True)
class LoopSettings:
    """What every process of a training is given."""

    run: str
    """The run directory: an absolute path or a URL."""
    recipe: Recipe
    """Resolved."""
    lease_owner: str
    """Of the driver on whose behalf the loop writes."""


class Outcome(NamedTuple):
    """How a loop ended."""

    update: int
    """The last update made; it is in a checkpoint."""
    stopped: StopReason
    """Why it ended before the recipe's last update; NONE (false) where it did not."""
    goodput: str = ""
    """Where the time went, in a line."""
