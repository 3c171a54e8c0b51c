"""Prepare a corpus with Ray Data, in two passes; the only file of this package that imports Ray.

Pass 1 (`scan`) reads every document once: its size, its content hash, a reason to drop it. The
driver then decides duplicates and splits, and cuts the documents into *ranges* of about
`shard_bytes` in the order of ids. Pass 2 (`write`) is a shard plan: one task a range, which reads
its documents again, refuses them if they changed, and writes at most one shard a split.

Why a plan, not Ray Data's own writers: no task sees another's data, so the bytes do not depend on
blocks, CPUs or order, and a range that is finished stays finished when everything is killed.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import platform
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data

from pipeline import filters, sources
from pipeline.corpus_folder import (
    SHARDS,
    check_output,
    claim,
    is_whole,
    old_manifest,
    tidy,
    writing,
)
from pipeline.errors import CorpusError
from pipeline.filters import Scanned
from pipeline.manifest import (
    FORMAT_VERSION,
    SPLITS,
    DocumentDigest,
    Manifest,
    Source,
    Split,
    TokenizerInfo,
    split_fingerprint,
)
from pipeline.ranges import (
    Finished,
    Task,
    cut_ranges,
    finished_from_json,
    read_sidecar,
    write_range,
)
from pipeline.sources import Document, SourceSettings
from pipeline.splits import assign_splits
from pipeline.tokenizers import TOKEN_OFFSET, Tokenizer, make_tokenizer

# Part of the plan id: raise it when this file would write other bytes for the same inputs.
_RECIPE_VERSION = 1


@dataclass(frozen=True)
class PrepareSettings:
    """What corpus to make of which source."""

    source: SourceSettings
    """What is read."""

    tokenizer: str = "bytes"
    """How text becomes tokens."""

    validation_fraction: float = 0.05
    """Share of the documents held out for validation, by a hash of their ids; 0 for none."""

    test_fraction: float = 0.05
    """Share of the documents held out for the final test; 0 for none."""

    shard_bytes: int = 16 * 1024 * 1024
    """Source bytes that one task reads, and so the most that a shard describes, unless one
    document is longer."""


class Progress(NamedTuple):
    """How far `prepare` is; reported after each finished range."""

    stage: str
    """`scan` or `write`."""
    done: int
    """Ranges finished."""
    total: int
    documents: int
    """Documents of the ranges finished."""
    n_bytes: int
    """Their source bytes."""


class Prepared(NamedTuple):
    """What `prepare` did."""

    manifest: Manifest
    reused: bool
    """The corpus was already there, whole, from the same inputs and settings."""
    resumed_shards: int
    """Shards that an interrupted run had finished."""


def prepare(
    settings: PrepareSettings,
    output: Path,
    progress: Callable[[Progress], None] | None = None,
) -> Prepared:
    """Make the corpus in the folder `output`, or find it there; Ray must be initialised.

    The same inputs and settings give the same bytes on any number of CPUs and after any
    interruption; an interrupted run is taken up where it stopped. An older corpus in `output`
    stays readable until the new one is complete.

    Raises `CorpusError`, and then leaves an older corpus as it is, for settings or sources that
    cannot be used, for a file that changes meanwhile, and for a folder that is not a corpus.
    """
    _check_settings(settings)
    tokenizer = make_tokenizer(settings.tokenizer)
    documents = sources.list_documents(settings.source)
    check_output(output)
    report = progress or (lambda _: None)
    with _quiet_ray_data():
        scanned = _scan(documents, settings.shard_bytes, report)
        plan = _plan(settings, tokenizer, documents, scanned)
        with claim(output):
            old = old_manifest(output)
            if old is not None and old.plan_id == plan.plan_id and is_whole(output, old):
                tidy(output, old)
                return Prepared(old, reused=True, resumed_shards=0)
            finished, resumed = _write(output, plan, report)
            manifest = _manifest(settings, tokenizer, plan, finished)
            with writing(output):
                manifest.save(output)
            tidy(output, manifest)
            return Prepared(manifest, reused=False, resumed_shards=resumed)


def _check_settings(settings: PrepareSettings) -> None:
    validation, test = settings.validation_fraction, settings.test_fraction
    for option, fraction in (("--validation", validation), ("--test", test)):
        if not 0 <= fraction < 1:
            raise CorpusError(f"{option}: must be at least 0 and below 1, got {fraction}")
    if validation + test >= 1:
        raise CorpusError(
            f"--validation and --test: must leave something to train on, got {validation} + {test}"
        )
    if settings.shard_bytes < 1:
        raise CorpusError(f"shard_bytes: must be at least 1, got {settings.shard_bytes}")


# ---------------------------------------------------------------- the plan


class _Plan(NamedTuple):
    plan_id: str
    ranges: list[list[Task]]
    """What is kept of each range; the ranges themselves do not depend on it."""
    range_sizes: list[tuple[int, int]]
    """(documents, bytes) of each range, dropped documents counted."""
    scanned: list[Scanned]
    ids: list[str]
    tokenizer: str

    @property
    def folder(self) -> str:
        return f"{SHARDS}/{self.plan_id[:16]}"


def _plan(
    settings: PrepareSettings,
    tokenizer: Tokenizer,
    documents: list[Document],
    scanned: list[Scanned],
) -> _Plan:
    scanned = filters.drop_duplicates(scanned)
    kept = [d.id for d, s in zip(documents, scanned, strict=True) if s.reason is None]
    splits = assign_splits(kept, settings.validation_fraction, settings.test_fraction)
    ranges, range_sizes = [], []
    for group in cut_ranges([s.size for s in scanned], settings.shard_bytes):
        ranges.append(
            [
                Task(documents[i].id, documents[i].path, scanned[i].sha256, splits[documents[i].id])
                for i in group
                if scanned[i].reason is None
            ]
        )
        range_sizes.append((len(group), sum(scanned[i].size for i in group)))
    identity = {
        "inputs": [[d.id, s.size, s.sha256] for d, s in zip(documents, scanned, strict=True)],
        "settings": _mathematical(settings),
        "tokenizer": tokenizer.fingerprint,
        "versions": {"format": FORMAT_VERSION, "recipe": _RECIPE_VERSION, "arrow": pa.__version__},
        "part_bytes": sources.PART_BYTES,
    }
    plan_id = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    ids = [d.id for d in documents]
    return _Plan(plan_id, ranges, range_sizes, scanned, ids, settings.tokenizer)


def _mathematical(settings: PrepareSettings) -> dict[str, Any]:
    """The settings that change the corpus beyond which documents are found."""
    value = dataclasses.asdict(settings)
    del value["source"]
    return value


# ---------------------------------------------------------------- pass 1


def _scan(
    documents: list[Document], shard_bytes: int, report: Callable[[Progress], None]
) -> list[Scanned]:
    groups = cut_ranges([d.size for d in documents], shard_bytes)
    payloads = [{"paths": [documents[i].path for i in group]} for group in groups]
    scanned: dict[int, list[Scanned]] = {}
    n_documents = n_bytes = 0
    report(Progress("scan", 0, len(groups), 0, 0))
    for index, result in _run(_scan_range, payloads):
        scanned[index] = [Scanned(*item) for item in result["scanned"]]
        n_documents += len(scanned[index])
        n_bytes += sum(s.size for s in scanned[index])
        report(Progress("scan", len(scanned), len(groups), n_documents, n_bytes))
    return [item for index in range(len(groups)) for item in scanned[index]]


def _scan_range(payload: dict[str, Any]) -> dict[str, Any]:
    return {"scanned": [filters.scan(sources.read_blocks(path)) for path in payload["paths"]]}


# ---------------------------------------------------------------- pass 2


def _write(
    output: Path, plan: _Plan, report: Callable[[Progress], None]
) -> tuple[list[Finished], int]:
    """Write the ranges that are not finished; also says how many shards were."""
    with writing(output):
        (output / plan.folder).mkdir(parents=True, exist_ok=True)
    finished: dict[int, Finished] = {}
    for index in range(len(plan.ranges)):
        found = read_sidecar(output, plan.folder, index)
        if found is not None:
            finished[index] = found
    resumed = sum(len(f.shards) for f in finished.values())
    n_documents = sum(plan.range_sizes[index][0] for index in finished)
    n_bytes = sum(plan.range_sizes[index][1] for index in finished)
    report(Progress("write", len(finished), len(plan.ranges), n_documents, n_bytes))
    missing = [index for index in range(len(plan.ranges)) if index not in finished]
    payloads = [
        {
            "output": str(output.absolute()),
            "folder": plan.folder,
            "index": index,
            "tokenizer": plan.tokenizer,
            "tasks": plan.ranges[index],
        }
        for index in missing
    ]
    for at, result in _run(write_range, payloads):
        index = missing[at]
        finished[index] = finished_from_json(result)
        n_documents += plan.range_sizes[index][0]
        n_bytes += plan.range_sizes[index][1]
        report(Progress("write", len(finished), len(plan.ranges), n_documents, n_bytes))
    return [finished[index] for index in range(len(plan.ranges))], resumed


# ---------------------------------------------------------------- the manifest


def _manifest(
    settings: PrepareSettings, tokenizer: Tokenizer, plan: _Plan, finished: list[Finished]
) -> Manifest:
    digests: dict[str, list[tuple[str, DocumentDigest]]] = {name: [] for name in SPLITS}
    for tasks, range_ in zip(plan.ranges, finished, strict=True):
        for task, digest in zip(tasks, range_.digests, strict=True):
            digests[task.split].append((task.id, digest))
    splits = {}
    for name in SPLITS:
        shards = tuple(range_.shards[name] for range_ in finished if name in range_.shards)
        splits[name] = Split(
            fingerprint=split_fingerprint(digests[name], tokenizer.dtype.name),
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            n_bytes=sum(shard.n_bytes for shard in shards),
            n_words=sum(shard.n_words for shard in shards),
            shards=shards,
        )
    drops = {}
    for reason in (filters.EMPTY, filters.BINARY, filters.DUPLICATE):
        drops[reason] = tuple(
            doc_id
            for doc_id, scanned in zip(plan.ids, plan.scanned, strict=True)
            if scanned.reason == reason
        )
    return Manifest(
        format_version=FORMAT_VERSION,
        plan_id=plan.plan_id,
        settings=_mathematical(settings),
        tokenizer=TokenizerInfo(
            kind=tokenizer.kind,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            token_offset=TOKEN_OFFSET,
            dtype=tokenizer.dtype.name,
        ),
        splits=splits,
        sources=tuple(
            Source(doc_id, scanned.size, scanned.sha256)
            for doc_id, scanned in zip(plan.ids, plan.scanned, strict=True)
        ),
        drops=drops,
        versions={
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
            "python": platform.python_version(),
            "ray": version("ray"),
            "unicode": unicodedata.unidata_version,
        },
    )


# ---------------------------------------------------------------- Ray Data


def _run(
    function: Callable[[dict[str, Any]], dict[str, Any]], payloads: Sequence[dict[str, Any]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Call `function` on each payload in a Ray task of its own; yields (index, result) as they end.

    Payloads and results travel as JSON text, so that Ray Data sees two plain columns. An error
    that a user can mend travels as text too: Ray would wrap it in pages of traceback.
    """
    if not payloads:
        return
    rows = [{"index": i, "payload": json.dumps(p)} for i, p in enumerate(payloads)]

    def call(row: dict[str, Any]) -> dict[str, Any]:
        try:
            result, error = function(json.loads(row["payload"])), ""
        except CorpusError as mistake:
            result, error = {}, str(mistake)
        except OSError as failure:
            where = failure.filename or "the output"
            result, error = {}, f"{where}: {failure.strerror or failure}"
        return {"index": row["index"], "result": json.dumps(result), "error": error}

    # One block a row: a task that fails or is killed takes no other range with it.
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(call, num_cpus=1)
    for row in dataset.iter_rows():
        if row["error"]:
            raise CorpusError(row["error"])
        yield int(row["index"]), json.loads(row["result"])


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Keep Ray Data from writing to the caller's terminal; give its settings back afterwards."""
    context = ray.data.DataContext.get_current()
    logger = logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        logger.setLevel(level)
