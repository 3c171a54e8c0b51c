"""What could be changed in a recipe that does not fit: operational fields, or else its batch."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jobs.recipe import Recipe, from_yaml, to_yaml

if TYPE_CHECKING:
    from jobs.planning.plan import Plan

_FILLED = 0.9
"""Of the memory that a change is guessed to fill at most, before the compiler is asked."""
_CACHES = 5
"""Copies of a batch's caches that are there at once, however its rows are split (16 rows of enwik8
on v5e:1x1, two at a time: 20.3 GiB, and 3.6 are the caches)."""


def possible_changes(recipe: Recipe, made: "Plan") -> Iterator[dict[str, Any]]:
    """Changes that might make it fit, the least first: of operational fields, with which the
    training stays the same run; after all of these, smaller batches."""
    parts, available = made.memory, made.memory_available
    whole = state = sum(parts.get(name, 0) for name in ("parameters", "optimizer", "gradients"))
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
    by_batch = max(1, (needed or 2 * available) - whole)
    caches = min(_CACHES * parts.get("cache", 0), by_batch)
    now, all_rows = recipe.training.accumulate, recipe.training.batch_size

    def may_fit(batch: int, accumulate: int) -> bool:
        kept = (caches + (by_batch - caches) * now / accumulate) * batch / all_rows
        return state + kept <= _FILLED * available

    per_device = made.rows_per_device
    for accumulate in _parts(all_rows, per_device):
        # One row at a time is asked for in any case, before another training is.
        if accumulate > now and (accumulate == per_device or may_fit(all_rows, accumulate)):
            yield {**changes, "training.accumulate": accumulate}
    for batch, rows in _smaller_batches(all_rows, per_device):
        accumulate = next((n for n in _parts(batch, rows) if may_fit(batch, n)), None)
        if accumulate is not None:
            split = {"training.accumulate": accumulate} if accumulate != now else {}
            yield {**changes, "training.batch_size": batch, **split}


def _smaller_batches(rows: int, per_device: int) -> Iterator[tuple[int, int]]:
    """Batches that divide the batch, with the rows of a device, all whole; the largest first."""
    devices = rows // per_device
    for batch in reversed(_divisors(rows)[:-1]):
        if rows == devices * per_device and batch % devices == 0:
            yield batch, batch // devices


def _parts(batch: int, per_device: int) -> list[int]:
    """Micro-batches that a batch can be split into, of which a device has so many rows."""
    return [n for n in _divisors(per_device) if batch % n == 0]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def is_another_training(changes: Mapping[str, Any]) -> bool:
    """Whether they change the mathematics, not only operations."""
    return "training.batch_size" in changes


def offered(changes: Mapping[str, Any]) -> str:
    """As a user is told of them."""
    return stated(changes) + (" (another training)" if is_another_training(changes) else "")


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
