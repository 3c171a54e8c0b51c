"""How fast corpora are made and read here, beside a bare process that does the least of it.

A shared machine's speed drifts by more than what is measured: what is compared takes turns, and
ratios are taken within a round. Times are kept twice: CPU time, of all threads and of the kernel's
work for them, and wall-clock time, which has the disk and the neighbours in it.
"""

import contextlib
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs.bench.measurement import Spread
from jobs.console import Console
from pipeline.contents import BLOCK_BYTES
from pipeline.loader import training_batches
from pipeline.parts import WordCounter
from pipeline.plan import PrepareSettings
from pipeline.ranges import Range, cut_ranges, shard_bytes_for
from pipeline.scanning import ScanSettings, read_scan, scan_name, scan_range
from pipeline.selection import TRAIN, first_rows
from pipeline.sentencepiece_tokenizer import SentencePieceSettings, train_sentencepiece
from pipeline.sources import Listing, SourceFile, SourceSettings, list_files, standard_library
from pipeline.storage import open_store
from pipeline.summed_file import SummedFile
from pipeline.tokenizers import ByteTokenizer
from pipeline.writing import RangeTask, TokenizerFile, write_range

_SENTENCEPIECE_BYTES = 32 * 2**20
"""Text that is encoded in a round: at 5 to 12 MB/s, a gigabyte would take minutes."""
_SAMPLE_BYTES = 2 * 2**20
_PROFILED_BYTES = 64 * 2**20
"""Text of which the parts of pass 2 are timed, all in memory."""


class Taken(NamedTuple):
    """What something took, or how much of it went into a second."""

    cpu: float
    wall: float

    @classmethod
    def of(cls, function: Callable[[], Any]) -> "Taken":
        """Seconds of this process."""
        cpu, wall = time.process_time(), time.perf_counter()
        function()
        return cls(time.process_time() - cpu, time.perf_counter() - wall)

    def rate(self, amount: float) -> "Taken":
        """`amount` over these seconds."""
        return Taken(amount / self.cpu, amount / self.wall)


class Compared(NamedTuple):
    """Rates of one thing and of what it is held to, a pair a round."""

    rates: list[Taken]
    baseline: list[Taken]

    def spreads(self, clock: str) -> tuple[Spread, Spread, Spread]:
        """(rate, baseline, ratio within a round) by one clock, cpu or wall."""
        pairs = [
            (getattr(rate, clock), getattr(base, clock))
            for rate, base in zip(self.rates, self.baseline, strict=True)
        ]
        return (
            Spread.of([rate for rate, _ in pairs]),
            Spread.of([base for _, base in pairs]),
            Spread.of([rate / base for rate, base in pairs]),
        )


# ---- Text ----------------------------------------------------------------------------------------


def write_text(folder: Path, megabytes: float) -> SourceSettings:
    """The standard library's sources over and over, each copy with a first line of its own."""
    texts = []
    for file in list_files(standard_library()):
        with file.open() as opened:
            texts.append((file.id, opened.read()))
    size = 0
    for number in itertools.count():
        for name, text in texts:
            if size >= megabytes * 1e6:
                return SourceSettings((str(folder),))
            path = folder / f"{number:04d}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            size += path.write_bytes(b"# copy %d\n" % number + text)
    raise AssertionError


def part_of(files: Sequence[SourceFile], n_bytes: float) -> list[SourceFile]:
    """The first files that have so many bytes, or all."""
    ends = itertools.accumulate(file.size for file in files)
    return [file for file, end in zip(files, ends, strict=True) if end - file.size < n_bytes]


def read_and_hash(files: Sequence[SourceFile]) -> None:
    """The least that any preparing does."""
    for file in files:
        digest = hashlib.sha256()
        with open(file.path, "rb") as opened:  # noqa: PTH123 (nothing but the work itself)
            while block := opened.read(BLOCK_BYTES):
                digest.update(block)


# ---- Bytes ---------------------------------------------------------------------------------------


class Worker:
    """The two passes over some files, as a Ray task runs them; every document is kept."""

    def __init__(self, corpus: Path, files: Sequence[SourceFile], shard_bytes: int) -> None:
        settings = PrepareSettings(SourceSettings((".",)))
        self.corpus = str(corpus)
        self.settings: ScanSettings = settings.scan()
        self.ranges = cut_ranges(Listing.of(files), settings.format, shard_bytes)
        self.tokenizer = TokenizerFile(ByteTokenizer.kind, None)

    def scan(self, ranges: Sequence[Range] | None = None) -> None:
        for range_ in self.ranges if ranges is None else ranges:
            scan_range(self.corpus, scan_name(range_, self.settings), range_, self.settings)

    def write_payloads(self) -> list[tuple[Any, ...]]:
        """Of `write_range`, once all is scanned."""
        payloads = []
        for number, range_ in enumerate(self.ranges):
            name = scan_name(range_, self.settings)
            table = read_scan(self.corpus, name)
            assert table is not None
            [firsts] = first_rows(
                lambda _, table=table: table, [[p.file.id for p in range_.pieces]]
            )
            task = RangeTask(
                self.corpus,
                number,
                range_,
                self.settings,
                name,
                firsts,
                bytes([TRAIN]) * len(table),
            )
            payloads.append((task, "shards/bench", self.tokenizer, None, None))
        return payloads


def timed(*payloads: tuple[Any, ...]) -> Taken:
    """What it took to write these ranges, where it ran."""
    return Taken.of(lambda: [write_range(*payload) for payload in payloads])


class Bytes(NamedTuple):
    """Byte tokenisation, each pass against reading and hashing the same files, in MB/s."""

    scan: Compared
    write: Compared
    both: Compared
    parts: dict[str, float]
    """CPU nanoseconds a byte of what pass 2 is made of, each alone; the last is the rest."""
    start_seconds: float
    """The first range of a fresh process: what it imports."""
    documents: int
    n_bytes: int
    shards: int


def measure_bytes(
    folder: Path, files: Sequence[SourceFile], rounds: int, console: Console
) -> Bytes:
    """Lets the passes take turns with reading and hashing, after a first range to warm up."""
    n_bytes = sum(file.size for file in files)
    worker = Worker(folder, files, shard_bytes_for(n_bytes))

    def first() -> None:
        worker.scan(worker.ranges[:1])

    start = Taken.of(first)
    scans, writes, baselines = [], [], []
    with console.progress("bytes: round", rounds) as progress:
        for round_ in range(rounds):
            progress.update(round_)
            baselines.append(Taken.of(lambda: read_and_hash(files)))
            scans.append(Taken.of(worker.scan))
            writes.append(timed(*worker.write_payloads()))
        progress.update(rounds)
    both = [Taken(a.cpu + b.cpu, a.wall + b.wall) for a, b in zip(scans, writes, strict=True)]

    def against_base(taken: Sequence[Taken]) -> Compared:
        rates, base = ([each.rate(n_bytes / 1e6) for each in one] for one in (taken, baselines))
        return Compared(rates, base)

    return Bytes(
        scan=against_base(scans),
        write=against_base(writes),
        both=against_base(both),
        parts=_parts_of_writing(folder, files, min(each.cpu for each in writes) / n_bytes),
        start_seconds=start.wall,
        documents=len(files),
        n_bytes=n_bytes,
        shards=len(worker.ranges),
    )


def _parts_of_writing(
    folder: Path, files: Sequence[SourceFile], seconds: float
) -> dict[str, float]:
    """`seconds` is what pass 2 takes a byte."""
    files = part_of(files, _PROFILED_BYTES)
    texts = []
    for file in files:
        with file.open() as opened:
            texts.append(opened.read())

    def count_words() -> None:
        words = WordCounter()
        for text in texts:
            words.count(text)

    def write() -> None:
        written = SummedFile(folder / "profiled")
        for text in texts:
            written.write(text)
        written.finish()
        (folder / "profiled").unlink()

    n_bytes = sum(map(len, texts))
    parts = {
        "reading and hashing documents": lambda: read_and_hash(files),
        "counting words": count_words,
        "hashing and writing shards": write,
    }
    found = {
        name: min(Taken.of(part).cpu for _ in range(3)) / n_bytes * 1e9
        for name, part in parts.items()
    }
    return found | {"Python for each document": seconds * 1e9 - sum(found.values())}


# ---- SentencePiece, through Ray Data -------------------------------------------------------------


class Pieces(NamedTuple):
    """SentencePiece in a worker of Ray Data against a bare process, in MB/s."""

    compared: Compared
    together: Spread
    """MB/s of all workers by the wall clock, Ray's own work and the end of the last task in it."""
    workers: int
    train_seconds: float
    start_seconds: float
    """Ray, its workers, and in each the tokenizer."""
    n_bytes: int


def measure_pieces(
    folder: Path, files: Sequence[SourceFile], rounds: int, console: Console
) -> Pieces:
    """A unigram model of 8,192 pieces writes shards in Ray tasks, and alone encodes each file."""
    from sentencepiece import SentencePieceProcessor

    from jobs.cluster.ray_session import ray_session
    from pipeline.ray_tasks import run_tasks

    files = part_of(files, _SENTENCEPIECE_BYTES)
    n_bytes = sum(file.size for file in files)
    texts = (file.open().read() for file in part_of(files, _SAMPLE_BYTES))
    console.line("training a tokenizer on a sample")
    began = time.perf_counter()
    settings = SentencePieceSettings(vocab_size=8192, sample_bytes=_SAMPLE_BYTES)
    model = train_sentencepiece(texts, settings)
    train_seconds = time.perf_counter() - began
    open_store(folder).write("tokenizer.model", model)
    worker = Worker(folder, files, 2**23)
    worker.settings = PrepareSettings(
        SourceSettings((".",)), tokenizer="sentencepiece", tokenizer_model=model
    ).scan()
    worker.tokenizer = TokenizerFile("sentencepiece", "tokenizer.model")
    worker.scan()
    payloads = worker.write_payloads()
    processor = SentencePieceProcessor(model_proto=model)

    def bare() -> None:
        for file in files:
            with file.open() as opened:
                processor.encode(opened.read(), out_type="numpy")

    compared, together = Compared([], []), []
    workers = os.cpu_count() or 1
    began = time.perf_counter()
    with contextlib.ExitStack() as session:
        session.enter_context(ray_session(None, cpus=1))
        list(run_tasks(timed, [(payload,) for payload in payloads[: 2 * workers]]))
        start_seconds = time.perf_counter() - began
        with console.progress("SentencePiece: round", rounds) as progress:
            for round_ in range(rounds):
                progress.update(round_)
                compared.baseline.append(Taken.of(bare).rate(n_bytes / 1e6))
                # One worker, as the bare process is alone: cores share more than one sees.
                [(_, taken)] = run_tasks(timed, [tuple(payloads)])
                compared.rates.append(taken.rate(n_bytes / 1e6))
                began = time.perf_counter()
                list(run_tasks(write_range, payloads))
                together.append(n_bytes / 1e6 / (time.perf_counter() - began))
            progress.update(rounds)
    return Pieces(compared, Spread.of(together), workers, train_seconds, start_seconds, n_bytes)


# ---- The loader ----------------------------------------------------------------------------------


def measure_loader(
    corpus: Path, sequence_length: int, batch_size: int, rounds: int, batches: int = 400
) -> list[Taken]:
    """Mtok/s of finished batches, a round each; its CPU time is that of the reading thread too."""
    with training_batches(
        corpus, sequence_length=sequence_length, batch_size=batch_size, seed=0
    ) as stream:

        def read() -> None:
            for _ in itertools.islice(stream, batches):
                pass

        read()
        tokens = batches * batch_size * sequence_length / 1e6
        return [Taken.of(read).rate(tokens) for _ in range(rounds)]
