"""Parquet: one column is the text, and row groups are read by different tasks."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from pipeline.contents import BLOCK_BYTES, Content, Piece, Rejected, in_blocks
from pipeline.errors import CorpusError
from pipeline.streams import check_expansion

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

NULL = "text is null"

_BATCH_BYTES = 4 * BLOCK_BYTES
# However short the texts are encoded: a dictionary may hold long ones that each row names again.
_BATCH_ROWS = 256


class Parquet:
    """A row is a record; the column `field`, of strings or bytes, is its text.

    Only that column is read, a page and a few rows at a time. A row group is never cut: files that
    are to be shared among tasks need several.
    """

    def __init__(self, field: str) -> None:
        self._field = field

    def pieces(self, file: BinaryIO, file_id: str, size: int, limit: int) -> list[Piece]:
        table = self._open(file, file_id)
        column = self._column(table, file_id)
        pieces: list[Piece] = []
        begin = held = 0
        for group in range(table.num_row_groups):
            held += table.metadata.row_group(group).column(column).total_uncompressed_size
            if held >= limit:
                pieces.append(Piece(begin, group + 1))
                begin, held = group + 1, 0
        if begin < table.num_row_groups or not pieces:
            pieces.append(Piece(begin, table.num_row_groups))
        return pieces

    def documents(self, file: BinaryIO, file_id: str, piece: Piece) -> Iterator[Content | Rejected]:
        import pyarrow as pa

        table = self._open(file, file_id)
        column = self._column(table, file_id)
        row = 0
        for group in range(piece.begin, piece.end):
            chunk = table.metadata.row_group(group).column(column)
            size = max(chunk.total_uncompressed_size, 1)
            packed = max(chunk.total_compressed_size, 1)
            check_expansion(file_id, size, packed)
            expanded = 0
            batches = table.iter_batches(
                batch_size=max(min(_BATCH_BYTES * chunk.num_values // size, _BATCH_ROWS), 1),
                row_groups=[group],
                columns=[self._field],
                use_threads=False,
            )
            while True:
                try:
                    batch = next(batches, None)
                except (pa.ArrowException, OSError) as error:
                    raise _damaged(file_id, error) from None
                if batch is None:
                    break
                for value in _bytes_of(batch.column(self._field)):
                    if value is None:
                        yield Rejected(row, NULL)
                    else:
                        expanded += len(value)
                        check_expansion(file_id, expanded, packed)
                        yield Content(row, None, in_blocks(value))
                    row += 1

    def _open(self, file: BinaryIO, file_id: str) -> "pq.ParquetFile":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # A buffer, or the bytes of a whole row group would be read at once.
            return pq.ParquetFile(file, buffer_size=BLOCK_BYTES, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(file_id, error) from None

    def _column(self, table: "pq.ParquetFile", file_id: str) -> int:
        """The number of the column among the leaves of the schema."""
        schema = table.schema_arrow
        if len(schema.get_all_field_indices(self._field)) == 1 and _is_text(
            schema.field(self._field).type
        ):
            return [table.schema.column(i).path for i in range(len(table.schema))].index(
                self._field
            )
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise CorpusError(
            f"{file_id}: no one column {self._field!r} of strings or bytes: the columns are "
            f"{columns[:500]}; set the field to one that holds text"
        )


def _is_text(of: "pa.DataType") -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(of):
        of = of.value_type
    return (
        pa.types.is_string(of)
        or pa.types.is_large_string(of)
        or pa.types.is_string_view(of)
        or pa.types.is_binary(of)
        or pa.types.is_large_binary(of)
        or pa.types.is_binary_view(of)
        or pa.types.is_fixed_size_binary(of)
    )


def _bytes_of(column: "pa.Array") -> Iterator[bytes | None]:
    import pyarrow as pa

    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    for value in column:
        buffer = value.as_buffer() if value.is_valid else None
        yield None if buffer is None else buffer.to_pybytes()


def _damaged(file_id: str, error: Exception) -> CorpusError:
    if isinstance(error, OSError) and error.errno is not None:  # of the file, not of Parquet
        raise error
    reason = " ".join(str(error).split())
    return CorpusError(
        f"{file_id}: not a whole Parquet file ({reason[:200]}): fetch it again or leave it out"
    )
