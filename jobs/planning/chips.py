"""What a plan is made for: which chips, how many, and what their makers say of them.

Needs neither Ray nor JAX.
"""

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from jobs.cluster.accelerators import devices_per_worker
from jobs.cluster.tpu_slices import tpu_slice
from jobs.errors import UserError
from model.config import ConfigError

if TYPE_CHECKING:
    from jobs.recipe import ClusterConfig

GIB = 2**30


class Chip(NamedTuple):
    """A device, by its maker's figures."""

    name: str
    memory: int
    """Bytes of main memory that a program can have."""
    flops: float
    """Operations a second of matrix products in bfloat16, dense."""
    bandwidth: float
    """Bytes a second from and to main memory."""
    network: float
    """Bytes a second that it sends to the devices around it, over all links."""
    source: str
    """Where the figures stand."""


CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        # Memory: what libtpu 0.0.42 hands out, as it says it of a program that is too large
        # ("exceeds available HBM (30.75G)"). Network: half of the two-way figure that Google gives.
        "v4": Chip(
            "TPU v4", int(30.75 * GIB), 275e12, 1228e9, 300e9, "Cloud TPU documentation, v4"
        ),
        "v5e": Chip(
            "TPU v5e", int(15.75 * GIB), 197e12, 819e9, 200e9, "Cloud TPU documentation, v5e"
        ),
        "v5p": Chip(
            "TPU v5p", int(95.74 * GIB), 459e12, 2765e9, 600e9, "Cloud TPU documentation, v5p"
        ),
        "v6e": Chip(
            "TPU v6e", int(31.25 * GIB), 918e12, 1638e9, 400e9, "Cloud TPU documentation, v6e"
        ),
        # The SXM card: 79.6 GiB as its driver shows it, NVLink 450 GB/s each way.
        "h100": Chip("H100 80GB SXM", int(79.6 * GIB), 989e12, 3350e9, 450e9, "NVIDIA data sheet"),
    }
)
"""By the name that `--on` takes; a CPU core is not a chip whose maker gives such figures."""

_CORE_FLOPS, _CORE_BANDWIDTH = 90e9, 10e9
"""Of a CPU core: measured on two of this project's development machine, matrix products of float32
at 180 GFLOP/s. A guess elsewhere."""


class Target(NamedTuple):
    """Devices to plan for."""

    text: str
    """As the user wrote it: v5e:4x4."""
    kind: str
    """tpu, gpu or cpu."""
    version: str
    """v5e, h100, cpu."""
    topology: str
    """Of a TPU slice, 4x4; else the number of devices."""
    devices: int
    chip: Chip


def read_target(text: str) -> Target:
    """Of an `--on`: v5e:4x4, h100:8 or cpu:2.

    Raises UserError for what is none, naming what there is.
    """
    version, _, size = text.strip().partition(":")
    if version in CHIPS and version.startswith("v"):
        try:
            devices = _chips(version, size)
        except ConfigError as error:
            reason = str(error).removeprefix("cluster.topology: ")
            raise UserError(f"--on {text}: {reason}") from None
        return Target(text.strip(), "tpu", version, size, devices, CHIPS[version])
    if version not in (*CHIPS, "cpu") or not size.isascii() or not size.isdigit() or int(size) < 1:
        raise UserError(
            f"--on {text}: expected a TPU slice ({', '.join(c for c in CHIPS if c[0] == 'v')}, such"
            " as v5e:4x4), h100:NUMBER or cpu:NUMBER"
        )
    count = int(size)
    if version == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        chip = Chip("CPU core", total // count, _CORE_FLOPS, _CORE_BANDWIDTH, _CORE_BANDWIDTH,
                    "a core of the development machine")  # fmt: skip
        return Target(text.strip(), "cpu", "cpu", size, count, chip)
    return Target(text.strip(), "gpu", version, size, count, CHIPS[version])


def _chips(version: str, topology: str) -> int:
    chips = tpu_slice(version, topology)
    return chips.hosts * chips.chips_per_host


def cluster_overrides(target: Target) -> tuple[str, ...]:
    """What a recipe's cluster section says of these devices, as a user writes it."""
    if target.kind == "tpu":
        hosts = tpu_slice(target.version, target.topology).hosts
        return (
            "cluster.accelerator=tpu",
            f"cluster.accelerator_version={target.version}",
            f"cluster.topology={target.topology}",
            "cluster.devices_per_worker=null",
            f"cluster.workers={hosts}",
        )
    return (
        f"cluster.accelerator={target.kind}",
        "cluster.accelerator_version=null",
        "cluster.topology=null",
        f"cluster.devices_per_worker={1 if target.kind == 'cpu' else target.devices}",
        f"cluster.workers={target.devices if target.kind == 'cpu' else 1}",
    )


def devices_of(cluster: "ClusterConfig") -> str:
    """The devices that a recipe's own cluster section describes, as `--on` takes them.

    Of a group that may shrink, those of the fewest workers, each of which holds the most. Raises
    UserError where it does not say: which GPU it is, or a group of several slices.
    """
    count = max(cluster.least_workers, 1) * devices_per_worker(cluster)
    if cluster.accelerator == "cpu":
        return f"cpu:{count}"
    if cluster.accelerator == "tpu":
        text = f"{cluster.accelerator_version}:{cluster.topology}"
        if read_target(text).devices == count:
            return text
    raise UserError(
        f"--on: the recipe's cluster ({cluster.workers} workers, {cluster.accelerator}) is not one"
        " slice or CPUs; name the devices to plan for, such as v5e:4x4 or h100:8"
    )
