"""`tvq prepare` as people run it, killed and out of disk.

What is expected is made without Ray, in this process, undisturbed.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.contamination import ContaminationSettings
from pipeline.errors import CorpusError
from pipeline.near_duplicates import NearDuplicateSettings
from pipeline.plan import PrepareSettings
from pipeline.prepare import prepare
from pipeline.sentencepiece_tokenizer import SentencePieceSettings
from pipeline.sources import SourceSettings
from pipeline.tasks import run_here
from pipeline.verification import verify
from tests.pipeline.test_increments import files

ROOT = Path(__file__).parents[2]
COMMAND = "from jobs.cli.main import main; main()"

# Everything at once: all stages of `prepare` are there.
ALL = ("--near-duplicates", "0.8", "--decontaminate", "--tokenizer", "bpe", "--vocab-size", "400")
SETTINGS = {
    "near_duplicates": NearDuplicateSettings(similarity=0.8),
    "contamination": ContaminationSettings(),
    "tokenizer": "sentencepiece",
    "sentencepiece": SentencePieceSettings(model_type="bpe", vocab_size=400),
}


def plant(source: Path, n_files: int, n_words: int = 9000) -> None:
    """Some hundred files of about 60 kB; ranges have 2 MiB. Some repeat what others say."""
    drawn = random.Random(n_files)
    words = ["".join(drawn.choices("abdeiklmnorstu", k=drawn.randint(3, 9))) for _ in range(3000)]
    source.mkdir(parents=True, exist_ok=True)
    texts: list[list[str]] = []
    for number in range(n_files):
        text = drawn.choices(words, k=n_words)
        if number % 40 == 39:  # a near copy
            text = [*texts[number // 2][:-40], *text[:40]]
        if number % 40 == 29:  # quotes another
            text[:500] = texts[number // 2][:500]
        texts.append(text)
        (source / f"{number:04d}.txt").write_text(" ".join(text) + "\n")


class Running:
    """A `tvq prepare` of this test, and what it starts; all of it ends with the `with`."""

    def __init__(self, source: Path, corpus: Path, options: tuple[str, ...], folder: str) -> None:
        self._out = Path(folder) / "out"
        with self._out.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, "prepare", source, "-o", corpus, *options],
                cwd=ROOT,
                env={**os.environ, "RAY_TMPDIR": folder},
                stdout=out,
                stderr=out,
            )
        self._started: set[int] = set()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        for _ in range(60):  # workers end by themselves once their driver has gone, agents do not
            if not any(self._is_ours(pid) for pid in self._started):
                return
            time.sleep(0.05)
        for pid in filter(self._is_ours, self._started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        self.children()
        self.process.kill()
        self.process.wait()

    def children(self) -> dict[int, str]:
        """The processes below this one, with their command lines."""
        parents, names = {}, {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                status = (path / "stat").read_text().rpartition(") ")[2].split()
                parents[int(path.name)] = int(status[1])
                names[int(path.name)] = (path / "cmdline").read_bytes().decode(errors="replace")
        found, below = {}, {self.process.pid}
        while below:
            below = {pid for pid, parent in parents.items() if parent in below} - found.keys()
            found |= {pid: names[pid] for pid in below}
        self._started |= found.keys()
        return found

    def busy_workers(self) -> list[int]:
        """Ray workers in the middle of a task of this run."""
        names = self.children().items()
        # Not its agents: a node whose RuntimeEnvAgent dies goes down as a whole.
        others = ("IDLE", "Agent")
        return [
            pid
            for pid, name in names
            if name.startswith("ray::") and not any(other in name for other in others)
        ]

    def wait_for(self, reached: Callable[[], bool]) -> bool:
        """Whether it was reached while the process ran."""
        while not reached():
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        return True

    def ended(self) -> tuple[int, str]:
        """Exit code, and all that was printed."""
        self.children()
        code = self.process.wait(240)
        return code, self._out.read_text()

    def _is_ours(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/cmdline").read_bytes()
            return b"ray" in name
        return False


@pytest.fixture
def run() -> Iterator[Callable[..., Running]]:
    """Starts `tvq prepare` on loopback, Ray's files in a folder of the test's."""
    folder = tempfile.mkdtemp(prefix="tvq-ray-")  # a short path, because sockets lie in it
    yield lambda source, corpus, *options: Running(source, corpus, options, folder)
    shutil.rmtree(folder, ignore_errors=True)


def finished(corpus: Path) -> dict[str, tuple[int, int]]:
    """(inode, time of writing) of all that is finished in a corpus that is being made."""
    found = {}
    for path in corpus.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.suffix != ".tmp" and path.name != ".tvq-corpus":
                name = path.relative_to(corpus).as_posix()
                found[name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chaos") / "source"
    plant(folder, 240)
    return folder


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> dict[str, bytes]:
    """The corpus with everything."""
    corpus = tmp_path_factory.mktemp("undisturbed") / "corpus"
    prepare(PrepareSettings(SourceSettings((str(source),)), **SETTINGS), corpus, run_here)
    return files(corpus)


def count(corpus: Path, pattern: str) -> int:
    return len(list(corpus.glob(pattern)))


@pytest.mark.ray
@pytest.mark.slow  # the default suite has test_prepare.py::test_killed_in_the_middle_and_taken_up
def test_killed_while_it_writes_and_taken_up(run, source, tmp_path):
    """The quick one of the kills: SIGKILL of the process, then the same command."""
    corpus, clean = tmp_path / "corpus", tmp_path / "clean"
    prepare(PrepareSettings(SourceSettings((str(source),))), clean, run_here)
    with run(source, corpus) as running:
        assert running.wait_for(lambda: count(corpus, "shards/*/range-*.json") >= 2)
        running.kill()
    before = finished(corpus)
    with run(source, corpus) as running:
        code, printed = running.ended()
    assert code == 0, printed
    assert " shards were there" in printed
    assert files(corpus) == files(clean)
    kept = finished(corpus)
    shards = [name for name in before if name.endswith(".arrow") and name.startswith("shards/")]
    ranges = [name.rpartition("-")[2][:5] for name in before if "/range-" in name]
    shards = [name for name in shards if name.rpartition("-")[2][:5] in ranges]
    assert len(shards) >= 4
    assert all(kept[name] == before[name] for name in shards)


STAGES: dict[str, Callable[[Path], bool]] = {
    "scan": lambda corpus: count(corpus, "scan/*.arrow") >= 1,
    "tokenizer": lambda corpus: count(corpus, "scan/*.arrow") >= 7,
    "held-out": lambda corpus: count(corpus, "shards/*/tokenizer.model") == 1,
    "write": lambda corpus: count(corpus, "shards/*/held-out.npy") == 1,
}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_in_every_stage_and_taken_up(run, source, undisturbed, tmp_path, seed):
    """Of one corpus with everything, a kill in each stage; nothing finished is made again."""
    corpus, drawn = tmp_path / "corpus", random.Random(seed)
    held: dict[str, tuple[int, int]] = {}
    for reached in STAGES.values():
        with run(source, corpus, *ALL) as running:
            assert running.wait_for(lambda reached=reached: reached(corpus))
            time.sleep(drawn.uniform(0, 0.8))
            running.kill()
        now = finished(corpus)
        # A range of which the shards are there and the sidecar not yet is written again.
        unfinished = {name for name in held if "/train-" in name or "/records-" in name} | {
            name for name in held if "/validation-" in name or "/test-" in name
        }
        assert all(now[name] == held[name] for name in held.keys() - unfinished)
        held = now
    assert not (corpus / "manifest.json").exists()
    done = {n.rpartition("-")[2][:5] for n in held if "/range-" in n}
    with run(source, corpus, *ALL) as running:
        code, printed = running.ended()
    assert code == 0, printed
    assert files(corpus) == undisturbed
    kept = finished(corpus)
    of_ranges = [n for n in held if n.startswith("shards/") and n.rpartition("-")[2][:5] in done]
    shared = [n for n in held if n.endswith(("tokenizer.model", "held-out.npy"))]
    for name in [n for n in of_ranges if n.endswith(".arrow")] + shared:
        assert kept[name] == held[name], name
    assert len(shared) == 2
    assert not list(corpus.rglob("*.tmp"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_workers_killed_in_the_middle(run, source, undisturbed, tmp_path):
    """Ray runs the lost tasks again: the command itself goes on."""
    corpus, drawn, killed = tmp_path / "corpus", random.Random(3), 0
    with run(source, corpus, *ALL) as running:
        for stage in ("scan/*.arrow", "shards/*/range-*.json"):
            assert running.wait_for(lambda stage=stage: count(corpus, stage) >= 1)
            time.sleep(drawn.uniform(0, 0.1))
            assert running.wait_for(lambda: bool(running.busy_workers()))
            for pid in running.busy_workers()[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
        code, printed = running.ended()
    assert killed == 2
    assert code == 0, printed
    assert files(corpus) == undisturbed


# ---- A full disk ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """A disk of so many MB, to be called again to make it larger; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def resize(megabytes: int) -> Path:
        nonlocal mounted
        options = f"size={megabytes}m" + (",remount" if mounted else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a disk that is full needs the right to mount a tmpfs")
        mounted = True
        return folder

    yield resize
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def assert_refused_for_the_disk(code: int, printed: str) -> None:
    [line] = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert code == 2, printed
    assert "No space left on device" in line
    assert "Traceback" not in printed


@pytest.mark.ray
@pytest.mark.slow
def test_a_full_disk_is_one_line_and_room_lets_it_finish(run, small_disk, source, tmp_path):
    corpus = small_disk(9) / "corpus"
    few = tmp_path / "few"
    plant(few, 60)
    with run(few, corpus) as running:
        assert running.ended()[0] == 0
    before, whole = finished(corpus), files(corpus)
    plant(few, 240)
    clean = tmp_path / "clean"
    prepare(PrepareSettings(SourceSettings((str(few),))), clean, run_here)
    with run(few, corpus) as running:
        assert_refused_for_the_disk(*running.ended())
    assert before.items() <= finished(corpus).items()
    assert not list(corpus.rglob("*.tmp"))
    verify(corpus)
    small_disk(200)
    with run(few, corpus) as running:
        code, printed = running.ended()
    assert code == 0, printed
    assert files(corpus) == files(clean)
    assert whole != files(clean)


def test_a_full_disk_without_ray(small_disk, tmp_path):
    """The same in this process: a new corpus, whose folder stays to be gone on with."""
    plant(tmp_path / "source", 60)
    wanted = PrepareSettings(SourceSettings((str(tmp_path / "source"),)), shard_bytes=300_000)
    prepare(wanted, tmp_path / "clean", run_here)
    disk = small_disk(2)
    with pytest.raises(CorpusError, match="No space left on device"):
        prepare(wanted, disk / "corpus", run_here)
    assert not list(disk.rglob("*.tmp"))
    there = count(disk, "corpus/shards/*/range-*.json")
    assert there > 2
    small_disk(50)
    assert prepare(wanted, disk / "corpus", run_here).resumed_shards >= there
    assert files(disk / "corpus") == files(tmp_path / "clean")
