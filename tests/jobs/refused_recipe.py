"""How a recipe is refused, and a recipe that is not."""

import pytest

from jobs.errors import ExitCode, UserError
from jobs.recipe import load

BASE = (
    # On top of a named recipe, whose own figures change: T/U = 512/256 = 2 updates a batch.
    "data.sequence_length=512",
    "training.update_length=256",
    "training.steps=400",
    "training.evaluate_every=100",
    "checkpoint.every=100",
    "optimizer.warmup_steps=40",
)


def refusal(*overrides: str, name: str = "tiny") -> str:
    """The one line with which the overrides are refused."""
    with pytest.raises(UserError) as caught:
        load(name, overrides)
    assert caught.value.code == ExitCode.USER
    message = str(caught.value)
    assert "\n" not in message
    return message
