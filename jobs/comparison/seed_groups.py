"""Runs of one recipe that differ in nothing but the seed, as one group."""

import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from jobs.recipe import field_reference

SEED = "training.seed"
_RESULT_CHANGING = {"training.steps", "training.evaluate_windows"}
"""Operational fields, for a run may change them and stay that run; its figures do change."""


class GroupedRun(Protocol):
    """What is asked of a run to group it."""

    @property
    def name(self) -> str: ...
    @property
    def parameters(self) -> dict[str, str]: ...
    @property
    def datasets(self) -> dict[str, list[str]]: ...


class Group(NamedTuple):
    """The runs of one recipe."""

    name: str
    """What the names of the runs have in common."""
    members: list[int]
    """Which runs, in their order; each has a seed of its own."""
    repeats: list[int]
    """Runs of a seed that an earlier run has: no draws of their own, so they count as none."""


def group_by_recipe(runs: Sequence[GroupedRun]) -> list[Group]:
    """Groups in the order in which their first runs come."""
    ignored = _ignored_fields()
    members: dict[object, list[int]] = {}
    repeats: dict[object, list[int]] = {}
    seeds: dict[object, set[str]] = {}
    for index, run in enumerate(runs):
        recipe = frozenset((k, v) for k, v in run.parameters.items() if k not in ignored)
        texts = tuple(sorted((use, *sorted(prints)) for use, prints in run.datasets.items()))
        key = (recipe, texts)
        seed = run.parameters.get(SEED, "")
        is_new = seed not in seeds.setdefault(key, set())
        seeds[key].add(seed)
        members.setdefault(key, [])
        repeats.setdefault(key, [])
        (members if is_new else repeats)[key].append(index)
    names = _names([[runs[i].name for i in members[key]] for key in members])
    return [
        Group(name, members[key], repeats[key]) for name, key in zip(names, members, strict=True)
    ]


def _ignored_fields() -> set[str]:
    operational = {name for name, _, is_operational, _ in field_reference() if is_operational}
    return (operational - _RESULT_CHANGING) | {SEED}


def _names(groups: list[list[str]]) -> list[str]:
    """The common beginning of the names of a group's runs, without what led up to the seed."""
    names = []
    for runs in groups:
        common = runs[0]
        if len(runs) > 1:
            common = os.path.commonprefix(runs)  # noqa: RUF071 (names, not paths)
            common = re.sub(r"([-_. ](seed|s))?[-_. ]*\d*$", "", common)
        names.append(common or runs[0])
    return [
        name if names.count(name) == 1 else f"{name} ({runs[0]})"
        for name, runs in zip(names, groups, strict=True)
    ]


def finite(values: Sequence[float]) -> list[float]:
    """Those that are numbers: MLflow stores infinities as the largest floats."""
    return [value for value in values if is_finite(value)]


def is_finite(value: float) -> bool:
    """Whether this is a number, and not what MLflow stores for an infinity."""
    return math.isfinite(value) and abs(value) < 1e300
