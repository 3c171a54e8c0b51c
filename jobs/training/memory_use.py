"""How much memory this process and its devices take: metrics."""

import os
from pathlib import Path


def memory_use() -> dict[str, float]:
    """By metric; of devices the most that one of this process's has, where the backend tells."""
    import jax

    values = {"memory/host_rss_bytes": float(_resident_bytes())}
    told = [statistics for d in jax.local_devices() if (statistics := d.memory_stats())]
    for name, key in (("bytes", "bytes_in_use"), ("peak_bytes", "peak_bytes_in_use")):
        if found := [statistics[key] for statistics in told if key in statistics]:
            values[f"memory/device_{name}"] = float(max(found))
    return values


def _resident_bytes() -> int:
    """0 where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
