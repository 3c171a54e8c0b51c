"""Cut the files of a corpus in *ranges*, the units of work, and read one range's records.

A range is a run of pieces of files in the order of ids; its borders follow the sources and never
what survives the filters. Both passes of `prepare` read the same ranges in the same way.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.formats import Content, FormatSettings, Piece, Rejected, make_format
from pipeline.sources import Listing, SourceFile, unreadable
from pipeline.text_formats import Text


class FilePiece(NamedTuple):
    """A run of a file that one task reads."""

    file: SourceFile
    piece: Piece


class Range(NamedTuple):
    """A run of pieces, the work of one task."""

    files: Listing
    cuts: npt.NDArray[np.int64]
    """[piece, (number of its file, begin, end)]: as objects they would take more memory than all
    else that is known of a small file."""
    size: int
    """About so many source bytes."""

    @property
    def pieces(self) -> list[FilePiece]:
        """In order; made anew at each call."""
        files = list(self.files)
        return [FilePiece(files[n], Piece(begin, end)) for n, begin, end in self.cuts.tolist()]


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


def cut_ranges(files: Listing, settings: FormatSettings, shard_bytes: int) -> list[Range]:
    """Cut files, in the order of their ids, in pieces and those in runs of about `shard_bytes`.

    A range ends as soon as it holds so many bytes. Raises `CorpusError` for a file that is not of
    the format.
    """
    ranges, cuts, held = [], [], 0
    for number, file in enumerate(files):
        pieces = _pieces(file, settings, shard_bytes)
        whole = sum(end - begin for begin, end in pieces) or 1
        for begin, end in pieces:
            if held >= shard_bytes:
                ranges.append(_range(files, cuts, held))
                cuts, held = [], 0
            cuts.append((number, begin, end))
            held += file.size * (end - begin) // whole
    return [*ranges, _range(files, cuts, held)] if cuts else ranges


def _range(files: Listing, cuts: list[tuple[int, int, int]], size: int) -> Range:
    first, last = cuts[0][0], cuts[-1][0]
    return Range(files[first : last + 1], np.array(cuts, np.int64) - [first, 0, 0], size)


def _pieces(file: SourceFile, settings: FormatSettings, limit: int) -> list[Piece]:
    form = make_format(settings, file.id)
    if isinstance(form, Text):  # nothing to look up, and in an object store opening takes a while
        return [Piece(0, file.size)]
    with file.open() as opened:
        return form.pieces(opened, file.id, file.size, limit)


def read_range(range_: Range, settings: FormatSettings) -> Iterator[Record]:
    """The records of a range in order; the blocks of one are read before the next is asked for.

    Raises `CorpusError` naming the file for one that cannot be read or is not of the format.
    """
    for number, (file, piece) in enumerate(range_.pieces):
        form = make_format(settings, file.id)
        try:
            with file.open() as opened:
                for item in form.documents(opened, file.id, piece):
                    row = -1 if item.row is None else item.row
                    yield Record(number, file, row, item)
        except OSError as error:
            raise unreadable(file.path, error) from None
