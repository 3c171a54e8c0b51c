"""How busy the machines of a training are: metrics, from /proc."""

import hashlib
import math
import socket
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

_NAMES = (
    "cpu_utilization_percentage",
    "system_memory_usage_megabytes",
    "system_memory_usage_percentage",
)


class HostLoad:
    """Of each whole machine, containers beside ours included; Linux tells it, others nothing.

    `system/NAME` is that of rank 0's machine, `system/host-1/NAME` of the next one in the order of
    ranks, and so on: MLflow shows what begins with `system/` on a page of its own, in those groups.
    The lowest rank of a machine speaks for it.

    Every process makes one and asks it at the same updates. Their figures travel in one small
    gather, so that rank 0, which alone records metrics, has all of them at once. It takes 4 ms
    between two processes of a busy machine, at a checkpoint, where the last step was waited for.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._before = self._ticks()
        machines = _gathered(self._machine()).tolist()
        self._speakers = [
            rank for rank, each in enumerate(machines) if machines.index(each) == rank
        ]

    def values(self) -> dict[str, float]:
        """Processor use since the last call, and memory use now; reads two files, 0.1 ms."""
        own = self._memory() | self._processors()
        told = _gathered(np.array([own.get(name, math.nan) for name in _NAMES]))
        values = {}
        for number, rank in enumerate(self._speakers):
            group = f"host-{number}/" if number else ""
            for name, value in zip(_NAMES, told[rank].tolist(), strict=True):
                if not math.isnan(value):
                    values[f"system/{group}{name}"] = value
        return values

    def _machine(self) -> np.ndarray:
        """What tells this machine from others, whichever containers its processes are in."""
        try:
            name = (self._proc / "sys/kernel/random/boot_id").read_text()
        except OSError:
            name = socket.gethostname()
        return np.frombuffer(hashlib.md5(name.encode(), usedforsecurity=False).digest(), np.uint32)

    def _processors(self) -> dict[str, float]:
        before, now = self._before, self._ticks()
        self._before = now
        if not now or not before or now[0] <= before[0]:
            return {}
        total, idle = (after - earlier for after, earlier in zip(now, before, strict=True))
        return {"cpu_utilization_percentage": 100.0 * (1 - idle / total)}

    def _ticks(self) -> tuple[int, int] | None:
        """All, and those in which a processor had nothing to do or waited for a disk."""
        try:
            name, *fields = (self._proc / "stat").read_text().partition("\n")[0].split()
        except (OSError, ValueError):
            return None
        if name != "cpu":
            return None
        ticks = [int(field) for field in fields[:8]]  # guests, after those, are counted in user
        return sum(ticks), ticks[3] + ticks[4]

    def _memory(self) -> dict[str, float]:
        try:
            lines = (self._proc / "meminfo").read_text().splitlines()
        except OSError:
            return {}
        kib = {name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines)}
        if not kib.get("MemTotal") or "MemAvailable" not in kib:
            return {}
        used = kib["MemTotal"] - kib["MemAvailable"]
        return {
            "system_memory_usage_megabytes": used * 1024 / 1e6,
            "system_memory_usage_percentage": 100.0 * used / kib["MemTotal"],
        }


def _gathered(numbers: np.ndarray) -> np.ndarray:
    """Those of each process, by rank; of several, 32 bits of them."""
    with jax.transfer_guard("allow"):  # under the loop's guard
        return multihost_utils.process_allgather(numbers)
