"""Where the time of a training step goes, by what XLA's CPU runtime runs.

    python -m tests.baselines.step_profile --length 4096

On one core: with more, a matrix product is handed to other threads and its event ends before it.
"""

import argparse
import collections
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jobs.bench.measurement import Peak, Program
from jobs.bench.programs import Geometry, training_program
from jobs.compiler_options import compiler_options
from jobs.console import Console
from jobs.training.host_memory import keep_freed_memory
from model.config import PRESETS, OptimizerConfig

_CALLS = 6

_PRODUCTS = r"dot|custom-call|ynn"  # YNN has nothing else: see compiler_options
_COPIES = r"copy|broadcast|concatenate|pad|(dynamic-|dynamic-update-)?slice|transpose|bitcast"


def kind_of(name: str, opcode: str) -> str:
    """What an instruction of the compiled program is counted as: by its opcode or, of a fusion, by
    the last word of its name, which is the operation that its result comes from."""
    words = (
        name.split(".")[0].removesuffix("_fusion").split("_") if opcode == "fusion" else [opcode]
    )
    if len(words) > 1 and words[-1] == "bitcast":  # the same bytes under another shape
        words.pop()
    if re.fullmatch(_PRODUCTS, words[-1]):
        return "products"
    return "copies" if re.fullmatch(_COPIES, words[-1]) else "element-wise, sums"


def self_times(lines: Iterable[Any]) -> dict[str, list[float]]:
    """Seconds of each event by its name, less what the events inside it took."""
    seconds = collections.defaultdict(list)
    for line in lines:
        events = [
            (event.start_ns, event.start_ns + event.duration_ns, event.name)
            for event in line.events
        ]
        open_: list[list[Any]] = []
        for begin, end, name in sorted(events, key=lambda event: (event[0], -event[1])):
            while open_ and open_[-1][0] <= begin:
                _, closed, taken = open_.pop()
                seconds[closed].append(taken / 1e9)
            if open_:
                open_[-1][2] -= end - begin
            open_.append([end, name, end - begin])
        for _, closed, taken in open_:
            seconds[closed].append(taken / 1e9)
    return seconds


def profile(program: Program) -> dict[tuple[str, str], float]:
    """Seconds of a call by (inside the blocks' loop or not, kind): of each instruction the time
    that an eighth of its runs were faster than, as the machine is shared, times its runs."""
    import jax

    step = jax.jit(program.function, donate_argnums=0, compiler_options=compiler_options())
    compiled = step.lower(*jax.eval_shape(program.begin)).compile()
    opcodes = dict(
        re.findall(r"^\s*(?:ROOT )?%(\S+) = .*? ([a-z][\w-]*)\(", compiled.as_text() or "", re.M)
    )
    state, inputs = jax.jit(program.begin)()
    state, _ = jax.block_until_ready(compiled(state, inputs))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(_CALLS):
                state, _ = jax.block_until_ready(compiled(state, inputs))
        [path] = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        times = self_times(line for plane in planes for line in plane.lines)
    total: dict[tuple[str, str], float] = collections.defaultdict(float)
    for name, taken in times.items():
        opcode = opcodes.get(name, "while")
        if opcode in ("while", "call", "conditional"):  # what is inside them has events of its own
            continue
        where = "block by block" if len(taken) > _CALLS else "once a layer or step"
        taken = sorted(taken)
        total[where, kind_of(name, opcode)] += taken[len(taken) // 8] * len(taken) / _CALLS
    return total


def main() -> None:
    """Prints the shares of a training step in its default form."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--length", type=int, default=4096, help="T")
    parser.add_argument("--preset", default="small", choices=PRESETS)
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    model, console = PRESETS[options.preset], Console()
    geometry = Geometry(model, OptimizerConfig(schedule="constant"), 1, None)
    program = training_program(geometry, model.attention_form, options.length)
    keep_freed_memory()
    peak = Peak(model.dtype).gflops()
    shares = profile(program)
    whole = sum(shares.values())
    console.table(
        ["where", "what", "ms", "share"],
        [
            [*key, f"{1e3 * seconds:,.1f}", f"{100 * seconds / whole:.1f}%"]
            for key, seconds in sorted(shares.items(), key=lambda item: -item[1])
        ],
    )
    flops = program.flops_per_token * program.tokens
    products = sum(seconds for (_, kind), seconds in shares.items() if kind == "products")
    console.result(
        f"{options.preset} at {options.length:,} tokens on one core: {1e3 * whole:,.0f} ms,"
        f" {100 * flops / whole / 1e9 / peak:.0f}% of its peak of {peak:,.0f} GFLOP/s; the products"
        f" alone {100 * flops / products / 1e9 / peak:.0f}%"
    )


if __name__ == "__main__":
    main()
