"""Pass 2 of `prepare`, for one range: read its documents again and write its shards.

Beside the shards lies what became of each record (`records`), and the range's *sidecar* finishes
it. The other readers of a range's documents are here too: what a tokenizer is trained on, and
what the held-out splits say.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import records
from pipeline.contamination import ContaminationSettings, HeldOutIndex, held_out_hashes
from pipeline.errors import CorpusError
from pipeline.formats import Content
from pipeline.manifest import RecordsFile, shard_from_json
from pipeline.normalization import normalize
from pipeline.parts import WordCounter, cut_parts
from pipeline.ranges import Range, read_range
from pipeline.scanning import ScanSettings, read_scan
from pipeline.selection import LETTERS, REASONS
from pipeline.shards import Row, Shard, ShardWriter, check_length, damaged
from pipeline.splits import SPLITS
from pipeline.storage import open_store
from pipeline.tokenizers import Tokenizer, make_tokenizer

CONTAMINATED = "contaminated"
"""A training document repeats what a held-out one says."""


class RangeTask(NamedTuple):
    """A range with what was decided on its records."""

    corpus: str
    number: int
    """In the plan."""
    range_: Range
    settings: ScanSettings
    scan: str
    """Where the result of pass 1 lies."""
    first_rows: list[int]
    letters: bytes


class TokenizerFile(NamedTuple):
    """A tokenizer as a task makes it."""

    kind: str
    model: str | None
    """Where its file lies in the corpus."""
    fingerprint: str | None = None
    """What it must be, where a corpus was made with it."""

    def make(self, corpus: str) -> Tokenizer:
        """Raises `CorpusError` for a file that was changed since."""
        if self.model is None:
            return make_tokenizer(self.kind, self.fingerprint)
        store = open_store(corpus)
        try:
            return make_tokenizer(self.kind, self.fingerprint, store.read(self.model))
        except (CorpusError, ValueError):  # some changed bytes are not even text
            if self.fingerprint is None:
                raise
            raise damaged(f"{store.location}/{self.model}", "it was changed") from None


class Finished(NamedTuple):
    """A range that pass 2 has written."""

    shards: dict[str, Shard]
    """By split; a split without documents has none."""
    records: RecordsFile


class Kept(NamedTuple):
    """A document of a range, to be read while it is current."""

    at: int
    """Its number among the range's records."""
    id: str
    split: str
    blocks: Iterable[bytes]
    """Its normalised content, which is hashed as it is read."""
    sha256: bytes
    """Of the whole, as it was scanned."""


def documents(task: RangeTask, scanned: pa.Table) -> Iterator[Kept]:
    """The documents that were kept, in order; each is refused if it is not what was scanned.

    Raises `CorpusError` naming the file that changed meanwhile.
    """
    ids = records.document_ids(scanned, task.first_rows)
    files, rows, hashes = (scanned.column(name).to_pylist() for name in ("file", "row", "sha256"))
    splits = dict(zip(LETTERS, SPLITS, strict=True))
    normalization, letters, count = task.settings.normalization, task.letters, len(scanned)
    at, file = -1, task.range_.pieces[-1].file
    for at, (_, file, row, item) in enumerate(read_range(task.range_, task.settings.format)):
        if at >= count or files[at] != file.id or rows[at] != row:
            break
        split = splits.get(letters[at])
        if split is None:
            for _ in item.blocks if isinstance(item, Content) else ():
                pass
            continue
        if not isinstance(item, Content):
            break
        blocks = normalize(item.blocks, normalization)
        first, second = next(blocks, b""), next(blocks, None)
        if second is None:  # most documents: known to be what was scanned before it is used
            if hashlib.sha256(first).digest() != hashes[at]:
                break
            yield Kept(at, ids[at], split, (first,), hashes[at])
            continue
        digest = hashlib.sha256()
        blocks = _hashed(itertools.chain((first, second), blocks), digest)
        del first, second
        yield Kept(at, ids[at], split, blocks, hashes[at])
        for _ in blocks:  # what the reader did not want
            pass
        if digest.digest() != hashes[at]:
            break
    else:
        if at + 1 == count:
            return
    raise CorpusError(f"{file.path}: changed while it was being prepared; run prepare again")


def write_range(
    task: RangeTask,
    folder: str,
    tokenizer_file: TokenizerFile,
    held_out: str | None,
    contamination: ContaminationSettings | None,
) -> Finished:
    """Write the shards of a range, what became of its records, and its sidecar.

    Runs in a Ray task, but needs no Ray. Raises `CorpusError` if a document is not what was
    scanned; then no shard of the range appears under its name without having been whole.
    """
    store = open_store(task.corpus)
    scanned = finished_scan(task)
    tokenizer = tokenizer_file.make(task.corpus)
    index = None
    if held_out and contamination:
        try:
            index = HeldOutIndex.load(store.read(held_out), contamination)
        except ValueError as error:
            what = f"it was changed ({error})"
            raise damaged(f"{store.location}/{held_out}", what) from None
    fates, words = _Fates(task, scanned), WordCounter()
    writers: dict[str, ShardWriter] = {}
    try:
        for document in documents(task, scanned):
            parts = cut_parts(document.blocks)
            if index is not None and contamination and document.split == "train":
                parts = list(parts)  # it is read twice
                if index.overlap(parts).share >= contamination.share:
                    fates.drop(document.at, CONTAMINATED)
                    continue
            if document.split not in writers:
                path = f"{folder}/{document.split}-{task.number:05d}.arrow"
                writers[document.split] = ShardWriter(task.corpus, path, tokenizer.dtype)
            fates.keep(
                document,
                *_write_document(document, parts, tokenizer, words, writers[document.split]),
            )
        shards = {split: writer.finish() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abort()
    data = records.to_bytes(fates.table())
    name = f"{folder}/records-{task.number:05d}.arrow"
    store.write(name, data)
    described = RecordsFile(
        name,
        len(scanned),
        records.content_digest(scanned),
        len(data),
        hashlib.sha256(data).hexdigest(),
    )
    finished = Finished(shards, described)
    store.write(_sidecar(folder, task.number), _to_json(finished))
    return finished


def sample_range(task: RangeTask, places: set[int]) -> list[bytes]:
    """The documents at these places of a range, for a tokenizer to be trained on."""
    kept = documents(task, finished_scan(task))
    return [b"".join(document.blocks) for document in kept if document.at in places]


def held_out_range(
    task: RangeTask, settings: ContaminationSettings
) -> list[npt.NDArray[np.uint64]]:
    """What the index needs of each held-out document of a range, in order."""
    return [
        held_out_hashes(document.blocks, settings)
        for document in documents(task, finished_scan(task))
        if document.split != "train"
    ]


def finished_scan(task: RangeTask) -> pa.Table:
    """The result of pass 1, which must be there."""
    scanned = read_scan(task.corpus, task.scan)
    if scanned is None:
        raise CorpusError(f"{task.corpus}: {task.scan} has disappeared; run prepare again")
    return scanned


def read_sidecar(corpus: str, folder: str, index: int) -> Finished | None:
    """What a range's sidecar says, if it is there and its files are whole."""
    store = open_store(corpus)
    try:
        value = json.loads(store.read(_sidecar(folder, index)))
        shards = {split: shard_from_json(shard) for split, shard in value["shards"].items()}
        finished = Finished(shards, RecordsFile(**value["records"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return finished if is_whole(corpus, finished) else None


def is_whole(corpus: str, finished: Finished) -> bool:
    """Whether the files of a range are there, as long as they should be."""
    store = open_store(corpus)
    try:
        for shard in finished.shards.values():
            check_length(corpus, shard)
        return store.size(finished.records.path) == finished.records.length
    except (FileNotFoundError, CorpusError):
        return False


class _Fates:
    """What becomes of each record of a range."""

    def __init__(self, task: RangeTask, scanned: pa.Table) -> None:
        self._scanned = scanned
        self._ids = records.document_ids(scanned, task.first_rows)
        pairs = zip(scanned.column("reason").to_pylist(), task.letters, strict=True)
        self._reasons = [reason or REASONS.get(letter, "") for reason, letter in pairs]
        self._splits = [""] * len(scanned)
        self._tokens = [0] * len(scanned)
        self._digests = [records.NOTHING] * len(scanned)

    def drop(self, at: int, reason: str) -> None:
        self._reasons[at] = reason

    def keep(self, document: Kept, tokens: int, digest: bytes) -> None:
        self._splits[document.at] = document.split
        self._tokens[document.at], self._digests[document.at] = tokens, digest

    def table(self) -> pa.Table:
        return records.with_fates(
            self._scanned,
            reason=self._reasons,
            doc_id=self._ids,
            split=self._splits,
            tokens=self._tokens,
            tokens_sha256=self._digests,
        )


def _write_document(
    document: Kept,
    parts: Iterable[bytes],
    tokenizer: Tokenizer,
    words: WordCounter,
    writer: ShardWriter,
) -> tuple[int, bytes]:
    """Write a document's rows; returns how many tokens it has, and the hash of them."""
    digest, count = hashlib.sha256(), 0
    for part, text in enumerate(parts):
        tokens = tokenizer.encode(text)
        if not tokenizer.stores_bytes:  # else it is the hash of the text, which is known
            digest.update(np.ascontiguousarray(tokens, tokens.dtype.newbyteorder("<")).data)
        count += len(tokens)
        n_words = words.count(text, goes_on=part > 0)
        writer.append(Row(document.id, part, tokens, len(text), n_words))
    return count, document.sha256 if tokenizer.stores_bytes else digest.digest()


def _hashed(blocks: Iterable[bytes], digest: "hashlib._Hash") -> Iterator[bytes]:
    for block in blocks:
        digest.update(block)
        yield block


def _sidecar(folder: str, index: int) -> str:
    return f"{folder}/range-{index:05d}.json"


def _to_json(finished: Finished) -> bytes:
    value = {
        "shards": {split: dataclasses.asdict(shard) for split, shard in finished.shards.items()},
        "records": dataclasses.asdict(finished.records),
    }
    return (json.dumps(value, sort_keys=True) + "\n").encode()
