"""`tvq plan`: whether a training fits devices that nobody has paid for yet, how long, how much.

The programs of the recipe are compiled for real (compilations.py); what follows from the
compiled text is here. Times are a roofline, not a measurement: ASSUMPTIONS says what they leave
out.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from jobs.cluster.accelerators import mesh_axes
from jobs.console import Console
from jobs.planning.changes import possible_changes, stated, with_changes
from jobs.planning.chips import GIB, Chip, Target, cluster_overrides, read_target
from jobs.planning.compilations import Compilation, compile_for
from jobs.planning.compiled_costs import Cost, read_costs
from jobs.planning.compiler import DECODED, PROGRAMS
from jobs.planning.prices import Prices, read_prices
from jobs.recipe import Recipe, resolve
from model.counts import flops_per_token, flops_per_update

ASSUMPTIONS = (
    "each instruction takes as long as its matrix products at the chip's peak or its bytes at the"
    " memory's full speed, whichever is longer; vector units, start-up of instructions and input"
    " are free",
    "collectives are not hidden behind arithmetic and use all links at their full speed",
    "no evaluation, checkpoint, restart or waiting for capacity is in the hours",
)
"""Of the times; a real program is slower, seldom by less than a third."""
GPU_ASSUMPTION = (
    "of a GPU only the matrix products are known, from XLA's compiler for the CPU: memory traffic"
    " is left out, and the memory needed is that of the CPU's program"
)
_CHANGES_TRIED = 5
GPU_SHARE = 0.75
"""Of a GPU's memory that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""


class Program(NamedTuple):
    """One of the recipe's programs on one device."""

    name: str
    needed: int | None
    """Bytes; None where the compiler gave up without saying."""
    fits: bool
    seconds_to_compile: float


class Time(NamedTuple):
    """A roofline of one call of a program."""

    products: float
    """Seconds of matrix products at the peak."""
    memory: float
    """Seconds of memory traffic at full speed."""
    network: float
    """Seconds of collectives."""
    total: float
    """Instruction by instruction the longer of the first two, and the third."""

    @property
    def bound(self) -> str:
        """What most of it is."""
        parts = {"matrix products": self.products, "memory": self.memory, "network": self.network}
        return max(parts, key=lambda name: parts[name])


class Money(NamedTuple):
    """In the currency of the price file."""

    currency: str
    devices: float
    storage_month: float
    """Of a month in which all checkpoints that are kept lie there."""
    egress: float
    """Of taking the last checkpoint out of the cloud once."""
    as_of: str
    """Of the device's price."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a recipe on a target before it runs."""

    target: Target
    mesh: dict[str, int]
    rows_per_device: int
    padded_rows: int
    """Rows of the batch that are only there to make it divide."""
    programs: list[Program]
    memory: dict[str, int]
    """Of a device, for the training step, by kind; only what is known where it does not fit."""
    memory_available: int
    updates: int
    batches: int
    batch_rows: int
    batch_tokens: int
    flops_formula: int
    """Of a batch on all devices: the model's, without recomputation."""
    flops_compiler: int | None
    """Of a batch on all devices: all matrix products of the compiled program; None: none is."""
    traffic: int | None
    """Bytes of main memory that a device reads and writes in a batch."""
    collectives: dict[str, int]
    """Bytes that a device sends in a batch, by kind."""
    parameter_collectives: int
    """Bytes that it would send if only parameters and gradients travelled: in each update gathered
    for the forward and for the backward pass, and reduced."""
    time: Time | None
    """Of a batch; an estimate."""
    evaluation_seconds: float | None
    """Of an evaluation batch; an estimate."""
    decode_seconds: float | None
    """Of a token of one row on one device; an estimate."""
    checkpoint_bytes: int
    checkpoints_kept: int
    open_loops: int
    """Of the compiled programs, whose rounds are not known and count once."""
    money: Money | None
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields with which it fits where it does not: compiled, not guessed; empty if none is known.
    """
    changed: "Plan | None" = None
    """The plan with these."""

    @property
    def fits(self) -> bool:
        return all(program.fits for program in self.programs)

    @property
    def needed(self) -> int | None:
        """Bytes of the program that needs most; None where the compiler did not say."""
        sizes = [program.needed for program in self.programs]
        return None if None in sizes else max(size for size in sizes if size is not None)

    @property
    def activations_travel(self) -> bool:
        """Whether collectives move far more than parameters and gradients: then the mesh is split
        in a way that makes devices send each other what they compute."""
        return sum(self.collectives.values()) > 4 * self.parameter_collectives > 0

    @property
    def tokens_per_second(self) -> float | None:
        return self.batch_tokens / self.time.total if self.time else None

    @property
    def hours(self) -> float | None:
        return self.batches * self.time.total / 3600 if self.time else None

    @property
    def assumptions(self) -> tuple[str, ...]:
        return ASSUMPTIONS + ((GPU_ASSUMPTION,) if self.target.kind == "gpu" else ())


def plan(
    recipe: Recipe,
    on: str,
    *,
    prices: Path | None = None,
    limit_seconds: float = 1800,
    find_changes: bool = True,
    console: Console | None = None,
) -> Plan:
    """Compiles the recipe's programs for `on`, such as v5e:4x4, and says what they need.

    Args:
        recipe: with its mesh axes; workers and topology are those of `on`.
        on: a TPU slice, h100:NUMBER or cpu:NUMBER.
        prices: a file in place of tvq's own.
        limit_seconds: for the compiler, each time it is started.
        find_changes: where it does not fit, look for changes with which it does, and compile them.
        console: told what takes minutes.

    Raises:
        UserError: `on` is none, the mesh cannot be, libtpu is missing, or the compiler took too
            long.
    """
    target, costs = read_target(on), read_prices(prices)
    console = console or Console(quiet=True)
    recipe = on_target(resolve(recipe), target)
    made = _plan(recipe, target, costs, PROGRAMS, limit_seconds, console)
    if made.fits or not find_changes:
        return made
    for tried, changes in enumerate(possible_changes(recipe, made)):
        if tried == _CHANGES_TRIED:
            break
        console.line(f"{on}: does not fit; trying {stated(changes)}")
        other = with_changes(recipe, changes)
        if not _plan(other, target, costs, ("train",), limit_seconds, console).fits:
            continue  # what takes most does not fit, so the rest need not be compiled
        changed = _plan(other, target, costs, PROGRAMS, limit_seconds, console)
        if changed.fits:
            return dataclasses.replace(made, changes=changes, changed=changed)
    return made


def memory_available(target: Target) -> int:
    """Bytes of a device that a program may take."""
    return int(target.chip.memory * (GPU_SHARE if target.kind == "gpu" else 1))


def _plan(
    recipe: Recipe,
    target: Target,
    prices: Prices,
    programs: tuple[str, ...],
    limit_seconds: float,
    console: Console,
) -> Plan:
    mesh = _mesh(recipe, target)
    compiled = compile_for(recipe, target, programs, limit_seconds=limit_seconds, console=console)
    available = memory_available(target)
    rows_along = mesh["data"] * mesh["fsdp"]
    padded = -recipe.training.batch_size % rows_along
    tokens = recipe.training.batch_size * recipe.data.sequence_length
    train = compiled["train"]
    # Of writing, the text does not say that it ends after so many tokens, or with the last row.
    cost = {
        name: read_costs(each.text(), DECODED if name == "decode" else None)
        for name, each in compiled.items()
        if not each.facts.error
    }
    time = roofline(cost["train"], target) if "train" in cost else None
    decoded = roofline(cost["decode"], target).total / DECODED if "decode" in cost else None
    batches = recipe.training.steps // recipe.updates_per_batch
    passes = recipe.updates_per_batch * recipe.training.accumulate
    per_token = flops_per_token(recipe.model, recipe.data.sequence_length)
    kept = _checkpoints(recipe)
    size = train.facts.parts["whole_state"]
    price = prices.devices.get(target.version)
    money = None
    if time and price:
        hours = batches * time.total / 3600
        money = Money(
            prices.currency,
            hours * target.devices * price.price,
            kept * size / 1e9 * prices.storage_gb_month.price,
            size / 1e9 * prices.egress_gb.price,
            price.as_of,
        )
    return Plan(
        target=target,
        mesh=mesh,
        rows_per_device=(recipe.training.batch_size + padded) // rows_along,
        padded_rows=padded,
        programs=[_program(name, each, available) for name, each in compiled.items()],
        memory=_memory(train),
        memory_available=available,
        updates=recipe.training.steps,
        batches=batches,
        batch_rows=recipe.training.batch_size,
        batch_tokens=tokens,
        flops_formula=tokens * per_token + passes * flops_per_update(recipe.model) * rows_along,
        flops_compiler=cost["train"].flops * target.devices if "train" in cost else None,
        traffic=cost["train"].traffic if "train" in cost and target.kind != "gpu" else None,
        collectives=cost["train"].collectives if "train" in cost else {},
        parameter_collectives=3 * passes * train.facts.parts["parameters"] * mesh["fsdp"],
        time=time,
        evaluation_seconds=roofline(cost["evaluate"], target).total if "evaluate" in cost else None,
        decode_seconds=decoded,
        checkpoint_bytes=size,
        checkpoints_kept=kept,
        open_loops=sum(each.open_loops for each in cost.values()),
        money=money,
    )


def roofline(cost: Cost, target: Target) -> Time:
    """The least time that a device takes for a program, by its maker's figures."""
    chip: Chip = target.chip
    bandwidth = math.inf if target.kind == "gpu" else chip.bandwidth
    network = sum(cost.collectives.values()) / chip.network if target.devices > 1 else 0.0
    either = sum(
        count * max(flops / chip.flops, traffic / bandwidth)
        for (flops, traffic), count in cost.times.items()
    )
    return Time(cost.unit_flops / chip.flops, cost.traffic / bandwidth, network, either + network)


def _mesh(recipe: Recipe, target: Target) -> dict[str, int]:
    return mesh_axes(recipe.cluster, target.devices, f"--on: {target.text} it is")


def _program(name: str, compiled: Compilation, available: int) -> Program:
    facts = compiled.facts
    needed = bytes_wanted(facts.error) if facts.error else facts.total
    fits = not facts.error and facts.total <= available
    return Program(name, needed, fits, facts.seconds)


_WANTED = re.compile(
    r"[Uu]sed ([\d.]+)([KMG])(?:i?B)? of [\d.]+[KMG]|\(([\d.]+)([KMG])\) exceeds available HBM"
)
_FACTOR = {"K": 2**10, "M": 2**20, "G": GIB}


def bytes_wanted(error: str) -> int | None:
    """What the compiler would have needed, by its own words."""
    found = _WANTED.search(error)
    if not found:
        return None
    return int(float(found[1] or found[3]) * _FACTOR[found[2] or found[4]])


def _memory(compiled: Compilation) -> dict[str, int]:
    """By kind. Temporaries are one figure of the compiler's; of these, what a gradient, the cache
    and the activations take is known from their shapes, and the rest is the rest."""
    facts = compiled.facts
    parts = {name: size for name, size in facts.parts.items() if name != "whole_state"}
    if facts.error:
        return parts
    state = sum(parts[name] for name in ("parameters", "optimizer", "codebooks"))
    named = sum(parts[name] for name in ("gradients", "cache", "activations"))
    # The compiler may keep less of these at once than their shapes say.
    share = min(1.0, facts.temporaries / named) if named else 0.0
    for name in ("gradients", "cache", "activations"):
        parts[name] = int(parts[name] * share)
    parts["other temporaries"] = max(0, facts.temporaries - named)
    parts["batch and padding"] = max(0, facts.arguments - state) + facts.results
    parts["program"] = facts.code
    return parts


def _checkpoints(recipe: Recipe) -> int:
    kept = recipe.checkpoint
    every = recipe.training.steps // kept.keep_every if kept.keep_every else 0
    return min(kept.keep + kept.keep_best + every, max(1, recipe.training.steps // kept.every))


def on_target(recipe: Recipe, target: Target) -> Recipe:
    """The recipe with the devices of the target in its cluster section, and its mesh.

    Raises ConfigError where the mesh is not that of so many devices.
    """
    axes = _mesh(recipe, target)
    stated = dict(line.removeprefix("cluster.").split("=") for line in cluster_overrides(target))
    values: dict[str, Any] = {
        name: None if text == "null" else int(text) if text.isdigit() else text
        for name, text in stated.items()
    }
    if recipe.cluster.fsdp == -1:
        values |= axes
    return dataclasses.replace(recipe, cluster=dataclasses.replace(recipe.cluster, **values))
