"""Programs timed against each other in one process, beside the machine's matmul peak.

A shared machine's speed drifts by more than what is measured. So programs take turns: in each round
every length's programs run one after the other, behind a measurement of the peak; ratios and
percentages are taken within a round, and what is reported is their median over the rounds.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs.compiler_options import compiler_options
from jobs.console import Console
from jobs.training.host_memory import release_freed_memory

PEAK_SIZE = 2048
"""Rows and columns of the square matrices whose product measures the peak."""
_PEAK_CALLS = 4
"""Products in a round; the fastest is that round's peak."""


class Program(NamedTuple):
    """Something to time."""

    form: str
    """Its name among the programs of its length."""
    length: int
    """T: tokens of a row."""
    tokens: int
    """Tokens that a call handles."""
    flops_per_token: int
    """By the stated formula."""
    function: Callable[[Any, Any], tuple[Any, Any]]
    """(state, inputs) -> (state, whatever else it computes). The state is donated, and the next
    call gets what this one returned."""
    begin: Callable[[], tuple[Any, Any]]
    """Makes the first state and the inputs; traced with abstract values, then jitted."""


class Spread(NamedTuple):
    """A figure over the rounds."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> "Spread":
        """That of one figure a round."""
        return cls(statistics.median(figures), min(figures), max(figures))


class Speed(NamedTuple):
    """How fast a program ran."""

    tokens_per_second: Spread
    """Of wall-clock time."""
    ratio: Spread | None
    """That over the first program's of this length, round by round; None if that does not fit."""
    gflops: Spread
    """The formula's FLOPs, in 1e9 per second of wall-clock time."""
    percent_of_peak: Spread
    """That over the matmul peak just before, round by round."""
    calls: int
    """Calls in each round."""


class Measured(NamedTuple):
    """A program, and what it took."""

    program: Program
    compile_seconds: float
    memory_bytes: int
    """The compiled program's arguments, results and temporary arrays."""
    available_bytes: int
    """What there was when it was compiled."""
    speed: Speed | None
    """None if it does not fit into the memory: it was not run."""


class Comparison(NamedTuple):
    """All programs, and the peak that they are held to."""

    peak: str
    """What the peak was measured with."""
    peak_gflops: Spread
    measured: list[Measured]


def compare(
    programs: Sequence[Program], *, rounds: int, seconds: float, dtype: str, console: Console
) -> Comparison:
    """Compiles the programs, calls each once to warm up, then lets them alternate.

    The first program of each length is the one that the others of that length are compared with.
    Calls are repeated until they last `seconds`, so that short programs are timed as well as long
    ones. The peak is that of products in `dtype`.
    """
    with console.progress("compiled", len(programs)) as progress:
        runners = []
        for done, program in enumerate(programs):
            progress.update(done, note=f"{program.form} at {program.length:,}")
            runners.append(_Runner(program, seconds))
        progress.update(len(programs))
    groups: dict[int, list[_Runner]] = {}
    for runner in runners:
        groups.setdefault(runner.program.length, []).append(runner)
    figures: dict[_Runner, list[_Figures]] = {runner: [] for runner in runners}
    peak, peaks = Peak(dtype), []
    with console.progress("round", rounds) as progress:
        for round_ in range(rounds):
            for length, group in groups.items():
                progress.update(round_, note=f"length {length:,}")
                peaks.append(peak.gflops())
                rates = _rates([runner for runner in group if runner.fits])
                for runner, rate in rates.items():
                    figures[runner].append(_Figures(rate, rates.get(group[0]), peaks[-1]))
        progress.update(rounds)
    return Comparison(
        f"{PEAK_SIZE}x{PEAK_SIZE}x{PEAK_SIZE} {dtype}",
        Spread.of(peaks),
        [runner.measured(figures[runner]) for runner in runners],
    )


def _rates(group: Sequence["_Runner"]) -> dict["_Runner", float]:
    """Tokens per second of each. Where one needs much of the memory, what the others keep is given
    back before its turn, and they take theirs again in an untimed call."""
    crowded, rates = len(group) > 1 and any(runner.large for runner in group), {}
    for runner in group:
        if crowded:
            release_freed_memory()
            if not runner.large:
                runner.call()
        rates[runner] = runner.tokens_per_second()
    return rates


class _Figures(NamedTuple):
    """Of one program in one round."""

    rate: float
    """Tokens per second."""
    first: float | None
    """Those of the first program of its length."""
    peak: float
    """GFLOP/s."""


class _Runner:
    """A program that is compiled and, if it fits, ready to be timed."""

    def __init__(self, program: Program, seconds: float) -> None:
        import jax

        abstract = jax.eval_shape(program.begin)
        began = time.perf_counter()
        # At the arguments' shapes alone: what does not fit must not be made.
        step = jax.jit(program.function, donate_argnums=0, compiler_options=compiler_options())
        lowered = step.lower(*abstract)
        self._compiled = lowered.compile()
        self.program = program
        self._compile_seconds = time.perf_counter() - began
        self._memory_bytes = _memory_bytes(self._compiled)
        self._available_bytes = _available_bytes()
        self.large = self._memory_bytes > self._available_bytes / 4
        if self.large:
            release_freed_memory()
            self._available_bytes = _available_bytes()
        self.fits = self._memory_bytes <= self._available_bytes
        self._calls = 1
        if self.fits:
            self._state, self._inputs = jax.jit(program.begin)()
            # The first call touches its memory for the first time: a short one is no measure.
            if self._seconds_per_call() < seconds:
                self._calls = math.ceil(seconds / self._seconds_per_call())

    def call(self) -> None:
        self._seconds_per_call()

    def tokens_per_second(self) -> float:
        return self.program.tokens / self._seconds_per_call()

    def _seconds_per_call(self) -> float:
        import jax

        state, out = self._state, None
        began = time.perf_counter()
        for _ in range(self._calls):
            state, out = self._compiled(state, self._inputs)
        jax.block_until_ready((state, out))
        taken = time.perf_counter() - began
        self._state = state
        return taken / self._calls

    def measured(self, figures: list[_Figures]) -> Measured:
        speed = None
        if figures:
            flops = self.program.flops_per_token / 1e9
            ratios = [each.rate / each.first for each in figures if each.first]
            speed = Speed(
                tokens_per_second=Spread.of([each.rate for each in figures]),
                ratio=Spread.of(ratios) if ratios else None,
                gflops=Spread.of([each.rate * flops for each in figures]),
                percent_of_peak=Spread.of(
                    [100 * each.rate * flops / each.peak for each in figures]
                ),
                calls=self._calls,
            )
        return Measured(
            self.program, self._compile_seconds, self._memory_bytes, self._available_bytes, speed
        )


class Peak:
    """The fastest that the machine multiplies matrices."""

    def __init__(self, dtype: str) -> None:
        import jax
        import jax.numpy as jnp

        self._matrix = jnp.full((PEAK_SIZE, PEAK_SIZE), 1 / PEAK_SIZE, dtype)
        self._product = jax.jit(jnp.matmul)
        self.gflops()

    def gflops(self) -> float:
        import jax

        taken = []
        for _ in range(_PEAK_CALLS):
            began = time.perf_counter()
            jax.block_until_ready(self._product(self._matrix, self._matrix))
            taken.append(time.perf_counter() - began)
        return 2 * PEAK_SIZE**3 / min(taken) / 1e9


def _memory_bytes(compiled: Any) -> int:
    sizes = compiled.memory_analysis()
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes  # donated: an argument and a result in one place
        + sizes.temp_size_in_bytes
    )


def _available_bytes() -> int:
    """Memory that a program may still take on the device that it runs on."""
    import jax

    statistics_ = jax.devices()[0].memory_stats()
    if statistics_ and "bytes_limit" in statistics_:
        return statistics_["bytes_limit"] - statistics_.get("bytes_in_use", 0)
    known = Path("/proc/meminfo")
    if known.exists():
        fields = dict(line.split(":") for line in known.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
