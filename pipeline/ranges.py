"""Cut the files of a corpus in *ranges*, the units of work, and read one range's records.

A range is a run of pieces of files in the order of ids; its borders follow the sources and never
what survives the filters. Both passes of `prepare` read the same ranges in the same way.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline.formats import Content, FormatSettings, Piece, Rejected, make_format
from pipeline.sources import SourceFile, unreadable
from pipeline.text_formats import Text


class FilePiece(NamedTuple):
    """A run of a file that one task reads."""

    file: SourceFile
    piece: Piece
    size: int
    """About so many bytes of the file."""


class Range(NamedTuple):
    """A run of pieces, the work of one task."""

    pieces: list[FilePiece]

    @property
    def size(self) -> int:
        """About so many source bytes."""
        return sum(piece.size for piece in self.pieces)


class Record(NamedTuple):
    """What a file holds at one place: a document, or something that cannot be one."""

    piece: int
    """Number of its piece in the range."""
    file: SourceFile
    row: int
    """Ordinal in its piece; -1 where the file is the document."""
    item: Content | Rejected


def shard_bytes_for(total: int) -> int:
    """Source bytes of a range, for a corpus of so many: a power of two from 2 MiB to 256 MiB.

    Some 64 ranges keep all cores of a machine busy; larger ones keep the shards of a large corpus
    countable. It depends on nothing but the corpus, so that its bytes do.
    """
    size = 2 * 2**20
    while size < 256 * 2**20 and size * 64 < total:
        size *= 2
    return size


def cut_ranges(
    files: Sequence[SourceFile], settings: FormatSettings, shard_bytes: int
) -> list[Range]:
    """Cut files, in the order of their ids, in pieces and those in runs of about `shard_bytes`.

    A range ends as soon as it holds so many bytes. Raises `CorpusError` for a file that is not of
    the format.
    """
    ranges, held = [Range([])], 0
    for file in files:
        for piece in _pieces(file, settings, shard_bytes):
            if held >= shard_bytes:
                ranges.append(Range([]))
                held = 0
            ranges[-1].pieces.append(piece)
            held += piece.size
    return [range_ for range_ in ranges if range_.pieces]


def _pieces(file: SourceFile, settings: FormatSettings, limit: int) -> list[FilePiece]:
    form = make_format(settings, file.id)
    if isinstance(form, Text):  # nothing to look up, and in an object store opening takes a while
        return [FilePiece(file, Piece(0, file.size), file.size)]
    with file.open() as opened:
        pieces = form.pieces(opened, file.id, file.size, limit)
    whole = sum(piece.end - piece.begin for piece in pieces) or 1
    return [
        FilePiece(file, piece, file.size * (piece.end - piece.begin) // whole) for piece in pieces
    ]


def read_range(range_: Range, settings: FormatSettings) -> Iterator[Record]:
    """The records of a range in order; the blocks of one are read before the next is asked for.

    Raises `CorpusError` naming the file for one that cannot be read or is not of the format.
    """
    for number, (file, piece, _) in enumerate(range_.pieces):
        form = make_format(settings, file.id)
        try:
            with file.open() as opened:
                for item in form.documents(opened, file.id, piece):
                    row = -1 if item.row is None else item.row
                    yield Record(number, file, row, item)
        except OSError as error:
            raise unreadable(file.path, error) from None
