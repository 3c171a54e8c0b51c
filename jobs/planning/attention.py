"""The forms of attention against each other on devices that are not there: one layer, compiled.

Forward and backward of a layer, as in `tvq bench attention`, on one device. Attention over keys
that are not quantised is taken in its better form, which leaves out the masked half.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jobs.console import Console
from jobs.planning.chips import Target
from jobs.planning.compilations import Compilation, compile_for
from jobs.planning.compiled_costs import read_costs
from jobs.planning.plan import GPU_ASSUMPTION, bytes_wanted, memory_available, roofline
from jobs.recipe import Recipe, resolve
from model.config import ModelConfig

COMPARED = ("serial", "parallel", "full-chunked")
"""Of bench.programs.FORMS; the last is the dense attention that the others are compared with."""
DENSE = "full-chunked"


class FormCost(NamedTuple):
    """A layer with one form at one length."""

    length: int
    form: str
    fits: bool
    needed: int | None
    """Bytes."""
    flops_per_token: float | None
    """Of matrix products, by the compiler; None where it does not fit."""
    bytes_per_token: float | None
    """To and from main memory; None where it does not fit or is not known."""
    seconds: float | None
    """Roofline of a row of the length."""


class FormsCompared(NamedTuple):
    """All of them on a target."""

    target: Target
    costs: list[FormCost]

    def of(self, form: str, length: int) -> FormCost:
        return next(c for c in self.costs if (c.form, c.length) == (form, length))

    def ratio(self, cost: FormCost) -> float | None:
        """How many times faster than dense attention it is estimated to be; None: unknown."""
        dense = self.of(DENSE, cost.length)
        return dense.seconds / cost.seconds if dense.seconds and cost.seconds else None


def compare_forms(
    recipe: Recipe,
    target: Target,
    lengths: Sequence[int],
    *,
    limit_seconds: float,
    console: Console,
) -> FormsCompared:
    """Compiles a layer with each form at each length. Raises UserError as `compile_for` does."""
    recipe = resolve(recipe)
    costs = []
    for length in lengths:
        names = {f"attention {form} {length}": form for form in COMPARED}
        compiled = compile_for(
            recipe, target, list(names), limit_seconds=limit_seconds, console=console
        )
        rounds = far_chunks(recipe.model, length)
        costs += [
            _cost(form, length, compiled[name], target, rounds if form == DENSE else None)
            for name, form in names.items()
        ]
    return FormsCompared(target, costs)


def far_chunks(model: ModelConfig, length: int) -> float:
    """How many chunks of older keys a block of the dense form meets beyond its window, on the
    average: the rounds of its inner loop, which the text of its program does not say."""
    blocks = range(0, length, model.tile)
    older = (max(begin - model.window, 0) for begin in blocks)
    return sum(math.ceil(tokens / model.tile) for tokens in older) / len(blocks)


def _cost(
    form: str, length: int, compiled: Compilation, target: Target, open_rounds: float | None
) -> FormCost:
    facts = compiled.facts
    if facts.error or facts.total > memory_available(target):
        needed = bytes_wanted(facts.error) if facts.error else facts.total
        return FormCost(length, form, False, needed, None, None, None)
    cost = read_costs(compiled.text(), open_rounds)
    return FormCost(
        length,
        form,
        True,
        facts.total,
        cost.flops / length,
        None if target.kind == "gpu" else cost.traffic / length,  # GPU_ASSUMPTION
        roofline(cost, target).total,
    )


def print_comparison(name: str, compared: FormsCompared, console: Console) -> None:
    """A table, a length and form a row."""
    console.heading(
        f"a layer of {name} on one {compared.target.chip.name}, forward and backward, 1 row"
    )
    rows = []
    for cost in compared.costs:
        ratio = compared.ratio(cost)
        rows.append(
            [
                f"{cost.length:,}",
                cost.form,
                "yes" if cost.fits else "no",
                f"{cost.needed / 2**30:,.2f}" if cost.needed else "-",
                f"{cost.flops_per_token / 1e6:,.1f}" if cost.flops_per_token else "-",
                f"{cost.bytes_per_token / 1e3:,.1f}" if cost.bytes_per_token else "-",
                f"{1e3 * cost.seconds:,.2f}" if cost.seconds else "-",
                f"{cost.length / cost.seconds:,.0f}" if cost.seconds else "-",
                f"{ratio:.2f}" if ratio else "-",
            ]
        )
    console.table(
        ["length", "form", "fits", "GiB", "MFLOP/token", "kB/token", "ms*", "tokens/s*",
         "x dense*"],
        rows,
    )  # fmt: skip
    console.line(
        "* estimates: each instruction at the chip's peak or the memory's full speed, whichever is"
        f" slower; dense is {DENSE}, exact attention over all keys without the masked half"
    )
    if compared.target.kind == "gpu":
        console.line(f"* {GPU_ASSUMPTION}")


def as_json(compared: FormsCompared) -> dict[str, Any]:
    """With the ratio of each."""
    return {
        "on": compared.target.text,
        "estimate": True,
        "results": [
            {**cost._asdict(), "times_faster_than_dense": compared.ratio(cost)}
            for cost in compared.costs
        ],
    }
