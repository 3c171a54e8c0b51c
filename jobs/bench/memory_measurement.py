"""How much memory preparing takes, in processes of their own.

Of Python's own measures, the peak of a process that a larger one started is the larger one's: so
the kernel is asked what it knows of the process alone.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jobs.bench.data_measurement import part_of
from jobs.console import Console
from pipeline.near_duplicates import NearDuplicates, NearDuplicateSettings
from pipeline.plan import PrepareSettings
from pipeline.prepare import prepare
from pipeline.sources import SourceFile, SourceSettings
from pipeline.tasks import run_here

_SIGNATURES = 2**16
_FILE_BYTES = 64 * 2**20
"""Of JSON lines."""


class Memory(NamedTuple):
    """Peak memory of a process that prepares, for two sizes of corpus."""

    form: str
    """files: each document is one; records: of JSON lines, many in a file."""
    megabytes: tuple[float, float]
    """Of text: n and about 10 n."""
    peaks: tuple[int, int]
    """Bytes."""

    @property
    def growth_percent(self) -> float:
        return 100 * (self.peaks[1] / self.peaks[0] - 1)


def measure_memory(folder: Path, files: Sequence[SourceFile], console: Console) -> list[Memory]:
    """Prepares a tenth of the files, then all of them, each alone in a fresh process; and the same
    documents as records of few large files. The corpus of all files stays in `folder`/whole."""
    found = []
    for form, put in (("files", _links), ("records", _records)):
        sizes, peaks = [], []
        for name, share in (("tenth", 0.1), ("whole", 1.0)):
            chosen = part_of(files, share * sum(file.size for file in files))
            sizes.append(sum(file.size for file in chosen) / 1e6)
            console.line(f"preparing {sizes[-1]:,.0f} MB of {form} in a process of its own")
            corpus = folder / (name if form == "files" else f"{name} {form}")
            text = folder / f"{name} {form} text"
            put(text, chosen)
            peaks.append(int(_alone("peak_of_preparing", text, corpus)))
        found.append(Memory(form, (sizes[0], sizes[1]), (peaks[0], peaks[1])))
    return found


def measure_near_duplicates() -> float:
    """Bytes of a document that finding near-duplicates keeps in memory."""
    return float(_alone("near_duplicate_bytes"))


def _links(folder: Path, files: Sequence[SourceFile]) -> None:
    for file in files:
        link = folder / file.id
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.path)


def _records(folder: Path, files: Sequence[SourceFile]) -> None:
    folder.mkdir(parents=True)
    path, size = folder / "0.jsonl", 0
    for number, file in enumerate(files):
        if size >= _FILE_BYTES:
            path, size = folder / f"{number}.jsonl", 0
        with file.open() as text, path.open("a") as records:
            record = {"text": text.read().decode(errors="replace")}
            size += records.write(json.dumps(record) + "\n")


def peak_of_preparing(source: str, corpus: str) -> int:
    """Bytes; driver and worker are one process here."""
    wanted = PrepareSettings(SourceSettings((source,)), validation_fraction=0, test_fraction=0)
    prepare(wanted, corpus, run_here)
    return _memory("VmHWM")


def near_duplicate_bytes() -> float:
    """Memory of each of 65,536 signatures that differ."""
    import numpy as np

    settings = NearDuplicateSettings()
    drawn = np.random.default_rng(0)
    before, index = _memory("VmRSS"), NearDuplicates(settings)
    for number in range(_SIGNATURES):
        index.add(number, drawn.integers(0, 2**32, settings.permutations, np.uint32))
    return (_memory("VmRSS") - before) / _SIGNATURES


def _alone(function: str, *arguments: object) -> str:
    code = f"import sys\nfrom jobs.bench.memory_measurement import {function} as run\n"
    code += "print(run(*sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return ended.stdout.strip()


def _memory(field: str) -> int:
    """Bytes, of a field of the kernel's status of this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status)
    return int(fields[field].split()[0]) * 1024
