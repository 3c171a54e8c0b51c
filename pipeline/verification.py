"""Read a whole corpus and hold it against its manifest.

Memory: one shard's borders and one records file, whatever the size of the corpus; with
decontamination also what its index needs while it is built.
"""

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.arrow_arrays import joined, view
from pipeline.contamination import (
    SUM_BYTES,
    ContaminationSettings,
    HeldOutIndex,
    held_out_hashes,
)
from pipeline.corpus_records import corpus_records, rows_with, shard_path
from pipeline.errors import CorpusError
from pipeline.manifest import (
    FingerprintBuilder,
    Manifest,
    tokenizer_of,
)
from pipeline.shard_cache import ShardCache
from pipeline.shards import Shard, ShardReader, check_length, check_sums, damaged
from pipeline.storage import LocalStore, Location, Store, open_store
from pipeline.tokenizers import Tokenizer


class Verified(NamedTuple):
    """What `verify` has read, and found as it was written."""

    shards: int
    documents: int
    tokens: int
    n_bytes: int
    """Of the shards' files."""
    records: int
    """What became of so many was held against the shards; 0: the corpus has no records."""


class Reading(NamedTuple):
    """How far `verify` is; reported before the first shard and after each."""

    shards: int
    n_shards: int
    n_bytes: int
    """Of the shards read."""


class _Document(NamedTuple):
    """What a fingerprint sees of a document."""

    id: str
    tokens: int
    sha256: str


class _Kept(NamedTuple):
    """A document as the records have it."""

    document: _Document
    increment: int
    file: str


def verify(corpus: Location, report: Callable[[Reading], None] | None = None) -> Verified:
    """Read every byte of a corpus and compare it with the manifest.

    Lengths of all files first; then tokenizer and records; of each shard the checksums, then what
    it says: schema, counts, and the fingerprint of each split, made anew from ids and tokens, which
    the records must agree with; last the index that documents are decontaminated against, made anew
    too. Raises `CorpusError` naming the first file that is missing or cut short, the first chunk of
    8 MiB that was changed, or the split that is not what the manifest says.
    """
    manifest, store = Manifest.load(corpus), open_store(corpus)
    _check_lengths(store, manifest)
    tokenizer = _tokenizer(store, manifest)
    _check_fields(store, manifest, tokenizer)
    n_records = _check_records(store, manifest)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    done = n_bytes = 0
    tell = report or (lambda _: None)
    tell(Reading(0, len(shards), 0))
    for name in manifest.splits:
        for shard in _check_split(store, manifest, name):
            done, n_bytes = done + 1, n_bytes + shard.length
            tell(Reading(done, len(shards), n_bytes))
    _check_held_out_index(store, manifest, tokenizer)
    splits = manifest.splits.values()
    documents, tokens = sum(s.documents for s in splits), sum(s.tokens for s in splits)
    return Verified(len(shards), documents, tokens, n_bytes, n_records)


def _check_lengths(store: Store, manifest: Manifest) -> None:
    for split in manifest.splits.values():
        for shard in split.shards:
            check_length(store.location, shard)
    lengths = {f.path: f.length for increment in manifest.increments for f in increment.records}
    for name in (manifest.tokenizer.file, manifest.held_out_index):
        if name is not None:
            lengths[name] = -1
    for name, expected in lengths.items():
        path = f"{store.location}/{name}"
        try:
            length = store.size(name)
        except FileNotFoundError:
            raise damaged(path, "the file is missing") from None
        if expected not in (-1, length):
            raise damaged(path, f"it has {length} bytes, the manifest says {expected}")


def _tokenizer(store: Store, manifest: Manifest) -> Tokenizer:
    try:
        return tokenizer_of(store.location, manifest)
    except (CorpusError, ValueError):  # some changed bytes are not even text
        if manifest.tokenizer.file is None:
            raise
        raise damaged(f"{store.location}/{manifest.tokenizer.file}", "it was changed") from None


def _check_fields(store: Store, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """What the manifest says twice, it says alike."""
    info = manifest.tokenizer
    found = (tokenizer.dtype.name, tokenizer.vocab_size)
    if found != (info.dtype, info.vocab_size):
        raise _untrue(store, "tokenizer", f"{found}", f"{(info.dtype, info.vocab_size)}")
    for name, split in manifest.splits.items():
        for field in ("documents", "tokens", "n_bytes", "n_words"):
            total = sum(getattr(shard, field) for shard in split.shards)
            if total != getattr(split, field):
                what = f"{field} of the split {name}, added up over its shards"
                raise _untrue(store, what, total, getattr(split, field))


def _check_records(store: Store, manifest: Manifest) -> int:
    """Every records file is what was written, and the drops are those of the manifest."""
    count = 0
    dropped: dict[str, int] = {}
    for _, file, table in corpus_records(store.location, manifest):
        if len(table) != file.records:
            path = f"{store.location}/{file.path}"
            raise damaged(path, f"it has {len(table)} records, the manifest says {file.records}")
        count += len(table)
        for (reason,) in rows_with(table, "split", "", ["reason"]):
            dropped[reason] = dropped.get(reason, 0) + 1
    said = {reason: drop.count for reason, drop in manifest.drops.items()}
    if manifest.increments and dropped != said:
        raise _untrue(store, "documents dropped", dropped, said)
    return count


def _check_split(store: Store, manifest: Manifest, name: str) -> Iterator[Shard]:
    """Read a split; yields each shard that holds what it should."""
    split = manifest.splits[name]
    fingerprint, increments = FingerprintBuilder(manifest.tokenizer.dtype), []
    expected = _kept(store, manifest, name)
    wrong = ""
    for shard in split.shards:
        if isinstance(store, LocalStore):  # of an object store, what arrives is checked
            check_sums(store.location, shard)
        with _local(store, shard) as path:
            for document in _documents(store, manifest, shard, path):
                kept = next(expected, None)
                while kept is not None and len(increments) < kept.increment:
                    increments.append(fingerprint.fingerprint())
                if manifest.increments and not wrong and kept is None:
                    wrong = f"no records file has its document {document.id!r}"
                elif kept is not None and not wrong and kept.document != document:
                    wrong = (
                        f"where {shard.path} has the document {_named(document)}, {kept.file} has "
                        f"{_named(kept.document)}"
                    )
                fingerprint.add(*document)
        yield shard
    if (left := next(expected, None)) is not None and not wrong:
        wrong = f"{left.file} has a document more, {left.document.id!r}"
    found = fingerprint.fingerprint()
    if found != split.fingerprint:
        what = f"fingerprint of the split {name}, made of its documents' ids and tokens"
        raise _untrue(store, what, found[:16], split.fingerprint[:16], wrong)
    if wrong:
        raise _remake(store, f"split {name}: {wrong}")
    if name == "train":
        increments += [found] * (len(manifest.increments) - len(increments))
        for number, (one, increment) in enumerate(
            zip(increments, manifest.increments, strict=True)
        ):
            if one != increment.train_fingerprint:
                what = f"fingerprint of train at the end of increment {number + 1}"
                raise _untrue(store, what, one[:16], increment.train_fingerprint[:16])


def _documents(store: Store, manifest: Manifest, shard: Shard, path: Path) -> Iterator[_Document]:
    """The documents of a shard, whose columns are found to be right first."""
    dtype = np.dtype(manifest.tokenizer.dtype)
    reader = ShardReader(path, shard, dtype)
    where = f"{store.location}/{shard.path}"
    with pa.memory_map(str(path)) as mapped:
        file = pa.ipc.open_file(mapped)
        batches = [file.get_batch(index) for index in range(file.num_record_batches)]
        try:
            for batch in batches:
                batch.validate(full=True)
        except pa.ArrowInvalid as error:
            raise damaged(where, str(error).splitlines()[0]) from None
        for field in ("n_bytes", "n_words"):
            total = sum(int(view(batch.column(field), np.int64).sum()) for batch in batches)
            if total != getattr(shard, field):
                what = f"{field} is {total}, the manifest says {getattr(shard, field)}"
                raise damaged(where, what)
        parts = joined([view(batch.column("part"), np.int32) for batch in batches], np.int32)
    _check_parts(where, reader, parts)
    longest = 0
    for rows in reader.documents():
        digest, count = hashlib.sha256(), 0
        for row in rows:
            tokens = reader.tokens(row)
            digest.update(np.ascontiguousarray(tokens, tokens.dtype.newbyteorder("<")).data)
            count += len(tokens)
        longest = max(longest, count)
        yield _Document(reader.document_id(rows[0]), count, digest.hexdigest())
    if longest != shard.longest_document:
        what = f"its longest document has {longest} tokens, the manifest says"
        raise damaged(where, f"{what} {shard.longest_document}")


@contextlib.contextmanager
def _local(store: Store, shard: Shard) -> Iterator[Path]:
    """The shard's file itself, or one fetched from an object store, checked, and gone afterwards.

    Not from the cache that trainings use: what is verified is what the store holds.
    """
    if isinstance(store, LocalStore):
        yield store.path(shard.path)
        return
    with (
        tempfile.TemporaryDirectory(prefix="tvq-verify-") as folder,
        ShardCache(store, Path(folder), None) as cache,
    ):
        yield cache.path(shard)


def _check_parts(where: str, reader: ShardReader, parts: npt.NDArray[np.integer]) -> None:
    """The parts of each document are numbered from 0 and bear its id."""
    numbers = np.arange(len(parts))
    if len(parts):
        before = np.zeros(len(parts), np.int64)
        before[reader.first_rows] = np.diff(reader.first_rows, prepend=0)
        numbers -= np.cumsum(before)
    same = all(
        reader.document_id(row) == reader.document_id(row - 1)
        for row in np.flatnonzero(numbers).tolist()
    )
    if not same or not np.array_equal(numbers, parts):
        raise damaged(where, "the parts of a document do not follow one another")


def _check_held_out_index(store: Store, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """The index is what the held-out documents give: its own checksum could be of another one."""
    if manifest.held_out_index is None:
        return
    settings = ContaminationSettings(**manifest.settings["contamination"])
    hashes = _held_out_hashes(store, manifest, tokenizer, settings)
    data = io.BytesIO()
    HeldOutIndex.build(hashes, settings).save(data)
    expected = data.getvalue()
    # The first versions wrote no checksum behind it.
    if store.read(manifest.held_out_index) not in (expected, expected[:-SUM_BYTES]):
        path = f"{store.location}/{manifest.held_out_index}"
        raise damaged(path, "it is not what the held-out documents say")


def _held_out_hashes(
    store: Store, manifest: Manifest, tokenizer: Tokenizer, settings: ContaminationSettings
) -> Iterator[npt.NDArray[np.uint64]]:
    """Of each held-out document, in the order of the records; the first increment has them all."""
    shards = {shard.path: shard for split in manifest.splits.values() for shard in split.shards}
    dtype = np.dtype(manifest.tokenizer.dtype)
    for number, file, table in corpus_records(store.location, manifest):
        if number:
            return
        texts: dict[str, Iterator[list[bytes]]] = {}
        for split in table.column("split").to_pylist():
            if split in ("", "train"):
                continue
            if split not in texts:
                texts[split] = _texts(store, shards[shard_path(file, split)], dtype, tokenizer)
            yield held_out_hashes(next(texts[split]), settings)


def _texts(
    store: Store, shard: Shard, dtype: np.dtype, tokenizer: Tokenizer
) -> Iterator[list[bytes]]:
    with _local(store, shard) as path:
        reader = ShardReader(path, shard, dtype)
        for rows in reader.documents():
            yield [tokenizer.decode(reader.tokens(row)) for row in rows]


def _kept(store: Store, manifest: Manifest, split: str) -> Iterator[_Kept]:
    """The documents of a split, in order, as the records have them."""
    for number, file, table in corpus_records(store.location, manifest):
        columns = ("doc_id", "tokens", "tokens_sha256")
        for doc_id, tokens, sha256 in rows_with(table, "split", split, columns):
            yield _Kept(_Document(doc_id, tokens, sha256.hex()), number, file.path)


def _named(document: _Document) -> str:
    return f"{document.id!r} of {document.tokens} tokens {document.sha256[:8]}"


def _untrue(store: Store, what: str, found: object, said: object, more: str = "") -> CorpusError:
    said_more = f" ({more})" if more else ""
    return _remake(store, f"the {what} is {found}, the manifest says {said}{said_more}")


def _remake(store: Store, what: str) -> CorpusError:
    return CorpusError(
        f"{store.location}: {what}; manifest and files do not belong together: prepare the corpus "
        "again in another folder"
    )
