"""What `tvq plan` does with its arguments."""

from pathlib import Path

from jobs import recipe as recipes
from jobs.bench.forms import numbers_of_tokens
from jobs.console import Console
from jobs.errors import UserError
from jobs.planning.attention import as_json as attention_json
from jobs.planning.attention import compare_forms, print_comparison
from jobs.planning.changes import offered
from jobs.planning.chips import cluster_overrides, devices_of, read_target
from jobs.planning.plan import Plan, plan
from jobs.planning.report import as_json as plans_json
from jobs.planning.report import draw, print_plans


def plan_command(
    name: str,
    overrides: tuple[str, ...],
    targets: str | None,
    *,
    prices: Path | None,
    figure: Path | None,
    limit_seconds: float,
    console: Console,
    as_json: bool,
) -> None:
    """Plans a recipe on each of the targets, and prints it.

    Raises UserError, after it is printed, where the recipe as it stands fits none of them.
    """
    # All of them, before the first takes minutes.
    asked = {text: _recipe(name, overrides, text) for text in _asked(name, overrides, targets)}
    name = Path(name).stem
    plans = [
        plan(recipe, text, prices=prices, limit_seconds=limit_seconds, console=console)
        for text, recipe in asked.items()
    ]
    if as_json:
        console.json(plans_json(name, plans))
    else:
        print_plans(name, plans, console)
    if figure:
        draw(name, plans, figure)
        console.line(f"figure    {figure.absolute()}")
    if not any(each.fits for each in plans):
        raise UserError(f"{name}: fits none of {', '.join(asked)} as it is; {_fix(plans)}")


def _asked(name: str, overrides: tuple[str, ...], targets: str | None) -> list[str]:
    if targets is None:
        return [devices_of(recipes.load(name, overrides).cluster)]
    return [text.strip() for text in targets.split(",")]


def _recipe(name: str, overrides: tuple[str, ...], on: str) -> recipes.Recipe:
    """Its cluster section has the devices of `on`, whatever the file says, or the mesh that the
    user wants for them would be refused."""
    return recipes.load(name, (*overrides, *cluster_overrides(read_target(on))))


def _fix(plans: list[Plan]) -> str:
    known = [each for each in plans if each.changed]
    if not known:
        return "more or larger devices, or a smaller model"
    return "; ".join(
        f"on {each.target.text} it fits with {offered(each.changes)}" for each in known
    )


def attention_command(
    name: str,
    overrides: tuple[str, ...],
    targets: str | None,
    lengths: str,
    *,
    limit_seconds: float,
    console: Console,
    as_json: bool,
) -> None:
    """Compares the forms of attention on one device of each target."""
    wanted = numbers_of_tokens(lengths, "--attention")
    compared = [
        compare_forms(
            _recipe(name, overrides, text),
            read_target(text),
            wanted,
            limit_seconds=limit_seconds,
            console=console,
        )
        for text in _asked(name, overrides, targets)
    ]
    name = Path(name).stem
    if as_json:
        console.json({"recipe": name, "targets": [attention_json(each) for each in compared]})
        return
    for each in compared:
        print_comparison(name, each, console)
