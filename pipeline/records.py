"""What is known of each record of a range, in a small Arrow file beside its shards.

Pass 1 finds what each record is (`scan_schema`), pass 2 adds what became of it (`schema`): the
split and tokens of a document, or the reason for which it was dropped. So a corpus can say of
every document that was ever read where it is or why not, without its sources. A range's file is
a few dozen bytes a record; nobody holds the records of a whole corpus in memory.
"""

import hashlib
import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from pipeline import arrow_arrays

_SCANNED = [
    pa.field("file", pa.string(), nullable=False),
    pa.field("piece", pa.int32(), nullable=False),
    pa.field("row", pa.int64(), nullable=False),
    pa.field("name", pa.string(), nullable=False),
    pa.field("named_split", pa.string(), nullable=False),
    pa.field("n_bytes", pa.int64(), nullable=False),
    pa.field("sha256", pa.binary(32), nullable=False),
    pa.field("reason", pa.string(), nullable=False),
]
_WRITTEN = [
    pa.field("doc_id", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
    pa.field("tokens", pa.int64(), nullable=False),
    pa.field("tokens_sha256", pa.binary(32), nullable=False),
]

NOTHING = bytes(32)
"""In the place of a hash that there is not."""


def scan_schema(signature_bytes: int) -> pa.Schema:
    """Columns of pass 1.

    `file`; `piece` (its number in the range); `row` (ordinal in the piece, -1: the file is the
    document); `name` (in the place of the file's id, mostly ""); `named_split` (by the corpus
    itself, mostly ""); `n_bytes` and `sha256` of the normalised content; `reason` ("": none yet);
    and with `signature_bytes` the `signature` that near-duplicates are found by.
    """
    signature = [pa.field("signature", pa.binary(signature_bytes))] if signature_bytes else []
    return pa.schema(_SCANNED + signature)


def with_fates(scanned: pa.Table, **columns: list) -> pa.Table:
    """The table of pass 2: `reason` anew, and behind the columns of pass 1 `doc_id`, `split` ("":
    dropped), `tokens`, and the hash of the stored ids, little-endian, in the type that the
    tokenizer names (`tokens_sha256`)."""
    at = scanned.schema.get_field_index("reason")
    reason = scanned.schema.field(at)
    table = scanned.set_column(at, reason, _array(columns["reason"], reason.type))
    for field in _WRITTEN:
        table = table.append_column(field, _array(columns[field.name], field.type))
    return table


def table(rows: list[dict[str, Any]], columns: pa.Schema) -> pa.Table:
    """The records as a table."""
    return pa.Table.from_arrays(
        [_array([row[field.name] for row in rows], field.type) for field in columns],
        schema=columns,
    )


def _array(values: list, kind: pa.DataType) -> pa.Array:
    if pa.types.is_string(kind):
        return arrow_arrays.texts([value.encode() for value in values])
    if pa.types.is_fixed_size_binary(kind):
        return arrow_arrays.hashes(values, kind.byte_width)
    return arrow_arrays.numbers(kind, np.array(values, np.dtype(str(kind))))


def to_bytes(records: pa.Table) -> bytes:
    """As an Arrow file; the same records give the same bytes (for one version of pyarrow)."""
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, records.schema, options=options) as writer:
        writer.write_table(records.combine_chunks())
    return sink.getvalue()


def from_bytes(data: bytes) -> pa.Table:
    """The table of an Arrow file; raises `pa.ArrowInvalid` for a damaged one."""
    return pa.ipc.open_file(pa.py_buffer(data)).read_all()


def content_digest(records: pa.Table) -> str:
    """A hash of what pass 1 found, but for where and when files lie."""
    digest = hashlib.sha256()
    names = ("file", "piece", "row", "name", "named_split", "n_bytes", "reason")
    columns = [records.column(name).to_pylist() for name in names]
    for row, sha256 in zip(
        zip(*columns, strict=True), records.column("sha256").to_pylist(), strict=True
    ):
        digest.update(repr(row).encode() + sha256)
    return digest.hexdigest()


def document_ids(records: pa.Table, first_rows: list[int]) -> list[str]:
    """The id of each record: the file's, or `file#row` for one record of several.

    `first_rows` [pieces] has the number of records of the file that come before each piece.
    """
    ids = []
    columns = (records.column(name).to_pylist() for name in ("name", "file", "piece", "row"))
    for name, file, piece, row in zip(*columns, strict=True):
        ids.append(name or (file if row < 0 else f"{file}#{first_rows[piece] + row}"))
    return ids
