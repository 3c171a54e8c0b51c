"""What could be changed in a recipe that does not fit: operational fields alone."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jobs.recipe import Recipe, from_yaml, to_yaml

if TYPE_CHECKING:
    from jobs.planning.plan import Plan

_FILLED = 0.9
"""Of the memory that a change is guessed to fill at most, before the compiler is asked."""


def possible_changes(recipe: Recipe, made: "Plan") -> Iterator[dict[str, Any]]:
    """Changes that might make it fit, the least first: of operational fields alone, so that the
    training stays the same run."""
    parts, available = made.memory, made.memory_available
    state = sum(parts.get(name, 0) for name in ("parameters", "optimizer", "gradients"))
    changes: dict[str, Any] = {}
    fsdp, tensor = spread_axes(recipe, made.target.devices)
    if state > available / 3 and recipe.cluster.fsdp < fsdp:
        changes["cluster.fsdp"] = fsdp
        if recipe.cluster.data != -1:
            changes["cluster.data"] = -1
        if tensor != recipe.cluster.tensor:
            changes["cluster.tensor"] = tensor
        state = state * recipe.cluster.fsdp // fsdp
        yield dict(changes)
    if not recipe.model.remat:
        changes["model.remat"] = True
        yield dict(changes)
    needed = next(program.needed for program in made.programs if program.name == "train")
    whole = sum(parts.get(name, 0) for name in ("parameters", "optimizer", "gradients"))
    by_rows = max(1, (needed or 2 * available) - whole)
    rows, now = made.rows_per_device, recipe.training.accumulate
    for accumulate in range(now + 1, rows + 1):
        if rows % accumulate or recipe.training.batch_size % accumulate:
            continue
        if state + by_rows * now / accumulate <= _FILLED * available or accumulate == rows:
            yield {**changes, "training.accumulate": accumulate}


def spread_axes(recipe: Recipe, devices: int) -> tuple[int, int]:
    """fsdp and tensor that split the parameters over all devices that divide them; tensor takes up
    those for which there is no row, which would compute padding."""
    model, least = recipe.model, recipe.cluster.tensor
    for tensor in range(least, devices + 1, least):
        along_rows, left = divmod(devices, tensor)
        fits = not (left or model.d_value % tensor)
        if fits and recipe.training.batch_size % along_rows == 0:
            return math.gcd(along_rows, model.d_model), tensor
    return math.gcd(devices // least, model.d_model), least


def with_changes(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with `section.field` values, checked as a whole."""
    for name, value in changes.items():
        section, _, field = name.partition(".")
        part = dataclasses.replace(getattr(recipe, section), **{field: value})
        recipe = dataclasses.replace(recipe, **{section: part})
    return from_yaml(to_yaml(recipe), "the recipe with changes")


def stated(changes: Mapping[str, Any]) -> str:
    """As a user writes them on the command line."""
    words = {True: "true", False: "false"}
    return " ".join(
        f"{name}={words[value] if isinstance(value, bool) else value}"
        for name, value in changes.items()
    )
