"""enwik8 and PG-19 in the layouts in which they are distributed, with their own splits."""

import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

from pipeline.contents import BLOCK_BYTES, Content, Piece, Rejected
from pipeline.errors import CorpusError
from pipeline.splits import SPLITS
from pipeline.streams import read_file
from pipeline.zips import Member, open_zip

ENWIK8_BYTES = 100_000_000
ENWIK8_SPLITS = (90_000_000, 95_000_000)


class ByteSplits:
    """One file, or a zip of it, cut at two offsets into train, validation and test.

    Each of the three is a document named NAME/train and so on, its bytes exactly; one of no bytes
    is left out. Of a zip the member is read whose name is the archive's without .zip, or the only
    one.
    """

    def __init__(self, borders: tuple[int, int], name: str, size: int | None = None) -> None:
        self._borders = borders
        self._name = name
        self._size = size

    def pieces(self, file: BinaryIO, file_id: str, size: int, limit: int) -> list[Piece]:
        return [Piece(0, size)]

    def documents(self, file: BinaryIO, file_id: str, piece: Piece) -> Iterator[Content | Rejected]:
        if file_id.lower().endswith(".zip"):
            archive = open_zip(file, file_id)
            member = _member(archive, file_id)
            self._check_size(member.file_size, f"{file_id}: {member.filename}")
            yield from self._cut(Member(archive, member, file_id), member.file_size, file_id)
        else:
            self._check_size(piece.end, file_id)
            file.seek(0)
            yield from self._cut(file, piece.end, file_id)

    def _cut(self, stream: Member | BinaryIO, size: int, file_id: str) -> Iterator[Content]:
        borders = (0, *self._borders, size)
        for split, begin, end in zip(SPLITS, borders, borders[1:], strict=False):
            if begin < end:
                blocks = _take(stream, end - begin, file_id)
                yield Content(None, split, blocks, f"{self._name}/{split}")
                for _ in blocks:  # what the caller has left
                    pass

    def _check_size(self, size: int, what: str) -> None:
        if self._size not in (None, size):
            raise CorpusError(
                f"{what}: expected {self._size:,} bytes, found {size:,}: fetch enwik8 again, or "
                "give byte_splits for another file"
            )
        if size < self._borders[1]:
            raise CorpusError(
                f"{what}: {size:,} bytes end before the second of byte_splits, "
                f"{self._borders[1]:,}: lower it"
            )


def _take(stream: Member | BinaryIO, count: int, file_id: str) -> Iterator[bytes]:
    while count:
        block = stream.read(min(count, BLOCK_BYTES))
        if not block:
            raise CorpusError(f"{file_id}: ends {count:,} bytes early: fetch it again")
        count -= len(block)
        yield block


def _member(archive: zipfile.ZipFile, file_id: str) -> zipfile.ZipInfo:
    name = PurePosixPath(file_id).name[: -len(".zip")]
    members = [member for member in archive.filelist if not member.is_dir()]
    named = [member for member in members if PurePosixPath(member.filename).name == name]
    for choice in (named, members):
        if len(choice) == 1:
            return choice[0]
    names = ", ".join(ascii(member.filename) for member in members)
    raise CorpusError(f"{file_id}: expected one file named {name!r} in it, found {names[:500]}")


class Pg19:
    """Folders train, validation and test of books NAME.txt; a book is a document.

    What is no .txt file (metadata.csv, a README) is left out. A book elsewhere is refused, because
    its split is not known.
    """

    def pieces(self, file: BinaryIO, file_id: str, size: int, limit: int) -> list[Piece]:
        return [Piece(0, size)]

    def documents(self, file: BinaryIO, file_id: str, piece: Piece) -> Iterator[Content | Rejected]:
        path = PurePosixPath(file_id)
        if path.suffix.lower() != ".txt":
            return
        if path.parent.name not in SPLITS:
            raise CorpusError(
                f"{file_id}: not in a folder train, validation or test: give the folder of PG-19 "
                "that holds the three"
            )
        yield Content(None, path.parent.name, read_file(file))
