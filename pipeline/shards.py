"""The shard: an uncompressed Arrow IPC file of tokenised documents, memory-mapped when read.

A row is a document, or a part of a long one:

    doc_id   string               its parts lie in one shard, one after the other
    part     int32                0, 1, ...
    tokens   large_list<uint8|uint16|int32>   stored ids, without special tokens
    n_bytes  int64                of the text that the tokens decode to
    n_words  int64                of that text; a word across two parts counts in the first

eos is not stored: it comes from the borders of documents. Any Arrow reader opens the file.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc

from pipeline import arrow_arrays
from pipeline.errors import CorpusError
from pipeline.storage import Location, open_store
from pipeline.summed_file import CHUNK_BYTES, SummedFile

# A record batch ends once it holds this much: small documents share one, and its 500 bytes of
# metadata vanish; few enough that the writer's memory stays small.
_BATCH_BYTES = 2 * 1024 * 1024
_BATCH_ROWS = 16384


@dataclass(frozen=True)
class Shard:
    """What the manifest says of one shard."""

    path: str
    """Relative to the corpus folder, with forward slashes."""
    rows: int
    documents: int
    tokens: int
    """Stored tokens, eos not counted."""
    n_bytes: int
    n_words: int
    longest_document: int
    """Tokens of the longest document."""
    length: int
    """Bytes of the file."""
    sums: tuple[str, ...]
    """SHA-256 of each chunk of `CHUNK_BYTES`."""


class Row(NamedTuple):
    """One row of a shard."""

    doc_id: str
    part: int
    tokens: npt.NDArray
    n_bytes: int
    n_words: int


def schema(dtype: np.dtype) -> pa.Schema:
    """The columns of a shard whose stored ids have this type."""
    item = pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)
    return pa.schema(
        [
            pa.field("doc_id", pa.string(), nullable=False),
            pa.field("part", pa.int32(), nullable=False),
            pa.field("tokens", pa.large_list(item), nullable=False),
            pa.field("n_bytes", pa.int64(), nullable=False),
            pa.field("n_words", pa.int64(), nullable=False),
        ]
    )


class ShardWriter:
    """Writes one shard so that it is there whole or not at all.

    It grows under a temporary name of its own, so that two writers of one path never share a
    file; `finish` makes it durable and gives it its name. The bytes depend only on the rows (and
    the version of pyarrow).
    """

    def __init__(self, corpus: Location, path: str, dtype: np.dtype) -> None:
        """Begin the shard at `path`, relative to the corpus folder."""
        self._path, self._store = path, open_store(corpus)
        self._temporary = self._store.scratch(path)
        self._schema = schema(dtype)
        self._rows: list[tuple[bytes, int, int, int, int]] = []  # as `Row`, but for the tokens
        # Those are copied at once: what they are a view of goes, and the next takes its memory,
        # which the core's cache still has.
        self._values = np.empty(2 * _BATCH_BYTES // dtype.itemsize, dtype)
        self._held = 0
        # A document may go on in the next batch: the tokens of the last so far, of the longest.
        self._documents = self._last = self._longest = 0
        self._totals = np.zeros(4, np.int64)  # rows, tokens, n_bytes, n_words
        self._file = SummedFile(self._temporary)
        self._stream = pa.ipc.new_file(pa.PythonFile(self._file, mode="w"), self._schema)

    def append(self, row: Row) -> None:
        """Add a row; a document's parts follow one another."""
        doc_id, part, tokens, n_bytes, n_words = row
        begin, self._held = self._held, self._held + len(tokens)
        if self._held > len(self._values):
            more = np.empty(self._held - len(self._values), self._values.dtype)
            self._values = np.concatenate([self._values, more])
        self._values[begin : self._held] = tokens
        self._rows.append((doc_id.encode(), part, len(tokens), n_bytes, n_words))
        if self._held * self._values.itemsize >= _BATCH_BYTES or len(self._rows) >= _BATCH_ROWS:
            self._flush()

    def finish(self) -> Shard:
        """Make the shard durable under its name, and describe it."""
        self._flush()
        self._stream.close()
        self._file.finish()
        self._store.place(self._temporary, self._path)
        rows, tokens, n_bytes, n_words = self._totals.tolist()
        return Shard(
            path=self._path,
            rows=rows,
            documents=self._documents,
            tokens=tokens,
            n_bytes=n_bytes,
            n_words=n_words,
            longest_document=self._longest,
            length=self._file.length,
            sums=tuple(self._file.sums),
        )

    def abort(self) -> None:
        """Leave nothing behind; harmless after `finish`."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._rows:
            return
        names, parts, tokens, n_bytes, n_words = zip(*self._rows, strict=True)
        offsets = np.cumsum([0, *tokens], dtype=np.int64)
        parts = np.array(parts, np.int32)
        sizes = np.array([n_bytes, n_words], np.int64)
        self._count(parts, offsets, sizes)
        kind = self._schema.field("tokens").type
        columns = [
            arrow_arrays.texts(names),
            arrow_arrays.numbers(pa.int32(), parts),
            pa.LargeListArray.from_arrays(
                arrow_arrays.numbers(pa.int64(), offsets),
                arrow_arrays.numbers(kind.value_type, self._values[: self._held]),
                type=kind,
            ),
            arrow_arrays.numbers(pa.int64(), sizes[0]),
            arrow_arrays.numbers(pa.int64(), sizes[1]),
        ]
        self._stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self._rows, self._held = [], 0

    def _count(
        self,
        parts: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
    ) -> None:
        """Take the rows of a batch into the totals; `sizes` is [2, rows], bytes and words."""
        self._totals += [len(parts), offsets[-1], *sizes.sum(axis=1)]
        begins = np.flatnonzero(parts == 0)
        self._documents += len(begins)
        # The last document of the batch before goes on up to the first that begins here.
        ends = offsets[np.append(begins, len(parts))]
        lengths = np.diff(ends)
        self._longest = max(self._longest, self._last + int(ends[0]), int(lengths.max(initial=0)))
        self._last = int(lengths[-1]) if len(lengths) else self._last + int(ends[0])


class ShardReader:
    """A memory-mapped shard: its rows' borders, and copies of their tokens.

    Opening checks the length, the schema and the counts against the manifest, which finds a file
    that was cut short or replaced; `manifest.verify` finds a changed byte.
    """

    def __init__(self, path: Path, shard: Shard, dtype: np.dtype) -> None:
        """Map the file of a shard, which may lie in a cache.

        Raises `CorpusError` naming it where it is not what the manifest says.
        """
        check_length(path.parent, dataclasses.replace(shard, path=path.name))
        try:
            file = pa.ipc.open_file(pa.memory_map(str(path)))
            if not file.schema.equals(schema(dtype)):
                raise damaged(path, f"its columns are not those of a shard of {dtype.name}")
            batches = [file.get_batch(i) for i in range(file.num_record_batches)]
        except (pa.ArrowInvalid, OSError) as error:
            raise damaged(path, str(error).splitlines()[0]) from None
        parts, lengths, begins, batch_of_row = [], [], [], []
        # Without a copy: each batch's tokens stay where the file is mapped.
        self._values: list[npt.NDArray] = []
        self._ids = [batch.column(0) for batch in batches]
        self._sizes = [[batch.column(index) for batch in batches] for index in (3, 4)]
        for index, batch in enumerate(batches):
            column = batch.column(2)
            offsets = arrow_arrays.view(column.offsets, np.dtype(np.int64))
            self._values.append(arrow_arrays.view(column.values, dtype))
            parts.append(arrow_arrays.view(batch.column(1), np.dtype(np.int32)))
            lengths.append(np.diff(offsets))
            begins.append(offsets[:-1])
            batch_of_row.append(np.full(len(batch), index, np.int32))
        self.lengths: npt.NDArray[np.int64] = arrow_arrays.joined(lengths, np.int64)
        """Tokens of each row [rows]."""
        self.first_rows: npt.NDArray[np.int64] = np.flatnonzero(
            arrow_arrays.joined(parts, np.int32) == 0
        )
        """The row at which each document begins [documents]."""
        self._begins = arrow_arrays.joined(begins, np.int64)
        self._first_of_batch = np.cumsum([0, *(len(batch) for batch in batches)])
        self._batch_of_row = arrow_arrays.joined(batch_of_row, np.int32)
        counts = (len(self.lengths), len(self.first_rows), int(self.lengths.sum()))
        expected = (shard.rows, shard.documents, shard.tokens)
        if counts != expected:
            raise damaged(
                path, f"(rows, documents, tokens) are {counts}, the manifest says {expected}"
            )

    def tokens(self, row: int) -> npt.NDArray:
        """A view [tokens] of the stored ids of a row, where the file is mapped."""
        begin = int(self._begins[row])
        return self._values[self._batch_of_row[row]][begin : begin + int(self.lengths[row])]

    def document_id(self, row: int) -> str:
        """The id of the document that a row belongs to."""
        batch = int(self._batch_of_row[row])
        return self._ids[batch][row - int(self._first_of_batch[batch])].as_py()

    def row_sizes(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The bytes [rows] and the words [rows] of the text of each row."""
        n_bytes, n_words = (
            arrow_arrays.joined(
                [arrow_arrays.view(column, np.int64) for column in columns], np.int64
            )
            for columns in self._sizes
        )
        return n_bytes, n_words

    def documents(self) -> Iterator[range]:
        """The rows of each document, in stored order."""
        borders = [*self.first_rows.tolist(), len(self.lengths)]
        return (range(begin, end) for begin, end in itertools.pairwise(borders))


def check_length(corpus: Location, shard: Shard) -> None:
    """Raise `CorpusError` if the shard's file is missing or not as long as it should be."""
    store = open_store(corpus)
    path = f"{store.location}/{shard.path}"
    try:
        length = store.size(shard.path)
    except FileNotFoundError:
        raise damaged(path, "the file is missing") from None
    if length != shard.length:
        raise damaged(path, f"it has {length} bytes, the manifest says {shard.length}")


def check_sums(corpus: Location, shard: Shard) -> None:
    """Raise `CorpusError` naming the first chunk that is not what was written."""
    check_length(corpus, shard)
    store = open_store(corpus)
    path = f"{store.location}/{shard.path}"
    try:
        with store.open(shard.path) as file:
            for index, expected in enumerate(shard.sums):
                if hashlib.sha256(file.read(CHUNK_BYTES)).hexdigest() != expected:
                    begin = index * CHUNK_BYTES
                    end = min(begin + CHUNK_BYTES, shard.length)
                    raise damaged(path, f"chunk {index} (bytes {begin} to {end}) was changed")
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror or error})") from None


def damaged(path: Path | str, what: str) -> CorpusError:
    """The error of a file of a corpus that is not what was written."""
    return CorpusError(
        f"{path}: {what}; delete the file and run `tvq prepare` again with the same settings"
    )
