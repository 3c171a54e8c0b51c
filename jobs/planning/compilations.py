"""Compilations for devices that are not there: asked for once, then kept.

A compilation takes minutes, so what the compiler said is kept by a hash of all that it was asked:
the recipe's fields that make the program, the devices, the versions and our own sources. The text
of the program is kept too, so that a better reading of it needs no new compilation.
"""

import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jobs.console import Console
from jobs.errors import UserError
from jobs.planning.chips import Target
from jobs.planning.compiler import Facts
from jobs.recipe import Recipe, flatten, to_yaml

_FORMAT = 2
_OPERATIONAL = ("training.accumulate", "cluster.data", "cluster.fsdp", "cluster.tensor")
"""Fields that make the program though they do not affect the mathematics, as all of the model's."""
_NOT_IN_IT = (
    *("training.seed", "training.init_from", "training.max_skipped", "training.max_fallbacks"),
    *("data.window", "data.shuffle_span"),
)
_OF_TRAINING_ALONE = (
    "model.remat",
    "training.accumulate",
    "training.spike_deviations",
    "training.update_length",
)
"""Fields that change nothing in a program that has no backward pass."""
_OF_THE_MESH = ("cluster.data", "cluster.fsdp", "cluster.tensor", "training.batch_size")
"""Fields that change nothing in a program on one device, with rows of its own."""


class Compilation(NamedTuple):
    """A program as the compiler left it."""

    facts: Facts
    path: Path
    """Where it is kept."""

    def text(self) -> str:
        """The program, after all of the compiler's passes; empty if there is none."""
        return gzip.decompress(self.path.with_suffix(".hlo.gz").read_bytes()).decode()


def compile_for(
    recipe: Recipe,
    target: Target,
    programs: Sequence[str],
    *,
    limit_seconds: float,
    console: Console,
) -> dict[str, Compilation]:
    """What the compiler says of these programs, by name; from the cache where it is known.

    Args:
        recipe: resolved.
        target: devices; of a GPU, XLA's compiler for the CPU stands in, with as many devices.
        programs: of `compiler.PROGRAMS`, or `attention FORM LENGTH`.
        limit_seconds: after which the compiler's process is ended; what it has finished is kept.

    Raises:
        UserError: libtpu is missing, the limit was reached, or the recipe cannot be on that mesh.
    """
    if target.kind == "tpu" and not has_libtpu():
        raise UserError(
            f"--on {target.text}: needs libtpu, which compiles for TPUs where there is none;"
            " install it with `pip install 'tvq[plan]'`"
        )
    on = target.text if target.kind == "tpu" else f"cpu:{target.devices}"
    paths = _paths(recipe, target, programs)
    missing = {name: str(path) for name, path in paths.items() if not path.exists()}
    if missing:
        cache_folder().mkdir(parents=True, exist_ok=True)
        console.line(f"compiling {', '.join(missing)} for {on}: minutes, at the first time")
        _run({"on": on, "recipe": to_yaml(recipe), "programs": missing}, limit_seconds)
    return {
        name: Compilation(Facts(**json.loads(path.read_bytes())), path)
        for name, path in paths.items()
    }


def are_known(recipe: Recipe, target: Target, programs: Sequence[str]) -> bool:
    """Whether `compile_for` would answer at once."""
    return all(path.exists() for path in _paths(recipe, target, programs).values())


def has_libtpu() -> bool:
    """Whether there is a compiler for TPUs."""
    return importlib.util.find_spec("libtpu") is not None


def cache_folder() -> Path:
    """TVQ_PLAN_CACHE, or ~/.cache/tvq/plans."""
    return Path(os.environ.get("TVQ_PLAN_CACHE") or "~/.cache/tvq/plans").expanduser()


def _paths(recipe: Recipe, target: Target, programs: Sequence[str]) -> dict[str, Path]:
    folder = cache_folder()
    return {name: folder / f"{_key(recipe, target, name)}.json" for name in programs}


def _key(recipe: Recipe, target: Target, program: str) -> str:
    kind = target.version if target.kind == "tpu" else "cpu"
    everything, fields = flatten(recipe), flatten(recipe, mathematical_only=True)
    fields |= {name: everything[name] for name in everything if name.startswith("model.")}
    fields |= {name: everything[name] for name in _OPERATIONAL}
    without = _NOT_IN_IT
    if program != "train":
        without += _OF_TRAINING_ALONE
    if program not in ("train", "evaluate"):
        without += _OF_THE_MESH
        size = "one device"
    else:
        size = target.topology
    asked = {
        "fields": {name: value for name, value in fields.items() if name not in without},
        "on": [kind, size],
        "program": program,
        "versions": versions(kind),
        "sources": _sources(kind),
        "format": _FORMAT,
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]


def versions(kind: str) -> dict[str, str]:
    """Of what compiles for devices of this kind: cpu, or a TPU's."""
    packages = ["jax", "jaxlib", "flax", "optax"] + ([] if kind == "cpu" else ["libtpu"])
    return {name: importlib.metadata.version(name) for name in packages}


def _sources(kind: str) -> str:
    """A hash of the files that make the programs of devices of this kind."""
    home = Path(__file__).parents[2]
    files = [*sorted(home.glob("model/*.py")), home / "jobs/training/programs.py"]
    if kind == "cpu":  # others are told nothing
        files.append(home / "jobs/compiler_options.py")
    digest = hashlib.sha256()
    for file in files:
        if file.name not in ("counts.py", "official.py"):  # which make none
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _run(request: dict[str, object], limit_seconds: float) -> None:
    # -P: a `model.py` in the working folder is not ours.
    command = [sys.executable, "-P", "-m", "jobs.planning.compiler"]
    try:
        ended = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, check=False,
            timeout=limit_seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(
            f"the compilation took longer than {limit_seconds:.0f} s and was ended; programs that"
            " were done are kept: give --timeout more seconds, or another machine"
        ) from None
    if ended.returncode == 0:
        return
    last = next((line for line in reversed(ended.stderr.splitlines()) if line.strip()), "")
    kind, _, message = last.partition(": ")
    if kind.endswith("ConfigError"):
        raise UserError(message)
    if ended.returncode < 0:
        raise UserError(
            f"the compiler's process was ended by signal {-ended.returncode}, for want of memory as"
            " a rule; on a machine with more of it, or with less beside it, the same command goes"
            " on from the programs that were done"
        )
    raise RuntimeError(f"the compiler's process failed:\n{ended.stderr}")
