"""Pass 2 of a range: dying anywhere in it leaves nothing half done."""

import subprocess
import sys
from pathlib import Path

from pipeline import writing

PASSES = """
import sys
from pathlib import Path
from pipeline.plan import PrepareSettings
from pipeline.prepare import prepare
from pipeline.sources import SourceSettings
from pipeline.tasks import run_here
prepare(PrepareSettings(SourceSettings((sys.argv[1],))), Path(sys.argv[2]), run_here)
print("pandas" in sys.modules)
"""


def test_a_worker_does_not_load_pandas(tmp_path):
    """It would take each 0.3 s and 16 MiB, for arrays that have no need of it."""
    source = tmp_path / "source"
    source.mkdir()
    for name in "abcd":
        (source / name).write_text(f"text of {name}\n")
    run = subprocess.run(
        [sys.executable, "-c", PASSES, source, tmp_path / "corpus"],
        cwd=Path(writing.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "False\n", "")


# Writes one range, dying (as kill -9 does: no clean-up) at the n-th time a file is opened, renamed
# or removed, for n = 1, 2, ... until it survives; after each death it looks at what is there.
DIE_AT_EVERY_STEP = """
import os, sys
from pathlib import Path
from pipeline.plan import PrepareSettings
from pipeline.ranges import cut_ranges
from pipeline.scanning import scan_range
from pipeline.sources import SourceSettings, list_files
from pipeline.writing import RangeTask, TokenizerFile, read_sidecar, write_range

source, root = Path(sys.argv[1]), Path(sys.argv[2])
settings = PrepareSettings(SourceSettings((str(source),)))
(whole,) = cut_ranges(list_files(settings.source), settings.format, 10**6)
counted = False

def run(output, die_at):
    steps = 0
    def hook(event, args):
        nonlocal steps
        if counted and event in ("open", "os.rename", "os.remove") and str(output) in str(args[0]):
            steps += 1
            if steps == die_at:
                os._exit(9)
    scan_range(str(output), "scan.arrow", whole, settings.scan())
    task = RangeTask(str(output), 0, whole, settings.scan(), "scan.arrow", [0] * 4, b"tvte")
    sys.addaudithook(hook)
    globals()["counted"] = True
    return write_range(task, "plan", TokenizerFile("bytes", None), None, None)

def files(output):
    return {p.name: p.read_bytes() for p in (output / "plan").iterdir() if p.suffix != ".tmp"}

def in_child(output, die_at):
    child = os.fork()
    if child == 0:
        run(output, die_at)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

assert in_child(root / "clean", 0) == 0
clean = files(root / "clean")
assert sorted(clean) == [
    "range-00000.json", "records-00000.arrow",
    "test-00000.arrow", "train-00000.arrow", "validation-00000.arrow",
]
deaths = 0
while in_child(root / f"{deaths}", deaths + 1) == 9:
    output = root / f"{deaths}"
    there = files(output) if (output / "plan").exists() else {}
    assert there.items() <= clean.items(), (deaths, sorted(there))
    assert read_sidecar(str(output), "plan", 0) is None or there == clean
    assert in_child(output, 0) == 0
    assert files(output) == clean
    deaths += 1
print(deaths)
"""


def test_killed_at_every_step_of_a_range(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in "abcd":
        (source / name).write_text(f"text of {name}\n" * 50)
    run = subprocess.run(
        [sys.executable, "-c", DIE_AT_EVERY_STEP, source, tmp_path / "out"],
        cwd=Path(writing.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    # Three shards, records, a sidecar: each a file opened, a rename, a folder opened.
    assert int(run.stdout) >= 15
