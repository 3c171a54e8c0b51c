"""How busy the machine of this process is: metrics, from /proc."""

from pathlib import Path


class HostLoad:
    """Of the whole machine, containers beside this one included; Linux tells it, others nothing.

    MLflow shows metrics that begin with `system/` on a page of their own.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._before = self._ticks()

    def values(self) -> dict[str, float]:
        """Processor use since the last call, and memory use now; reads two files, 0.1 ms."""
        values = self._memory()
        now = self._ticks()
        if now and self._before and now[0] > self._before[0]:
            total, idle = (after - before for after, before in zip(now, self._before, strict=True))
            values["system/cpu_utilization_percentage"] = 100.0 * (1 - idle / total)
        self._before = now
        return values

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
            "system/system_memory_usage_megabytes": used * 1024 / 1e6,
            "system/system_memory_usage_percentage": 100.0 * used / kib["MemTotal"],
        }
