"""What `tvq plan` prints, writes as JSON and draws."""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.console import Console
from jobs.palette import PALETTE
from jobs.planning.changes import is_another_training, offered
from jobs.planning.chips import GIB
from jobs.planning.plan import Plan
from pipeline.storage import LocalStore

_KINDS = {
    "parameters": "parameters",
    "optimizer": "optimizer",
    "codebooks": "codebooks",
    "gradients": "gradients",
    "cache": "cache of the attention",
    "activations": "activations for the backward pass",
    "other temporaries": "other temporaries",
    "batch and padding": "batch, results, padding",
    "program": "program",
}
"""Kinds of memory, in the order in which they are shown."""


def print_plans(name: str, plans: Sequence[Plan], console: Console) -> None:
    """All that is known of each target, then the targets side by side."""
    for each in plans:
        _print_plan(name, each, console)
        if each.open_loops:
            console.warning(
                f"{each.target.text}: {each.open_loops} loops of the compiled programs do not say"
                " how often they go round and count once: operations, time and money are too low"
            )
    if len(plans) > 1:
        console.line()
        console.table(*comparison_table(plans), title="side by side")
        console.result(verdict(plans))


def verdict(plans: Sequence[Plan]) -> str:
    """Which of several targets is the cheapest."""
    found = cheapest(plans)
    if found is None:
        return "cheapest: none fits or none has a price"
    assert found.money is not None
    return (
        f"cheapest: {found.target.text}, {found.money.devices:,.0f} {found.money.currency}"
        f" in {hours_in_words(found.hours)} (estimates)"
    )


def cheapest(plans: Sequence[Plan]) -> Plan | None:
    """Of those that fit, with their changes if need be, the one whose devices cost least; another
    training is none of them."""
    priced = [
        (one.money.devices, index, one)
        for index, each in enumerate(plans)
        if (one := each if each.fits else each.changed)
        and one.money
        and not is_another_training(each.changes)
    ]
    return min(priced)[2] if priced else None


def comparison_table(plans: Sequence[Plan]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a target a row."""
    columns = ["on", "fits", "memory", "ms a batch*", "tokens/s*", "hours*", "price*"]
    rows = []
    for each in plans:
        one = each if each.fits else each.changed or each
        with_ = f"with {offered(each.changes)}" if each.changed else "no"
        rows.append(
            [
                each.target.text,
                "yes" if each.fits else with_,
                memory_in_words(one.needed),
                f"{1e3 * one.time.total:,.1f}" if one.time else "-",
                f"{one.tokens_per_second:,.0f}" if one.tokens_per_second else "-",
                f"{one.hours:,.1f}" if one.hours else "-",
                f"{one.money.devices:,.0f} {one.money.currency}" if one.money else "-",
            ]
        )
    return columns, rows


def _print_plan(name: str, plan: Plan, console: Console) -> None:
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    console.heading(f"{name} on {plan.target.text}: {plan.target.devices} {plan.target.chip.name}")
    limit = f"of {memory_in_words(plan.memory_available)} a device"
    needed = memory_in_words(plan.needed)
    if plan.fits:
        console.result(f"fits: {needed} {limit}; mesh {axes}")
    else:
        console.result(f"does not fit: needs {needed} {limit}; mesh {axes}")
        if plan.changed:
            needed = memory_in_words(plan.changed.needed)
            console.result(f"fits with {offered(plan.changes)}: {needed} {limit} (compiled)")
        else:
            console.result(
                "no change of fsdp, remat, accumulation or batch is known to make it fit"
            )
    if plan.padded_rows:
        console.result(
            f"{plan.padded_rows} of {plan.padded_rows + plan.batch_rows} rows are padding: data x"
            " fsdp does not divide the batch; use cluster.tensor, or another training.batch_size"
        )
    shown = plan.changed or plan
    if shown.activations_travel:
        times = sum(shown.collectives.values()) / shown.parameter_collectives
        console.warning(
            f"on {plan.target.text} a device sends {times:,.0f} times what parameters and gradients"
            " are: activations travel; try a smaller cluster.tensor"
        )
    if plan.changed:
        console.line(f"below: with {offered(plan.changes)}")
    console.line()
    console.table(
        ["memory of a device", "size"],
        [[label, memory_in_words(shown.memory[kind])] for kind, label in _KINDS.items()
         if kind in shown.memory],
    )  # fmt: skip
    console.line()
    console.table(
        ["program", "memory of a device", "fits", "compiled in"],
        [
            [each.name, memory_in_words(each.needed), "yes" if each.fits else "no",
             f"{each.seconds_to_compile:,.0f} s"]
            for each in shown.programs
        ],
    )  # fmt: skip
    console.line()
    console.table(["figure", "value"], figures(shown))
    console.line("* an estimate, a roofline over the compiler's program:")
    for assumption in plan.assumptions:
        console.line(f"  - {assumption}")


def figures(plan: Plan) -> list[list[str]]:
    """Name and value of what there is to say besides memory."""
    rows = [
        ["rows of a device", f"{plan.rows_per_device}"],
        ["updates, batches", f"{plan.updates:,}, {plan.batches:,}"],
        ["tokens of a batch", f"{plan.batch_tokens:,}"],
        ["operations of a batch by the model's formula", _flop(plan.flops_formula)],
    ]
    if plan.flops_compiler:
        share = plan.flops_compiler / plan.flops_formula
        by_compiler = f"{_flop(plan.flops_compiler)} ({share:.2f}x)"
        rows.append(["operations of a batch by the compiler", by_compiler])
    if plan.traffic:
        rows.append(["memory traffic of a batch, a device", _bytes(plan.traffic)])
        rows.append(
            ["memory traffic of a token", _bytes(plan.traffic * _devices(plan) / plan.batch_tokens)]
        )
    for kind, size in sorted(plan.collectives.items()):
        rows.append([f"{kind}, sent by a device in a batch", _bytes(size)])
    if plan.time:
        time = plan.time
        rows += [
            ["time of a batch*", f"{1e3 * time.total:,.1f} ms, bound by {time.bound}"],
            ["  matrix products*", f"{1e3 * time.products:,.1f} ms"],
            ["  memory*", f"{1e3 * time.memory:,.1f} ms"],
            ["  collectives*", f"{1e3 * time.network:,.1f} ms"],
            ["tokens/s*", f"{plan.tokens_per_second:,.0f}"],
            ["whole training*", hours_in_words(plan.hours)],
        ]
    if plan.evaluation_seconds:
        rows.append(["an evaluation batch*", f"{1e3 * plan.evaluation_seconds:,.1f} ms"])
    if plan.decode_seconds:
        rows.append(["a token that one device writes*", f"{1e3 * plan.decode_seconds:,.2f} ms"])
    rows.append(["a checkpoint", _bytes(plan.checkpoint_bytes)])
    rows.append(
        [f"{plan.checkpoints_kept} checkpoints kept",
         _bytes(plan.checkpoints_kept * plan.checkpoint_bytes)]
    )  # fmt: skip
    if plan.money:
        money = plan.money
        rows += [
            [f"devices for the training* (prices of {money.as_of})",
             f"{money.devices:,.2f} {money.currency}"],
            ["checkpoints stored for a month", f"{money.storage_month:,.2f} {money.currency}"],
            ["one checkpoint out of the cloud", f"{money.egress:,.2f} {money.currency}"],
        ]  # fmt: skip
    return rows


def as_json(name: str, plans: Sequence[Plan]) -> dict[str, Any]:
    """All of it, with names that say the unit."""
    found = cheapest(plans)
    return {
        "recipe": name,
        "cheapest": found.target.text if found else None,
        "plans": [plan_json(each) for each in plans],
    }


def plan_json(plan: Plan) -> dict[str, Any]:
    """One of them."""
    return {
        "on": plan.target.text,
        "open_loops": plan.open_loops,
        "devices": plan.target.devices,
        "chip": plan.target.chip.name,
        "compiled_for": plan.target.kind if plan.target.kind != "gpu" else "cpu",
        "fits": plan.fits,
        "mesh": plan.mesh,
        "rows_per_device": plan.rows_per_device,
        "padded_rows": plan.padded_rows,
        "memory_bytes": plan.memory,
        "memory_needed_bytes": plan.needed,
        "memory_available_bytes": plan.memory_available,
        "programs": [each._asdict() for each in plan.programs],
        "updates": plan.updates,
        "batches": plan.batches,
        "tokens_per_batch": plan.batch_tokens,
        "flops_per_batch_formula": plan.flops_formula,
        "flops_per_batch_compiler": plan.flops_compiler,
        "traffic_bytes_per_device_and_batch": plan.traffic,
        "collective_bytes_per_device_and_batch": plan.collectives,
        "activations_travel": plan.activations_travel,
        "estimate": {
            "assumptions": list(plan.assumptions),
            "seconds_per_batch": plan.time._asdict() if plan.time else None,
            "bound": plan.time.bound if plan.time else None,
            "tokens_per_second": plan.tokens_per_second,
            "hours": plan.hours,
            "evaluation_seconds_per_batch": plan.evaluation_seconds,
            "decode_seconds_per_token": plan.decode_seconds,
            "money": plan.money._asdict() if plan.money else None,
        },
        "checkpoint_bytes": plan.checkpoint_bytes,
        "checkpoints_kept": plan.checkpoints_kept,
        "changes": plan.changes,
        "changed": plan_json(plan.changed) if plan.changed else None,
    }


# ---- A figure ------------------------------------------------------------------------------------


def draw(name: str, plans: Sequence[Plan], path: Path) -> None:
    """Memory by kind and time of a batch by what it is spent on, a target a bar; where it does not
    fit, another bar of what does."""
    from matplotlib.figure import Figure

    bars = [(each.target.text, each) for each in plans]
    for each in reversed(plans):
        if each.changed:
            changed = re.sub(r" (?!training\))", "\n", offered(each.changes))
            at = bars.index((each.target.text, each)) + 1
            bars.insert(at, (f"{each.target.text} with\n{changed}", each.changed))
    figure = Figure(figsize=(10, 2 + 0.75 * len(bars)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_memory(left, [each for _, each in bars])
    _draw_time(right, [each for _, each in bars])
    left.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize="small")
    left.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="x-small",
        frameon=False,
    )  # fmt: skip
    figure.suptitle(f"{name}, planned")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    LocalStore(path.absolute().parent).write(path.name, drawn.getvalue())


def _draw_memory(axes: Any, plans: Sequence[Plan]) -> None:
    at = range(len(plans))
    begins = [0.0] * len(plans)

    def put(sizes: list[float], **style: Any) -> None:
        nonlocal begins
        if any(sizes):
            axes.barh(at, sizes, 0.6, begins, **style)
            begins = [begin + size for begin, size in zip(begins, sizes, strict=True)]

    for colour, (kind, label) in zip([*PALETTE, "#999999", "#DDDDDD"], _KINDS.items(), strict=True):
        put([each.memory.get(kind, 0) / GIB for each in plans], color=colour, label=label)
    needed = [(each.programs[0].needed or 0) / GIB for each in plans]
    rest = [0 if each.time else max(0, all_ - begin)
            for each, all_, begin in zip(plans, needed, begins, strict=True)]  # fmt: skip
    put(rest, color="white", edgecolor="#444444", hatch="////", label="not known of what")
    widest = max(*begins, *(each.memory_available / GIB for each in plans))
    for index, each in enumerate(plans):
        limit = each.memory_available / GIB
        axes.plot([limit, limit], [index - 0.4, index + 0.4], color="black", linewidth=2,
                  label="" if index else "what a device has")  # fmt: skip
        said = f"{memory_in_words(each.programs[0].needed)}\nof {limit:.2f}"
        colour = "black" if each.programs[0].fits else PALETTE[1]
        place = max(begins[index], limit) + 0.01 * widest
        axes.text(place, index, said, va="center", fontsize="small", color=colour)
    axes.set_xlim(0, 1.2 * widest)
    axes.set_xlabel("GiB a device, training step")


def _draw_time(axes: Any, plans: Sequence[Plan]) -> None:
    longest = max((each.time.total for each in plans if each.time), default=0.001)
    for index, each in enumerate(plans):
        if each.time is None:
            axes.text(0, index, " not known", va="center", fontsize="small")
            continue
        parts = {"matrix products": each.time.products, "memory": each.time.memory,
                 "collectives": each.time.network, "batch": each.time.total}  # fmt: skip
        for offset, (label, seconds) in enumerate(parts.items()):
            place = index + 0.17 * (offset - 1.5)
            axes.barh(place, 1e3 * seconds, 0.14, color="black" if label == "batch" else "#999999")
            axes.text(1e3 * seconds, place, f" {label} {1e3 * seconds:,.1f}", va="center",
                      fontsize="x-small")  # fmt: skip
    axes.set_xlim(0, 1.4 * 1e3 * longest)
    axes.set_xlabel("ms a batch (estimate)")


# ---- Words ---------------------------------------------------------------------------------------


def _devices(plan: Plan) -> int:
    return plan.target.devices


def memory_in_words(size: int | None) -> str:
    """In powers of 1024, as memory is sold; None: not known."""
    if size is None:
        return "?"
    for unit, factor in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor / 10:
            return f"{size / factor:,.2f} {unit}"
    return f"{size} B"


def _flop(count: float) -> str:
    for unit, factor in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count / 1e6:,.2f} MFLOP"


def _bytes(size: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.2f} {unit}"
    return f"{size:,.0f} B"


def hours_in_words(hours: float | None) -> str:
    """With the days of long ones."""
    if hours is None or math.isnan(hours):
        return "-"
    return f"{hours:,.1f} hours" if hours < 48 else f"{hours:,.0f} hours ({hours / 24:,.1f} days)"
