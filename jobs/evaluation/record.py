"""What an evaluation found, and its place in the run directory.

<run>/evaluations/UPDATE-SPLIT-HASH.json          the figures; written last
                  UPDATE-SPLIT-HASH.arrow         the nats of each document
                  UPDATE-SPLIT-HASH-blocks.arrow  those of pieces, where there are few documents

The hash is of what the figures depend on: the weights, the split's text, T and whether the cache
was carried. So the same evaluation done again takes the place of the first.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc

from jobs.checkpoints.manifest import CheckpointManifest
from jobs.runs.run_directory import RunDirectory

FORMAT_VERSION = 1
BLOCK_KIB = 64
FEW_DOCUMENTS = 30
"""Below this, documents are too few to resample, and blocks of BLOCK_KIB stand for them."""

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class Settings(NamedTuple):
    """What the figures of an evaluation depend on."""

    update: int
    """Of the checkpoint."""
    weights: str
    """Hash of the checkpoint's arrays."""
    split: str
    fingerprint: str
    """Of the split, or of those of a mixture's corpora."""
    window: str
    """data.window of the recipe: what a document's end is."""
    length: int
    """T: targets scored at a time; without carry also the most that a target sees before it."""
    carry: bool
    """The cache is carried through each document."""

    @property
    def stem(self) -> str:
        """The name of the evaluation's files."""
        text = json.dumps([FORMAT_VERSION, *self])
        return f"{self.update:08d}-{self.split}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def settings_of(
    checkpoint: CheckpointManifest,
    split: str,
    fingerprint: str,
    *,
    window: str,
    length: int,
    carry: bool,
) -> Settings:
    """The settings under which a checkpoint is evaluated."""
    sums = json.dumps(checkpoint.sums, sort_keys=True)
    weights = hashlib.sha256(sums.encode()).hexdigest()[:16]
    return Settings(checkpoint.update, weights, split, fingerprint, window, length, carry)


@dataclass(frozen=True)
class Documents:
    """Sums over each document, in stored order, corpus after corpus: columns of one length."""

    corpus: list[str]
    """Name of the corpus within the mixture."""
    doc_id: list[str]
    nats: Floats
    n_tokens: Integers
    """Targets: its own tokens and, in a stream, the eos behind them."""
    n_correct: Integers
    """Targets that the model held for the likeliest."""
    n_bytes: Integers
    n_words: Integers

    def __len__(self) -> int:
        return len(self.doc_id)


@dataclass(frozen=True)
class Blocks:
    """Sums over what a bootstrap draws from, in stored order: columns of one length."""

    kind: str
    """documents, or blocks of 64 KiB: pieces of that size, where there are few documents."""
    nats: Floats
    n_tokens: Integers
    n_bytes: Integers

    def __len__(self) -> int:
        return len(self.nats)


class PositionBucket(NamedTuple):
    """The targets that had so many tokens before them in what they were scored from."""

    begin: int
    end: int
    """Not itself in it."""
    targets: int
    nats: float


@dataclass(frozen=True)
class Evaluation:
    """The figures of one checkpoint on one split."""

    run: str
    update: int
    split: str
    fingerprint: str
    length: int
    carry: bool
    windows: int
    """Spans that were scored, each from an empty cache."""
    targets: int
    """Tokens predicted: every token of the split and, in a stream, each document's eos, once."""
    n_bytes: int
    n_words: int
    nats_per_token: float
    bits_per_byte: float
    bits_per_byte_interval: tuple[float, float] | None
    """95%, by a bootstrap over the blocks; None where they are too few."""
    word_perplexity: float | None
    """exp(nats / words), the convention of PG-19; None where it is no text."""
    accuracy: float
    """Share of the targets that the model held for the likeliest."""
    tokens_per_second: float
    """Targets of all workers over wall-clock time, compilation left out."""
    positions: tuple[PositionBucket, ...]
    corpora: dict[str, float]
    """Bits per byte of each corpus that the split is of, by name."""
    documents: Documents
    blocks: Blocks

    def figures(self) -> dict[str, Any]:
        """Everything but the columns, for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {
            "positions": [bucket._asdict() for bucket in self.positions],
            "documents": len(self.documents),
            "blocks": {"kind": self.blocks.kind, "count": len(self.blocks)},
        }


def store(run: RunDirectory, settings: Settings, evaluation: Evaluation) -> str:
    """Writes the evaluation into the run directory; returns where its figures are."""
    folder, stem = run.store.child("evaluations"), settings.stem
    folder.write(f"{stem}.arrow", _to_arrow(evaluation.documents))
    if _has_blocks(evaluation.blocks.kind):
        folder.write(f"{stem}-blocks.arrow", _to_arrow(evaluation.blocks))
    fields = {
        "format_version": FORMAT_VERSION,
        "settings": settings._asdict(),
        **evaluation.figures(),
    }
    folder.write(f"{stem}.json", (json.dumps(fields, indent=1) + "\n").encode())
    return f"{folder.location}/{stem}.json"


def stored(run: RunDirectory, settings: Settings) -> Evaluation | None:
    """The evaluation that was made under these settings; None where there is none."""
    folder, stem = run.store.child("evaluations"), settings.stem
    try:
        fields = json.loads(folder.read(f"{stem}.json"))
    except FileNotFoundError:
        return None
    documents = Documents(**_columns(folder.read(f"{stem}.arrow")))
    kind = fields["blocks"]["kind"]
    blocks = blocks_of(documents)
    if _has_blocks(kind):
        blocks = Blocks(kind, **_columns(folder.read(f"{stem}-blocks.arrow")))
    del fields["format_version"], fields["settings"]
    interval = fields["bits_per_byte_interval"]
    return Evaluation(
        **fields
        | {
            "bits_per_byte_interval": interval and tuple(interval),
            "positions": tuple(PositionBucket(**bucket) for bucket in fields["positions"]),
            "documents": documents,
            "blocks": blocks,
        }
    )


def blocks_of(documents: Documents) -> Blocks:
    """The documents themselves as what is drawn from."""
    return Blocks("documents", documents.nats, documents.n_tokens, documents.n_bytes)


def _has_blocks(kind: str) -> bool:
    return kind != "documents"


def _to_arrow(columns: Documents | Blocks) -> bytes:
    values = {
        field.name: getattr(columns, field.name)
        for field in dataclasses.fields(columns)
        if field.name != "kind"
    }
    arrays = [
        pa.array(value, pa.string())
        if isinstance(value, list)
        else pa.array(value, pa.from_numpy_dtype(value.dtype))
        for value in values.values()
    ]
    table = pa.Table.from_arrays(arrays, names=list(values))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _columns(data: bytes) -> dict[str, Any]:
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    return {
        name: column.to_pylist() if pa.types.is_string(column.type) else column.to_numpy()
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
