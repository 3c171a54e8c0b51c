"""What a training ran on: the code's commit, the versions of the libraries, the hardware.

Noted in the run's folder at each start that differs from the one before, so that a run which was
resumed by another version says so.
"""

import functools
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from jobs.runs.run_directory import RunDirectory

PACKAGES = ("tvq", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ray", "mlflow")
"""Those whose version can change a result or its format."""
COMMIT = "TVQ_COMMIT"
"""The variable in which a submitted job is told its commit, with `+changes` if there were any."""
_CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Provenance:
    """What a training ran on."""

    commit: str | None
    """Of the checkout that the code comes from; None for an installed wheel."""
    dirty: bool
    """Whether tracked files of it had been changed."""
    python: str
    versions: dict[str, str]
    """Of PACKAGES, those that are installed."""
    hardware: dict[str, str]
    """Of the driver's machine: processor, cores, memory, system."""

    def differences(self, other: "Provenance") -> list[str]:
        """In what another one differs, a phrase each: `jax 0.10.2, now 0.10.3`."""
        found = []
        if self.commit != other.commit:
            found.append(f"commit {_short(self.commit)}, now {_short(other.commit)}")
        if self.dirty:
            found.append("files of the checkout had been changed since that commit")
        if other.dirty:
            found.append("files of this checkout have been changed since its commit")
        pairs = {"Python": (self.python, other.python)}
        for name in sorted(self.versions.keys() | other.versions.keys()):
            pairs[name] = (self.versions.get(name, "none"), other.versions.get(name, "none"))
        for name in self.hardware.keys() & other.hardware.keys():
            pairs[name] = (self.hardware[name], other.hardware[name])
        return found + [
            f"{name} {ours}, now {theirs}"
            for name, (ours, theirs) in pairs.items()
            if ours != theirs
        ]


def provenance() -> Provenance:
    """Of this process. Imports nothing heavy, and asks `git` where there is one."""
    given, plus, _ = os.environ.get(COMMIT, "").partition("+")
    commit = given or _git("rev-parse", "HEAD")
    changed = plus or (_git("status", "--porcelain", "--untracked-files=no") if commit else None)
    return Provenance(
        commit=commit,
        dirty=bool(changed),
        python=platform.python_version(),
        versions=_versions(),
        hardware={
            "processor": _processor(),
            "cores": str(os.cpu_count()),
            "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
            "system": f"{platform.system()} {platform.machine()}",
        },
    )


def note_start(run: RunDirectory) -> None:
    """Notes what this start runs on, if it is not what the start before ran on."""
    now = provenance()
    starts = noted_starts(run)
    if not starts or starts[-1] != now:
        text = json.dumps(asdict(now), indent=1) + "\n"
        run.store.write(f"provenance/{len(starts):04d}.json", text.encode())


def noted_starts(run: RunDirectory) -> list[Provenance]:
    """What the run was trained on, in order; empty for one that noted nothing."""
    names = [entry.name for entry in run.store.list("provenance")]
    return [_from_json(json.loads(run.store.read(name))) for name in names]


def _from_json(fields: dict[str, Any]) -> Provenance:
    return Provenance(**{name: fields[name] for name in Provenance.__dataclass_fields__})


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that this file is in; None if it is not in one."""
    if not (_CHECKOUT / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(_CHECKOUT), *arguments],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _short(commit: str | None) -> str:
    return commit[:12] if commit else "unknown"
