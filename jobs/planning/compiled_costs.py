"""What a compiled program does: matrix products, memory traffic and collectives, from XLA's text.

XLA's own `cost_analysis` counts the body of a loop once, and a Transformer's step is loops within
loops: updates, layers, blocks of the attention. Here each instruction counts as often as the loops
around it go round.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from jobs.planning.hlo_text import (
    Array,
    Instruction,
    branches,
    called,
    constant,
    group_size,
    read_computations,
)

_PASSES = {"highest": 6, "high": 3}
"""Passes over a bfloat16 matrix unit that a product of float32 takes at that precision."""

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota",
    "partition-id", "replica-id", "optimization-barrier", "add-dependency", "domain",
}  # fmt: skip
_COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
_SEE_THROUGH = ("bitcast", "reshape", "copy", "transpose")


class Cost(NamedTuple):
    """What a program does, a device, each time it is run."""

    flops: int
    """Two per multiply-add of a matrix product."""
    unit_flops: int
    """The same, but each product as often as a bfloat16 matrix unit has to take it: float32
    products of the highest precision count six times."""
    traffic: int
    """Bytes read from and written to the device's main memory, each instruction on its own."""
    collectives: dict[str, int]
    """Bytes that a device sends, by kind of collective."""
    times: dict[tuple[int, int], float]
    """(unit_flops, traffic) of an instruction to how often it is run: for a roofline of each."""
    open_loops: int
    """Loops of whose number of rounds nothing is known; they count as one round."""


def read_costs(text: str, open_rounds: float | None = None) -> Cost:
    """Of the text of a compiled program (`Compiled.as_text()`).

    `open_rounds`: how often the loops go round, on the average, whose number of rounds is not in
    the text.
    """
    return _Program(text, open_rounds).cost()


class _Program:
    def __init__(self, text: str, open_rounds: float | None):
        self._open_rounds = open_rounds
        self._computations, self._entry = read_computations(text)
        self._open_loops = 0
        self._flops = self._unit_flops = self._traffic = 0.0
        self._collectives: dict[str, float] = {}
        self._times: dict[tuple[int, int], float] = {}

    def cost(self) -> Cost:
        self._walk(self._entry, 1)
        return Cost(
            round(self._flops),
            round(self._unit_flops),
            round(self._traffic),
            {kind: round(sent) for kind, sent in self._collectives.items()},
            self._times,
            self._open_loops,
        )

    def _walk(self, computation: str, rounds: float) -> None:
        table = self._computations[computation]
        for instruction in table.values():
            opcode = instruction.opcode
            if opcode == "while":
                trips = self._trips(instruction, table)
                if trips is None:
                    self._open_loops += self._open_rounds is None
                    trips = 1 if self._open_rounds is None else self._open_rounds
                self._walk(called(instruction, "body"), rounds * trips)
            elif opcode == "conditional":
                self._walk(self._heaviest(branches(instruction)), rounds)
            elif opcode == "call":
                self._walk(called(instruction, "to_apply"), rounds)
            elif opcode not in _FREE:
                self._count(instruction, table, rounds)

    def _count(
        self, instruction: Instruction, table: dict[str, Instruction], rounds: float
    ) -> None:
        flops, unit_flops = self._products(instruction, table, rounds)
        traffic = self._bytes(instruction, table)
        self._flops += rounds * flops
        self._unit_flops += rounds * unit_flops
        self._traffic += rounds * traffic
        if unit_flops or traffic:
            key = (unit_flops, traffic)
            self._times[key] = self._times.get(key, 0) + rounds

    # ---- Matrix products and collectives, in fusions too ----------------------------------------

    def _products(
        self, instruction: Instruction, table: dict[str, Instruction], rounds: float
    ) -> tuple[int, int]:
        """FLOPs of an instruction, once and by passes; counts the collectives in it."""
        opcode = instruction.opcode
        kind = opcode.removesuffix("-start")
        if kind in _COLLECTIVES:
            sent = _sent(kind, instruction, table)
            self._collectives[kind] = self._collectives.get(kind, 0) + rounds * sent
        if opcode in ("dot", "convolution", "custom-call"):
            flops = _flops(instruction, table)
            return flops, flops * _passes(instruction, table)
        flops = unit_flops = 0
        if inner := called(instruction, "calls"):
            for each in self._computations[inner].values():
                more = self._products(each, self._computations[inner], rounds)
                flops, unit_flops = flops + more[0], unit_flops + more[1]
        return flops, unit_flops

    # ---- Memory traffic -------------------------------------------------------------------------

    def _bytes(self, instruction: Instruction, table: dict[str, Instruction]) -> int:
        opcode = instruction.opcode
        if opcode.endswith("-start"):
            return 0  # counted where it ends
        if opcode.endswith("-done"):
            start = table[instruction.operands[0]]
            moved = sum(array.size for array in instruction.arrays)
            source = table[start.operands[0]].arrays if start.operands else ()
            reads = moved if all(array.memory == 0 for array in source) else 0
            return reads + _in_main_memory(instruction.arrays)
        if opcode == "custom-call" and not instruction.operands:
            return 0  # a buffer that is set aside
        if opcode in ("dynamic-slice", "slice", "gather"):
            return _touched(instruction, table[instruction.operands[0]])
        if opcode == "dynamic-update-slice":
            update = table[instruction.operands[1]]
            return _touched(update, update) + _in_main_memory(update.arrays)
        if opcode == "fusion" and (inner := called(instruction, "calls")):
            return self._bytes_of_fusion(instruction, table, self._computations[inner])
        read = sum(_in_main_memory(table[name].arrays) for name in set(instruction.operands))
        return read + _in_main_memory(instruction.arrays)

    def _bytes_of_fusion(
        self,
        fusion: Instruction,
        outer: dict[str, Instruction],
        inner: dict[str, Instruction],
    ) -> int:
        """Of parameters that are only sliced, the slices; of results updated in place, the
        update."""
        total = 0
        for each in inner.values():
            if each.opcode == "parameter":
                argument = outer[fusion.operands[_number(each)]]
                if all(array.memory == 0 for array in argument.arrays):
                    total += self._read_of(each, inner)
        root = _root(inner)
        parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for array, part in zip(fusion.arrays, parts, strict=False):
            if not array.memory:
                update = self._update(part, inner)
                total += array.size if update is None else update
        return total

    def _read_of(self, parameter: Instruction, inner: dict[str, Instruction]) -> int:
        """Bytes that a fusion reads of a parameter; a TPU's compiler puts fusions into fusions."""
        size = sum(array.size for array in parameter.arrays)
        read = 0
        for user, operand in _users(parameter.name, inner):
            if user.opcode in _SLICES:
                read += sum(array.size for array in user.arrays)
            elif user.opcode == "fusion" and (nested := called(user, "calls")):
                within = self._computations[nested]
                read += sum(
                    self._read_of(each, within)
                    for each in within.values()
                    if each.opcode == "parameter" and user.operands[_number(each)] == operand
                )
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == operand):
                return size
        return min(size, read)

    def _update(self, part: Instruction, inner: dict[str, Instruction]) -> int | None:
        """Bytes of what is written into an array that is updated in place; None of another."""
        while part.opcode in _SEE_THROUGH and part.operands:
            part = inner[part.operands[0]]
        if part.opcode == "dynamic-update-slice":
            return sum(array.size for array in inner[part.operands[1]].arrays)
        if part.opcode == "fusion" and (nested := called(part, "calls")):
            within = self._computations[nested]
            return self._update(_root(within), within)
        return None

    # ---- Control flow ---------------------------------------------------------------------------

    def _trips(self, loop: Instruction, table: dict[str, Instruction]) -> int | None:
        """Rounds of a loop that counts up by one to a constant; None of another."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = self._computations[called(loop, "condition")]
        root = _root(condition)
        if root.opcode != "compare" or "direction=LT" not in root.rest:
            return None
        counter, limit = (condition[name] for name in root.operands)
        index = re.match(r"index=(\d+)", counter.rest)
        end = constant(limit)
        if counter.opcode != "get-tuple-element" or index is None or end is None:
            return None
        begin = self._beginning(table, loop.operands[0], int(index[1]))
        return max(0, end - begin)

    def _beginning(self, table: dict[str, Instruction], operand: str, index: int) -> int:
        """The value that a loop's counter begins with: 0 unless a constant says otherwise."""
        state = table[operand]
        if state.opcode != "tuple":
            return 0
        first = table[state.operands[index]]
        while first.opcode in ("copy", "bitcast") and first.operands:
            first = table[first.operands[0]]
        return constant(first) or 0

    def _heaviest(self, computations: list[str]) -> str:
        return max(computations, key=lambda name: len(self._computations[name]))


# ---- Figures of an instruction -------------------------------------------------------------------


def _in_main_memory(arrays: tuple[Array, ...]) -> int:
    return sum(array.size for array in arrays if array.memory == 0)


def _touched(part: Instruction, whole: Instruction) -> int:
    """Bytes read of a whole of which a part is taken, and written as that part."""
    reads = sum(a.size for a in part.arrays) if all(a.memory == 0 for a in whole.arrays) else 0
    return reads + (_in_main_memory(part.arrays) if part is not whole else 0)


def _number(parameter: Instruction) -> int:
    return int(parameter.rest.partition(")")[0])


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(each for each in computation.values() if each.root)


def _users(name: str, inner: dict[str, Instruction]) -> Iterator[tuple[Instruction, str]]:
    """What uses a value, and the name that it has there: bitcasts give it others."""
    for user in inner.values():
        if name in user.operands:
            if user.opcode == "bitcast":
                yield from _users(user.name, inner)
            else:
                yield user, name


def _flops(product: Instruction, table: dict[str, Instruction]) -> int:
    out = math.prod(product.arrays[0].shape)
    if product.opcode == "dot":
        left = table[product.operands[0]].arrays[0].shape
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.rest)
        axes = [int(axis) for axis in (contracted[1] if contracted else "").split(",") if axis]
        return 2 * out * math.prod(left[axis] for axis in axes)
    if product.opcode == "custom-call":  # a product that a library makes: [.., m, k] by [.., k, n]
        if not re.search(r'custom_call_target="[^"]*(matmul|gemm|dot)', product.rest):
            return 0
        left = table[product.operands[0]].arrays[0].shape
        right = table[product.operands[1]].arrays[0].shape
        batch = math.prod(product.arrays[0].shape[:-2])
        both = math.prod(left) * math.prod(right) // batch**2
        return 2 * batch * math.isqrt(both * (out // batch))
    return _flops_of_convolution(product, table)


def _flops_of_convolution(product: Instruction, table: dict[str, Instruction]) -> int:
    """A TPU's matrix products are convolutions: batch axes become spatial ones, most of whose
    window falls on padding and costs nothing."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.rest)
    assert labels is not None
    inputs, kernel, outputs = labels[1], labels[2], labels[3]
    left = table[product.operands[0]].arrays[0].shape
    right = table[product.operands[1]].arrays[0].shape
    result = product.arrays[0].shape
    flops = 2 * result[outputs.index("b")] * result[outputs.index("f")] * right[kernel.index("i")]
    window = re.search(r"window=\{([^}]*)\}", product.rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = [label for label in outputs if label.isdigit()]
    for number, label in enumerate(spatial):

        def field(name: str, default: str, number: int = number) -> str:
            return fields[name].split("x")[number] if name in fields else default

        low = int(field("pad", "0_0").split("_")[0])
        flops *= _overlaps(
            left[inputs.index(label)],
            right[kernel.index(label)],
            result[outputs.index(label)],
            low,
            int(field("stride", "1")),
            int(field("lhs_dilate", "1")),
            int(field("rhs_dilate", "1")),
        )
    return flops


def _overlaps(
    size: int, window: int, out: int, low: int, stride: int, dilate: int, window_dilate: int
) -> int:
    """Pairs of a position of the result and one of the window that meet an element, not padding."""
    span = (size - 1) * dilate + 1
    count = 0
    for position in range(out):
        first = position * stride - low
        for tap in range(window):
            at = first + tap * window_dilate
            count += 0 <= at < span and at % dilate == 0
    return count


def _passes(product: Instruction, table: dict[str, Instruction]) -> int:
    if any(table[name].arrays[0].dtype != "f32" for name in product.operands[:2]):
        return 1
    precision = re.search(r"operand_precision=\{(\w+)", product.rest)
    return _PASSES.get(precision[1], 1) if precision else 1


def _sent(kind: str, instruction: Instruction, table: dict[str, Instruction]) -> int:
    """Bytes that each device sends, by the ring algorithms."""
    n = group_size(instruction)
    given = sum(a.size for name in instruction.operands for a in table[name].arrays)
    if kind == "collective-permute":
        return given
    if kind == "all-reduce":
        return 2 * given * (n - 1) // n
    if kind == "all-gather":
        return given * (n - 1)
    return given * (n - 1) // n
