"""TPU slices: which there are, and of how many hosts and chips.

Needs neither Ray nor JAX: a recipe is checked with it before anything starts.
"""

import math
from typing import NamedTuple

from model.config import ConfigError

_FLAT = ("1x1", "2x2", "2x4", "2x8", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


class _Generation(NamedTuple):
    ray_name: str
    largest: tuple[int, int, int] | None  # of the topologies in three dimensions; None: two


_GENERATIONS = {
    # Those of which JAX shows a chip as one device (v2, v3 and v7x: two).
    "v4": _Generation("TPU-V4", (12, 12, 16)),
    "v5e": _Generation("TPU-V5LITEPOD", None),
    "v5p": _Generation("TPU-V5P", (16, 16, 24)),
    "v6e": _Generation("TPU-V6E", None),
}


class Slice(NamedTuple):
    """A TPU slice: hosts whose chips are wired to each other. Ray hands it out whole."""

    hosts: int
    chips_per_host: int


def tpu_slice(version: str, topology: str) -> Slice:
    """The slice of that topology.

    Raises:
        ConfigError: there is none, naming those that there are.
    """
    sizes = [int(size) if size.isascii() and size.isdigit() else 0 for size in topology.split("x")]
    largest = _GENERATIONS[version].largest
    if largest is None:
        known, allowed = topology in _FLAT, ", ".join(_FLAT)
    else:
        blocks = len(sizes) == 3 and all(
            size and size % 4 == 0 and size <= most
            for size, most in zip(sizes, largest, strict=True)
        )
        # 04x4x4 is none, though int() reads it.
        known = topology in _SMALL_CUBES or (blocks and topology == "x".join(map(str, sizes)))
        most = "x".join(map(str, largest))
        allowed = f"{', '.join(_SMALL_CUBES)}, or multiples of 4 up to {most}"
    if not known:
        raise ConfigError(f"cluster.topology: no {version} slice is {topology}; use {allowed}")
    chips = math.prod(sizes)
    # A host has four chips; a v5e or v6e slice of up to eight is one host.
    return Slice(1, chips) if largest is None and chips <= 8 else Slice(chips // 4, 4)


def ray_name(version: str) -> str:
    """What Ray calls that generation."""
    return _GENERATIONS[version].ray_name
