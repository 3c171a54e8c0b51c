"""What is known of a training's plan before it begins: for `train --dry-run` and `submit`."""

from typing import NamedTuple

from jobs.console import Console
from jobs.errors import UserError
from jobs.planning.changes import offered
from jobs.planning.chips import devices_of, read_target
from jobs.planning.compilations import are_known, has_libtpu
from jobs.planning.compiler import PROGRAMS
from jobs.planning.plan import Plan, on_target, plan
from jobs.planning.report import hours_in_words, memory_in_words
from jobs.recipe import Recipe, resolve

_LIMIT_SECONDS = 3600
_AGAIN = "`tvq plan` with the same recipe and overrides"


class Forecast(NamedTuple):
    """Of a recipe on the devices of its own cluster section."""

    text: str
    """A line: whether it fits and what it takes, or why that is not known."""
    plan: Plan | None
    """None: not known."""


def forecast(recipe: Recipe, console: Console, *, compiles: bool) -> Forecast:
    """What the compiler has said of the recipe.

    Args:
        recipe: with the cluster that it will run on.
        compiles: whether to ask the compiler now, which takes minutes, where what it has said was
            not kept; done for a TPU alone, and only where libtpu is installed.

    Raises:
        UserError: the mesh cannot be, or the compiler took too long.
    """
    recipe = resolve(recipe)
    try:
        on = devices_of(recipe.cluster)
    except UserError:
        return Forecast(f"of no devices that the recipe names; {_AGAIN} and --on makes one", None)
    target = read_target(on)
    asks = compiles and target.kind == "tpu" and has_libtpu()
    if not asks and not are_known(on_target(recipe, target), target, PROGRAMS):
        return Forecast(f"of {on} not made yet: {_AGAIN} says whether it fits", None)
    made = plan(recipe, on, limit_seconds=_LIMIT_SECONDS, find_changes=asks, console=console)
    return Forecast(_text(made), made)


def refuse_what_does_not_fit(made: Plan | None) -> None:
    """Raises UserError for a training that is known not to fit."""
    if made is not None and not made.fits:
        raise UserError(f"{_text(made)}; nothing was sent")


def _text(made: Plan) -> str:
    memory = f"{memory_in_words(made.needed)} of {memory_in_words(made.memory_available)} a device"
    if not made.fits:
        fix = (
            f"it fits with {offered(made.changes)}" if made.changes else f"{_AGAIN} looks for a way"
        )
        return f"{made.target.text}: does not fit, needs {memory}; {fix}"
    words = f"{made.target.text}: fits, {memory}; an estimate of {hours_in_words(made.hours)}"
    if made.money:
        words += f" and {made.money.devices:,.0f} {made.money.currency}"
    return words
