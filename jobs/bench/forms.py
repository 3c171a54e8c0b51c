"""`tvq bench`: how fast the forms of attention train, against each other and the machine's peak."""

import dataclasses
import os
from typing import Any, Literal

from jobs import recipe as recipes
from jobs.bench.measurement import Comparison, Measured, Spread, compare
from jobs.bench.programs import Geometry, attention_program, training_program
from jobs.console import Console
from jobs.errors import UserError
from jobs.training.host_memory import keep_freed_memory
from model.config import ModelConfig
from model.counts import parameter_count

_GIB = 2**30


def bench_command(
    what: Literal["attention", "train"],
    name: str,
    overrides: tuple[str, ...],
    *,
    lengths: str,
    forms: str,
    rounds: int,
    seconds: float,
    batch_size: int,
    console: Console,
    update_length: int | None = None,
    as_json: bool = False,
) -> None:
    """Times one layer, or a whole training step, with each form of attention at each length.

    `name` is a recipe; `lengths` and `forms` are separated by commas.

    Raises:
        UserError, ConfigError: an unknown recipe, form or field, a length that is none, an
            impossible combination.
    """
    recipe = recipes.resolve(recipes.load(name, overrides))
    geometry = Geometry(recipe.model, recipe.optimizer, batch_size, update_length)
    make = attention_program if what == "attention" else training_program
    programs = [
        make(geometry, form, length)
        for length in numbers_of_tokens(lengths, "--lengths")
        for form in _forms(forms)
    ]
    keep_freed_memory()  # as training does
    describe(console, what, name, geometry, rounds)
    comparison = compare(
        programs, rounds=rounds, seconds=seconds, dtype=geometry.model.dtype, console=console
    )
    if as_json:
        console.json(as_tree(what, name, geometry, rounds, comparison))
    else:
        show(console, comparison)


def describe(console: Console, what: str, name: str, geometry: Geometry, rounds: int) -> None:
    """Says what is about to be measured, and how."""
    model = geometry.model
    update = "T" if geometry.update_length is None else f"{geometry.update_length:,}"
    each = {
        "attention": "one layer, forward and backward",
        "train": f"one training step (forward, backward, optimizer), update length {update}",
    }
    console.heading(f"bench {what}")
    describe_model(console, name, model)
    console.line(f"measured  {each.get(what, what)}, batch {geometry.batch_size} x T")
    console.line(f"clock     wall-clock; median of {rounds} rounds in which all take turns")
    console.line(f"machine   {machine()}")


def describe_model(console: Console, name: str, model: ModelConfig) -> None:
    """Says what the model of a recipe is made of."""
    count = parameter_count(model)
    console.line(
        f"model     {name}: {model.n_layers} layers, d_model {model.d_model}, {model.n_heads} heads"
        f" on {model.kv_heads} of keys, d_key {model.d_key}, d_value {model.d_value}, codes"
        f" {model.n_codes}, window {model.window}, block {model.tile}, vocabulary"
        f" {model.vocab_size}, {model.dtype}, remat {'on' if model.remat else 'off'};"
        f" {count.trained:,} parameters + {count.codebook:,} in codebooks"
    )


def show(console: Console, comparison: Comparison) -> None:
    """Prints a table of what was measured."""
    first = comparison.measured[0].program.form
    columns = [
        "T", "form", "tokens/s", "least", "most", f"x {first}", "MFLOP/token", f"FLOPs x {first}",
        "GFLOP/s", "% of peak", "memory GiB", "compile s",
    ]  # fmt: skip
    rows = [
        [
            f"{each.program.length:,}",
            each.program.form,
            *_speed_cells(each),
            f"{each.program.flops_per_token / 1e6:,.2f}",
            f"{_flops_ratio(each, comparison):.2f}",
            *_efficiency_cells(each),
            f"{each.memory_bytes / _GIB:.2f}",
            f"{each.compile_seconds:.1f}",
        ]
        for each in comparison.measured
    ]
    console.table(columns, rows)
    for each in comparison.measured:
        if each.speed is None:
            console.result(
                f"{each.program.form} at {each.program.length:,} does not fit: needs"
                f" {each.memory_bytes / _GIB:.1f} GiB, {each.available_bytes / _GIB:.1f} GiB are"
                " available"
            )
    peak = comparison.peak_gflops
    console.result(
        f"peak: {peak.median:,.1f} GFLOP/s ({peak.least:,.1f} to {peak.greatest:,.1f}), the fastest"
        f" {comparison.peak} product before the programs of each length in each round"
    )


def _speed_cells(each: Measured) -> list[str]:
    if each.speed is None:
        return ["-"] * 4
    rate, ratio = each.speed.tokens_per_second, each.speed.ratio
    cells = [f"{figure:,.0f}" for figure in rate]
    return [*cells, "-" if ratio is None else f"{ratio.median:.2f}"]


def _efficiency_cells(each: Measured) -> list[str]:
    if each.speed is None:
        return ["-"] * 2
    return [f"{each.speed.gflops.median:,.1f}", f"{each.speed.percent_of_peak.median:.1f}%"]


def _flops_ratio(each: Measured, comparison: Comparison) -> float:
    """FLOPs per token over those of the first program of that length."""
    of_length = (m.program for m in comparison.measured if m.program.length == each.program.length)
    return each.program.flops_per_token / next(of_length).flops_per_token


def as_tree(
    what: str, name: str, geometry: Geometry, rounds: int, comparison: Comparison
) -> dict[str, Any]:
    """Everything that was measured and how, for JSON."""
    return {
        "bench": what,
        "name": name,
        "model": dataclasses.asdict(geometry.model),
        "batch_size": geometry.batch_size,
        "update_length": geometry.update_length,
        "clock": "wall",
        "rounds": rounds,
        "machine": machine(),
        "peak": comparison.peak,
        "peak_gflops": comparison.peak_gflops._asdict(),
        "baseline": comparison.measured[0].program.form,
        "results": [_result(each, comparison) for each in comparison.measured],
    }


def _result(each: Measured, comparison: Comparison) -> dict[str, Any]:
    program, speed = each.program, each.speed
    result: dict[str, Any] = {
        "length": program.length,
        "form": program.form,
        "fits": speed is not None,
        "flops_per_token": program.flops_per_token,
        "flops_ratio": _flops_ratio(each, comparison),
        "memory_bytes": each.memory_bytes,
        "available_bytes": each.available_bytes,
        "compile_seconds": each.compile_seconds,
    }
    if speed is None:
        return result
    figures = {
        field: figure._asdict() if isinstance(figure, Spread) else figure
        for field, figure in speed._asdict().items()
    }
    return result | figures


def numbers_of_tokens(text: str, option: str) -> list[int]:
    """What an option says, separated by commas; raises UserError for one that is none, or twice."""
    parts = [part.strip() for part in text.split(",")]
    wrong = next((part for part in parts if not part.isdecimal() or int(part) < 1), None)
    if wrong is not None:
        raise UserError(f"{option}: expected numbers of tokens, as 2048,8192; got {wrong!r}")
    return _distinct([int(part) for part in parts], option)


def _forms(text: str) -> list[str]:
    return _distinct([part.strip() for part in text.split(",")], "--forms")


def _distinct(items: list[Any], option: str) -> list[Any]:
    twice = next((item for item in items if items.count(item) > 1), None)
    if twice is not None:
        raise UserError(f"{option}: expected each once, got {twice!r} twice")
    return items


def machine() -> str:
    """What the programs run on."""
    import jax

    device = jax.devices()[0]
    cores = f"{os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    return f"one {device.platform} device, {cores}, jax {jax.__version__}"
