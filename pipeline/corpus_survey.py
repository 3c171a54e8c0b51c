"""What is in a corpus, by its manifest and its records: counts, lengths, single documents."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.corpus_records import corpus_records, rows_with, shard_path
from pipeline.filters import DUPLICATE
from pipeline.manifest import Manifest, RecordsFile
from pipeline.shards import Shard
from pipeline.storage import Location
from pipeline.stored_documents import StoredDocument, documents_of_shard
from pipeline.tokenizers import Tokenizer


class Survey(NamedTuple):
    """What the records of a corpus say."""

    files: int
    """Sources that were read."""
    records: int
    n_bytes: int
    """Of all records after normalisation, those dropped by their size included."""
    lengths: dict[str, npt.NDArray[np.int64]]
    """For each split, documents of 2^k to 2^(k+1) - 1 tokens [k]; 0 tokens count as 1."""


class Fate(NamedTuple):
    """What became of one record."""

    id: str
    file: str
    """The source that it was read from."""
    split: str
    """"" if it was dropped."""
    reason: str
    """Why it was dropped; "" if it was not."""
    tokens: int
    n_bytes: int
    """After normalisation."""
    sha256: bytes
    """Of the normalised content."""
    records: RecordsFile
    """Where that is written."""


class StoredText(NamedTuple):
    """The text of a document, or its beginning."""

    id: str
    tokens: int
    text: bytes


def survey(corpus: Location, manifest: Manifest) -> Survey:
    """Count what the records say; reads no shard. All zero for a corpus without records."""
    n_files = n_records = n_bytes = 0
    lengths = {name: np.zeros(64, np.int64) for name in manifest.splits}
    last = None
    for _, _, table in corpus_records(corpus, manifest):
        names = table.column("file").unique().to_pylist()
        n_files += len(names) - (names[:1] == [last])  # a large file has pieces in several ranges
        last = names[-1] if names else last
        n_records += len(table)
        n_bytes += sum(table.column("n_bytes").to_pylist())
        for name, counts in lengths.items():
            kept = [tokens for (tokens,) in rows_with(table, "split", name, ["tokens"])]
            counts += _by_length(np.array(kept, np.int64))
    longest = max(
        (int(np.flatnonzero(counts)[-1]) for counts in lengths.values() if counts.any()), default=-1
    )
    lengths = {name: counts[: longest + 1] for name, counts in lengths.items()}
    return Survey(n_files, n_records, n_bytes, lengths)


def samples(
    corpus: Location,
    manifest: Manifest,
    tokenizer: Tokenizer,
    split: str,
    *,
    count: int,
    max_bytes: int,
) -> Iterator[StoredText]:
    """The beginnings, of about `max_bytes`, of documents that lie evenly in a split.

    Reads the shards that they lie in. Raises `CorpusError` for a split that is not there or empty.
    """
    chosen = manifest.split(split)
    ends = list(itertools.accumulate(shard.documents for shard in chosen.shards))
    wanted = sorted({(2 * k + 1) * chosen.documents // (2 * count) for k in range(count)})
    for at in wanted:
        index = next(i for i, end in enumerate(ends) if at < end)
        number = at - ends[index] + chosen.shards[index].documents
        found = documents_of_shard(corpus, manifest, chosen.shards[index])
        yield _text(next(itertools.islice(found, number, None)), tokenizer, max_bytes)


def fates(corpus: Location, manifest: Manifest, doc_id: str) -> list[Fate]:
    """What became of the records of this id: mostly one, none if no source had it."""
    return _find(corpus, manifest, "doc_id", doc_id)


def original(corpus: Location, manifest: Manifest, fate: Fate) -> Fate | None:
    """The document that was kept of those that a dropped duplicate equals."""
    if fate.reason != DUPLICATE:
        return None
    found = _find(corpus, manifest, "sha256", fate.sha256)
    return next((other for other in found if other.split), None)


def similar_ids(corpus: Location, manifest: Manifest, text: str, limit: int = 5) -> list[str]:
    """The first ids that contain this text."""
    found: list[str] = []
    for _, _, table in corpus_records(corpus, manifest):
        ids = table.column("doc_id").to_pylist()
        found += [doc_id for doc_id in ids if text.lower() in doc_id.lower()]
        if len(found) >= limit:
            break
    return found[:limit]


def document(corpus: Location, manifest: Manifest, tokenizer: Tokenizer, fate: Fate) -> StoredText:
    """The whole text of a document that was kept."""
    shards = {shard.path: shard for shard in manifest.split(fate.split).shards}
    shard = shards[shard_path(fate.records, fate.split)]
    found = _search(corpus, manifest, tokenizer, [shard], fate.id)
    assert found is not None, "verify holds that records and shards agree"
    return found


def document_without_records(
    corpus: Location, manifest: Manifest, tokenizer: Tokenizer, doc_id: str
) -> tuple[str, StoredText] | None:
    """(split, text) of a document of a corpus of format 1: all shards are looked through."""
    for name, split in manifest.splits.items():
        found = _search(corpus, manifest, tokenizer, split.shards, doc_id)
        if found is not None:
            return name, found
    return None


def _by_length(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    exponents = np.frexp(np.maximum(tokens, 1).astype(np.float64))[1] - 1
    return np.bincount(exponents, minlength=64)


def _find(corpus: Location, manifest: Manifest, column: str, value: str | bytes) -> list[Fate]:
    names = ("doc_id", "file", "split", "reason", "tokens", "n_bytes", "sha256")
    found = []
    for _, file, table in corpus_records(corpus, manifest):
        found += [Fate(*row, records=file) for row in rows_with(table, column, value, names)]
    return found


def _search(
    corpus: Location,
    manifest: Manifest,
    tokenizer: Tokenizer,
    shards: Sequence[Shard],
    doc_id: str,
) -> StoredText | None:
    for shard in shards:
        for found in documents_of_shard(corpus, manifest, shard):
            if found.id == doc_id:
                return _text(found, tokenizer, None)
    return None


def _text(found: StoredDocument, tokenizer: Tokenizer, max_bytes: int | None) -> StoredText:
    pieces, size = [], 0
    for part in found.parts:
        # A token is at least a byte, so more of them are not needed.
        pieces.append(tokenizer.decode(part[:max_bytes]))
        size += len(pieces[-1])
        if max_bytes is not None and size >= max_bytes:
            break
    return StoredText(found.id, sum(map(len, found.parts)), b"".join(pieces))
