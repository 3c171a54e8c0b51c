"""The text of a compiled program, as XLA prints it: computations, instructions, arrays.

Nothing of JAX is needed: the text is read as it was printed, and so it can be kept and read again.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "s64": 64, "u64": 64, "f64": 64,
         "c64": 64, "c128": 128}  # fmt: skip


class Array(NamedTuple):
    """An array of the program."""

    dtype: str
    shape: tuple[int, ...]
    size: int
    """Bytes, with the padding of the device's tiles."""
    memory: int
    """Memory space: 0 is the device's main memory, others are on the chip itself."""


class Instruction(NamedTuple):
    """A line of the program."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    """What it gives."""
    operands: tuple[str, ...]
    rest: str
    """Its attributes."""
    root: bool


def read_computations(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """By name, each computation's instructions by name; and which one is the entry.

    Raises:
        ValueError: not such a text.
    """
    found: dict[str, dict[str, Instruction]] = {}
    entry, inside = "", None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            head = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            if head is None or line.startswith("HloModule"):
                continue
            inside = found.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            inside = None
        elif inside is not None and " = " in line:
            instruction = _instruction(line)
            inside[instruction.name] = instruction
    return found, entry


def _instruction(line: str) -> Instruction:
    name, _, right = line.strip().partition(" = ")
    root = name.startswith("ROOT ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shapes, right = right[:end], right[end:].lstrip()
    opcode, _, right = right.partition("(")
    close = _closing(f"({right}", 0) - 1
    inside, rest = right[:close], right[close + 1 :].lstrip(", ")
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    if opcode in ("parameter", "constant"):
        rest = f"{inside}) {rest}"
    return Instruction(
        name.removeprefix("ROOT ").lstrip("%"), opcode, tuple(_arrays(shapes)), operands, rest, root
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for index in range(start, len(text)):
        if text[index] == "(":
            depth += 1
        elif text[index] == ")":
            depth -= 1
            if depth == 0:
                return index
    raise ValueError(f"not the text of a compiled program: {text[:80]}")


_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


def _arrays(shapes: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(shapes):
        shape = tuple(int(size) for size in dims.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout)
        yield Array(dtype, shape, _bytes(dtype, shape, layout), int(space[1]) if space else 0)


def _bytes(dtype: str, shape: tuple[int, ...], layout: str) -> int:
    order, _, tiles = layout.partition(":")
    physical = [shape[int(axis)] for axis in reversed(order.split(","))] if order else list(shape)
    if tile := re.match(r"T\(([\d,]+)\)", tiles):
        sizes = [int(size) for size in tile[1].split(",")]
        for back, size in enumerate(reversed(sizes), start=1):
            if back <= len(physical):
                physical[-back] = -(-physical[-back] // size) * size
    bits = _BITS.get(dtype) or int(re.sub(r"\D.*", "", dtype[1:]) or 32)
    return math.prod(physical) * bits // 8


def called(instruction: Instruction, attribute: str) -> str:
    """The computation that an attribute such as `body` names; "" where it has none."""
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", instruction.rest)
    return found[1] if found else ""


def branches(instruction: Instruction) -> list[str]:
    """The computations of which a conditional runs one."""
    if listed := re.search(r"branch_computations=\{([^}]*)\}", instruction.rest):
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return [called(instruction, f"{which}_computation") for which in ("true", "false")]


def constant(instruction: Instruction) -> int | None:
    """The whole number that it is; None of what is none."""
    value = re.match(r"(-?\d+)\)", instruction.rest)
    return int(value[1]) if instruction.opcode == "constant" and value else None


def group_size(collective: Instruction) -> int:
    """Devices that take part in it together; XLA writes it in three ways."""
    rest = collective.rest
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", axes[2]))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(counted[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(listed[1].split(",")) if listed else 1
