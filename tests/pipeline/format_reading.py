"""Read whole files through a format, as the tests of formats do."""

import io
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pipeline.contents import BLOCK_BYTES, Content, Piece, Rejected
from pipeline.formats import FormatSettings, make_format


class Found(NamedTuple):
    """A document or a rejected record, read."""

    row: int | None
    text: bytes | None
    reason: str | None
    split: str | None = None
    name: str | None = None


def pieces_of(data: bytes, file_id: str, limit: int = 2**40, **settings: Any) -> list[Piece]:
    form = make_format(FormatSettings(**settings), file_id)
    return form.pieces(io.BytesIO(data), file_id, len(data), limit)


def read(data: bytes, file_id: str, limit: int = 2**40, **settings: Any) -> list[list[Found]]:
    """What is in each piece; one stream serves all, as nothing may rest on its position."""
    form = make_format(FormatSettings(**settings), file_id)
    file = io.BytesIO(data)
    pieces = form.pieces(file, file_id, len(data), limit)
    assert pieces
    assert pieces[0].begin == 0
    assert all(a.end == b.begin for a, b in pairwise(pieces))
    found = [[_found(item) for item in form.documents(file, file_id, p)] for p in pieces]
    assert not file.closed
    return found


def _found(item: Content | Rejected) -> Found:
    if isinstance(item, Rejected):
        return Found(item.row, None, item.reason)
    blocks = list(item.blocks)
    assert all(0 < len(block) <= BLOCK_BYTES for block in blocks)
    return Found(item.row, b"".join(blocks), None, item.split, item.name)


def texts(data: bytes, file_id: str, limit: int = 2**40, **settings: Any) -> list[bytes | str]:
    """The texts, or reasons, of all pieces; checks that rows count from 0 in each piece."""
    found = read(data, file_id, limit, **settings)
    for piece in found:
        assert [item.row for item in piece] in (list(range(len(piece))), [None] * len(piece))
    return [
        item.text if item.text is not None else str(item.reason)
        for piece in found
        for item in piece
    ]


def lengths(path: Path, **settings: Any) -> list[int | str]:
    """The lengths of a file's texts, or reasons, without ever holding one."""
    form = make_format(FormatSettings(**settings), path.name)
    with path.open("rb") as file:
        [piece] = form.pieces(file, path.name, path.stat().st_size, 2**40)
        return [
            item.reason if isinstance(item, Rejected) else sum(map(len, item.blocks))
            for item in form.documents(file, path.name, piece)
        ]


def peak_memory(call: Callable[[], object]) -> int:
    """The most bytes that Python held during a call, beyond those it held before."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


class CountingFile(io.BytesIO):
    """Counts the bytes that are read from it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.n_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.n_read += len(data)
        return data


def open_bytes(data: bytes) -> Callable[[], BinaryIO]:
    return lambda: io.BytesIO(data)


def contents(file: BinaryIO, file_id: str, **settings: Any) -> Iterator[Content]:
    """The documents of a file of one piece, unread."""
    size = file.seek(0, io.SEEK_END)
    form = make_format(FormatSettings(**settings), file_id)
    [piece] = form.pieces(file, file_id, size, 2**40)
    for item in form.documents(file, file_id, piece):
        assert isinstance(item, Content)
        yield item


def chunks(unit: bytes, count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield unit


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def damage(data: bytes) -> list[bytes]:
    """What a zip archive is not, or no longer."""
    middle = len(data) // 2
    flipped = bytearray(data)
    flipped[1000] ^= 255
    return [data[:-30], data[:middle], b"", b"no archive", bytes(flipped)]
