"""Records of which one field is the document's text: JSON lines and CSV.

Text that is not valid UTF-8 is dropped with a reason from JSON, whose texts are characters, and
kept exactly from CSV. A byte order mark at the start of a file is no part of the first record.
"""

import csv
import json
from collections.abc import Iterator
from typing import BinaryIO

from pipeline.contents import RECORD_BYTES, Content, Piece, Rejected, in_blocks
from pipeline.errors import CorpusError
from pipeline.streams import Splitter, read_unpacked
from pipeline.text_formats import lines

BAD_JSON = "not JSON"
BAD_TEXT = "text field is not text"
BAD_UNICODE = "not valid Unicode"
BAD_WIDTH = "wrong number of columns"
NO_FIELD = "no text field"
TOO_LONG = "record too long"

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonLines:
    """A line is an object, of which `field` is the text; blank lines are no records.

    Of a field given twice the last counts. A line of more than `RECORD_BYTES` is rejected unread.
    """

    def __init__(self, field: str) -> None:
        self._field = field
        self._lines = lines()

    def pieces(self, file: BinaryIO, file_id: str, size: int, limit: int) -> list[Piece]:
        return self._lines.pieces(file, file_id, size, limit)

    def documents(self, file: BinaryIO, file_id: str, piece: Piece) -> Iterator[Content | Rejected]:
        row = 0
        for number, blocks in enumerate(self._lines.texts(file, file_id, piece)):
            line = gather(blocks, RECORD_BYTES)
            if line is None:
                found = TOO_LONG
            else:
                if number == 0 and piece.begin == 0:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if not line or line.isspace():
                    continue
                found = self._text(line)
            if isinstance(found, bytes):
                yield Content(row, None, in_blocks(found))
            else:
                yield Rejected(row, found)
            row += 1

    def _text(self, line: bytes) -> bytes | str:
        """The text of one record, or why it has none."""
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError:
            return BAD_UNICODE
        except (ValueError, RecursionError):
            return BAD_JSON
        if not isinstance(record, dict) or self._field not in record:
            return NO_FIELD
        text = record[self._field]
        if not isinstance(text, str):
            return BAD_TEXT
        try:
            return text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, as an escape
            return BAD_UNICODE


class Csv:
    """Columns are separated by commas and named by the first row; `field` is the text.

    Quoted texts may hold commas, line ends and doubled quotes. What cannot be parsed without doubt
    is refused, because all rows behind it would be guesses.
    """

    def __init__(self, field: str) -> None:
        self._field = field

    def pieces(self, file: BinaryIO, file_id: str, size: int, limit: int) -> list[Piece]:
        return [Piece(0, size)]

    def documents(self, file: BinaryIO, file_id: str, piece: Piece) -> Iterator[Content | Rejected]:
        source = _CsvLines(read_unpacked(file, file_id, piece.end), file_id)
        # The limit is the process's; ours, of whole records, is the one that holds.
        csv.field_size_limit(max(csv.field_size_limit(), 2 * RECORD_BYTES))
        rows = csv.reader(source, strict=True)
        header = self._next(rows, source)
        if header is None:
            return
        column = self._column(header, file_id)
        row = 0
        while (values := self._next(rows, source)) is not None:
            if not values:  # a blank line
                continue
            if len(values) == len(header):
                text = values[column].encode(errors="surrogateescape")
                yield Content(row, None, in_blocks(text))
            else:
                yield Rejected(row, BAD_WIDTH)
            row += 1

    def _column(self, header: list[str], file_id: str) -> int:
        if header.count(self._field) != 1:
            names = ", ".join(header).encode(errors="replace").decode()
            raise CorpusError(
                f"{file_id}: {'no' if self._field not in header else 'not one'} column is "
                f"named {self._field!r}: the columns are {names[:500]}; set the field to one"
            )
        return header.index(self._field)

    @staticmethod
    def _next(rows: Iterator[list[str]], source: "_CsvLines") -> list[str] | None:
        source.record_begins()
        try:
            return next(rows, None)
        except csv.Error as error:
            raise CorpusError(
                f"{source.file_id}: line {source.begin:,} begins a record that is not CSV "
                f"({error}): mend the quotes there or leave the file out"
            ) from None


class _CsvLines:
    """The lines of a CSV file for Python's reader, of bounded records."""

    def __init__(self, blocks: Iterator[bytes], file_id: str) -> None:
        self.file_id = file_id
        self.begin = 1
        """The line, counted from 1, on which the present record begins."""
        self._number, self._held = 0, 0
        self._blocks = blocks

    def record_begins(self) -> None:
        self.begin, self._held = self._number + 1, 0

    def __iter__(self) -> Iterator[str]:
        for run in Splitter(self._blocks, b"\n").runs():
            for line in run if isinstance(run, list) else (self._join(run),):
                if self._number == 0:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                self._number += 1
                self._held += len(line) + 1
                if self._held > RECORD_BYTES:
                    raise self._too_long()
                # What is not UTF-8 comes back as it was when the text is encoded again.
                yield line.decode(errors="surrogateescape") + "\n"

    def _join(self, blocks: Iterator[bytes]) -> bytes:
        line = gather(blocks, RECORD_BYTES)
        if line is None:
            raise self._too_long()
        return line

    def _too_long(self) -> CorpusError:
        return CorpusError(
            f"{self.file_id}: the record that begins on line {self.begin:,} is longer than "
            f"{RECORD_BYTES:,} bytes: close its quote there, or leave the file out"
        )


def gather(blocks: Iterator[bytes], limit: int) -> bytes | None:
    """Join blocks; None if they are longer than `limit`, and then no more than that is held."""
    held: list[bytes] = []
    for block in blocks:
        limit -= len(block)
        if limit < 0:
            return None
        held.append(block)
    return b"".join(held)
