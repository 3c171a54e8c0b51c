"""What `tvq doctor` looks at on this machine: versions, devices, disk, time zone."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zoneinfo
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from jobs.doctor.checkup import Finding
from pipeline.storage import LocalStore, Location, open_store

_SHOWN = ("jax", "ray", "orbax-checkpoint", "mlflow")
_WITH_JAX = ("jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt")
"""What must have the very version of jax."""
_LEAST_FREE_BYTES = 5 * 2**30
_FULL = 0.95
"""Ray writes no more objects to a disk that is as full."""
_DEVICE_SECONDS = 120


def versions() -> Iterator[Finding]:
    """Whether what is installed is what tvq was made for."""
    yield from misfits(metadata.requires("tvq") or [], _installed)
    shown = ", ".join(f"{name} {_installed(name)}" for name in _SHOWN)
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("versions", f"tvq {_installed('tvq')}, Python {python}, {shown}")


def misfits(requirements: list[str], installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """A finding for each package that is missing or of another version than required.

    Args:
        requirements: of tvq, as its metadata states them.
        installed: the version of a package, or None.
    """
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            yield Finding(
                "versions",
                f"{requirement.name} {version or 'is missing'}, tvq needs {requirement.specifier}",
                f"{sys.executable} -m pip install '{wanted}'",
            )
    jax = installed("jax")
    for name in _WITH_JAX:
        version = installed(name)
        if version is not None and version != jax:
            yield Finding(
                "versions",
                f"{name} {version} does not go with jax {jax}",
                f"{sys.executable} -m pip install '{name}=={jax}'",
            )


def devices() -> Iterator[Finding]:
    """What JAX computes on, asked in another process: the devices are not ours to take."""
    code = (
        "import jax, json; d = jax.devices();"
        "print(json.dumps([d[0].platform, d[0].device_kind, len(d)]))"
    )
    try:
        ended = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_DEVICE_SECONDS
        )
    except subprocess.TimeoutExpired:
        yield Finding(
            "devices",
            f"JAX found none within {_DEVICE_SECONDS} s",
            "end the process that holds them (`fuser -v /dev/accel* /dev/vfio/* /dev/nvidia*`)",
        )
        return
    if ended.returncode:
        said = (ended.stderr.strip().splitlines() or ["nothing was said"])[-1]
        yield Finding("devices", f"JAX does not start: {said[:200]}", "JAX_PLATFORMS=cpu tvq ...")
        return
    platform, kind, count = json.loads(ended.stdout.splitlines()[-1])
    found = f"{count} x {kind}" if platform != "cpu" else f"CPU, {os.cpu_count()} cores"
    yield Finding("devices", found, _unused_device(platform, Path("/dev")))


def _unused_device(platform: str, folder: Path) -> str:
    """What makes JAX use a device that the machine has; empty if it does."""
    for files, extra, platforms in (
        ("nvidia[0-9]*", "gpu", ("gpu", "cuda")),
        ("accel[0-9]*", "tpu", ("tpu",)),
    ):
        if any(folder.glob(files)) and platform not in platforms:
            if forced := os.environ.get("JAX_PLATFORMS"):
                return f"unset JAX_PLATFORMS (is {forced}), or leave the {extra.upper()} unused"
            return f"{sys.executable} -m pip install 'tvq[{extra}]'"
    return ""


def disk(root: Location) -> Iterator[Finding]:
    """Room for runs, for fetched shards, and for Ray, which writes to the temporary folder."""
    places = {tempfile.gettempdir(): "TMPDIR=/a/larger/disk"}
    cache = os.environ.get("TVQ_CACHE") or Path.home() / ".cache/tvq/shards"
    places[str(cache)] = "TVQ_CACHE=/a/larger/disk"
    runs = open_store(root)
    if isinstance(runs, LocalStore):
        places[runs.location] = "`tvq checkpoints prune RUN`, or --root on a larger disk"
    for place, mend in places.items():
        there = Path(place)
        while not there.exists():
            there = there.parent
        total, used, free = shutil.disk_usage(there)
        short = free < _LEAST_FREE_BYTES or used / total > _FULL
        found = f"{place}: {free / 2**30:,.1f} of {total / 2**30:,.1f} GiB free"
        yield Finding("disk", found, mend if short else "")


def time_zone() -> Iterator[Finding]:
    """Whether schedules can be told in local times, and what local time is here."""
    try:
        zoneinfo.ZoneInfo("Europe/Berlin")
    except zoneinfo.ZoneInfoNotFoundError:
        yield Finding(
            "time zone",
            "this machine does not know the world's time zones",
            f"{sys.executable} -m pip install tzdata",
        )
        return
    if name := os.environ.get("TZ"):
        try:
            zoneinfo.ZoneInfo(name.removeprefix(":"))
        except (zoneinfo.ZoneInfoNotFoundError, ValueError):
            # The C library takes what it does not know for UTC, and says nothing.
            yield Finding("time zone", f"TZ={name} is none and is taken for UTC", "export TZ=UTC")
            return
    yield Finding("time zone", f"{time.strftime('%Z %z')}; schedules go by their own")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
