"""A sweep's file: which fields are varied, and how.

    name: rates
    train: small data.corpus=corpora/books training.steps=400
    search: grid
    space:
      optimizer.learning_rate: [1e-3, 2e-3, 4e-3]
      model.window: [128, 256]
    seeds: [0, 1, 2]
    parallel: 2

`search` is grid (every combination), random or optuna (`trials` of them). There, a field of the
space may also be {uniform: [LOW, HIGH]}, {log_uniform: [LOW, HIGH]} or {integers: [LOW, HIGH]}.
`early_stopping: {after: 100, reduction: 3}` ends, at 100 updates and at 3 times as many again and
again, what is not among the best third (ASHA).
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from jobs import recipe as recipes
from jobs.errors import UserError
from jobs.flows.flow_file import name_of, named, read_tree, refuse_unknown, words
from jobs.recipe import Recipe
from jobs.recipe_yaml import dump_yaml

Search = Literal["grid", "random", "optuna"]
_RANGES = ("uniform", "log_uniform", "integers")
SEED = "training.seed"


@dataclass(frozen=True)
class EarlyStopping:
    """ASHA's rungs."""

    after: int
    """Updates before the first rung."""
    reduction: int = 3
    """One of so many goes on at each rung, to so many times as many updates."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file says."""

    name: str
    train: tuple[str, ...]
    """The recipe, and overrides."""
    space: Mapping[str, Any]
    """Field to a list of values, or to one range."""
    search: Search = "grid"
    trials: int = 8
    """Of a random search or an optimiser: combinations to try."""
    seeds: tuple[int, ...] = (0,)
    """Each combination is trained once with each."""
    parallel: int = 2
    """Trainings at a time, each in one process on one CPU."""
    early_stopping: EarlyStopping | None = None

    @property
    def trainings(self) -> int:
        """How many there are, those that are stopped early included."""
        n_values = len(combinations(self.space)) if self.search == "grid" else self.trials
        return n_values * len(self.seeds)

    def recipe(self, values: Mapping[str, Any], seed: int) -> Recipe:
        """The recipe of one training."""
        name, *overrides = self.train
        overrides += [f"{field}={_text(value)}" for field, value in values.items()]
        overrides += [f"{SEED}={seed}", "cluster.workers=0"]
        return recipes.load(name, tuple(overrides))

    def run_name(self, values: Mapping[str, Any], seed: int) -> str:
        """The name of one training: the same values have the same, so that it is found again."""
        text = json.dumps(dict(values), sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}-s{seed}"

    def to_yaml(self) -> str:
        """For the sweep's folder: a sweep that is resumed is the same."""
        stopping = self.early_stopping
        return dump_yaml(
            {
                "name": self.name,
                "train": list(self.train),
                "search": self.search,
                "space": dict(self.space),
                "trials": self.trials,
                "seeds": list(self.seeds),
                "early_stopping": stopping
                and {"after": stopping.after, "reduction": stopping.reduction},
            }
        )


def load_sweep(location: str | Path) -> Sweep:
    """Reads and checks a sweep's file.

    Raises:
        UserError: there is none, or a field is wrong; names it.
    """
    where = f"sweep {location}"
    tree = read_tree(location, where)
    known = [
        "name", "train", "search", "space", "trials", "seeds", "parallel", "early_stopping",
    ]  # fmt: skip
    refuse_unknown(tree, known, where)
    search = tree.get("search", "grid")
    if search not in get_args(Search):
        raise UserError(f"{where}: search: expected grid, random or optuna, got {search!r}")
    sweep = Sweep(
        name=name_of(tree, Path(location).stem, where),
        train=words(tree, "train", where),
        space=_space(tree.get("space"), search, where),
        search=search,
        trials=_count(tree.get("trials", 8), f"{where}: trials"),
        seeds=_seeds(tree.get("seeds", [0]), where),
        parallel=_count(tree.get("parallel", 2), f"{where}: parallel"),
        early_stopping=_early_stopping(tree.get("early_stopping"), where),
    )
    for override in sweep.train[1:]:
        if override.startswith((f"{SEED}=", "cluster.workers=")):
            raise UserError(f"{where}: train: {override}: the sweep decides this; leave it out")
    for values in corners(sweep.space):  # a combination that is none ends it now
        with named(where):
            sweep.recipe(values, sweep.seeds[0])
    return sweep


def combinations(space: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the values of a grid."""
    return [dict(zip(space, row, strict=True)) for row in itertools.product(*space.values())]


def corners(space: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of listed values and of ends of ranges."""
    ends = {
        field: spec if isinstance(spec, list) else next(iter(spec.values()))
        for field, spec in space.items()
    }
    return combinations(ends)


def _space(space: Any, search: str, where: str) -> dict[str, Any]:
    if not isinstance(space, dict) or not space:
        raise UserError(f"{where}: space: expected section.field: [VALUES], got {space!r}")
    for field, spec in space.items():
        if field == SEED:
            raise UserError(f"{where}: space: {SEED}: give `seeds` instead")
        if isinstance(spec, list) and spec:
            if any(value in spec[:n] for n, value in enumerate(spec)):
                raise UserError(f"{where}: space: {field}: names a value twice, {spec!r}")
            continue
        if search != "grid" and isinstance(spec, dict) and list(spec) and len(spec) == 1:
            [(kind, ends)] = spec.items()
            if kind in _RANGES and _is_range(ends, kind):
                continue
        more = "" if search == "grid" else ", or {uniform|log_uniform|integers: [LOW, HIGH]}"
        raise UserError(f"{where}: space: {field}: expected a list of values{more}, got {spec!r}")
    return dict(space)


def _is_range(ends: Any, kind: str) -> bool:
    if not isinstance(ends, list) or len(ends) != 2:
        return False
    kinds = (int,) if kind == "integers" else (int, float)
    if not all(isinstance(end, kinds) and not isinstance(end, bool) for end in ends):
        return False
    low, high = ends
    return (
        math.isfinite(low)
        and math.isfinite(high)
        and low < high
        and (kind != "log_uniform" or low > 0)
    )


def _early_stopping(fields: Any, where: str) -> EarlyStopping | None:
    if fields is None:
        return None
    if not isinstance(fields, dict):
        raise UserError(f"{where}: early_stopping: expected after and reduction, got {fields!r}")
    refuse_unknown(fields, ["after", "reduction"], f"{where}: early_stopping")
    reduction = _count(fields.get("reduction", 3), f"{where}: early_stopping.reduction")
    if reduction < 2:
        raise UserError(f"{where}: early_stopping.reduction: expected 2 or more")
    return EarlyStopping(_count(fields.get("after"), f"{where}: early_stopping.after"), reduction)


def _seeds(seeds: Any, where: str) -> tuple[int, ...]:
    if (
        not isinstance(seeds, list)
        or not seeds
        or len(set(map(str, seeds))) < len(seeds)
        or not all(isinstance(seed, int) and seed >= 0 for seed in seeds)
    ):
        raise UserError(
            f"{where}: seeds: expected a list of different whole numbers, got {seeds!r}"
        )
    return tuple(seeds)


def _count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: expected a whole number, 1 or more, got {value!r}")
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
