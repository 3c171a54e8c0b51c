"""What a format finds in a file: pieces that tasks read, and the documents in them.

Needs neither Ray nor a path: a file is a seekable stream of bytes, local or in an object store.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import BinaryIO, NamedTuple, Protocol

BLOCK_BYTES = 1024 * 1024
"""The most bytes that are read, or handed on, at once."""

RECORD_BYTES = 256 * 1024 * 1024
"""The most bytes of a record that must be parsed as a whole: a line of JSON, a row of CSV."""


class Piece(NamedTuple):
    """A run of a file that one task reads."""

    begin: int
    end: int
    """Bytes, row groups or rows, as the format says; only an empty file's piece is (0, 0)."""


class Content(NamedTuple):
    """One document in a file."""

    row: int | None
    """Ordinal of the record within its piece, dropped records counted; None: no record."""
    split: str | None
    """The split that the corpus itself names (train, validation, test), else None."""
    blocks: Iterator[bytes]
    """Its bytes, in blocks of at most `BLOCK_BYTES`, none for an empty document. They are read as
    they are asked for, and gone once the next document is."""
    name: str | None = None
    """A stable name that replaces the file's id, where the corpus gives a better one."""


class Rejected(NamedTuple):
    """A record that cannot be a document."""

    row: int | None
    reason: str
    """One of few, to be counted."""


class Format(Protocol):
    """How files of one kind become documents.

    `file` is at any position and stays open. Both methods raise `CorpusError`, which names
    `file_id`, for a file that is not what its kind says, and let an `OSError` of a file that cannot
    be read pass to the caller, who knows where it lies.
    """

    def pieces(self, file: BinaryIO, file_id: str, size: int, limit: int) -> list[Piece]:
        """Cut a file of `size` bytes into pieces of about `limit` bytes, at least one.

        A file that cannot be cut is one piece. Reads at most the file's table of contents.
        """
        ...

    def documents(self, file: BinaryIO, file_id: str, piece: Piece) -> Iterator[Content | Rejected]:
        """The documents of one piece, in the order of the file, in bounded memory."""
        ...


def in_blocks(data: bytes) -> Iterator[bytes]:
    """What is in memory already, as the blocks of a `Content`."""
    if len(data) <= BLOCK_BYTES:
        return iter((data,) if data else ())
    return (data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES))


def cut(n: int, n_pieces: int) -> list[Piece]:
    """Cut 0..n into at most `n_pieces` pieces of nearly equal length."""
    n_pieces = max(min(n_pieces, n), 1)
    borders = [n * i // n_pieces for i in range(n_pieces + 1)]
    return [Piece(begin, end) for begin, end in pairwise(borders)]
