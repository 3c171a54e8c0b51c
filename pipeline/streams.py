"""Read a file as blocks of bytes, unpacked where its name says so, and split it at a separator."""

from collections.abc import Iterator
from typing import BinaryIO

from pipeline.contents import BLOCK_BYTES, in_blocks
from pipeline.errors import CorpusError

CODECS = {".gz": "gzip", ".zst": "zstd"}
"""Endings of compressed files, in lower case."""

_PACKED = tuple(CODECS)

EXPANSION = 1000
"""What is packed may become this many times longer, or `EXPANSION_FLOOR`."""

EXPANSION_FLOOR = 64 * 1024 * 1024


def codec_of(file_id: str) -> str | None:
    """The codec that a file's name speaks of, if any."""
    name = file_id.lower()
    if not name.endswith(_PACKED):
        return None
    return next(codec for ending, codec in CODECS.items() if name.endswith(ending))


def check_expansion(file_id: str, expanded: int, packed: int) -> None:
    """Refuse what unpacks to absurdly more than it was: gzip's own limit is 1,032-fold."""
    if expanded > max(EXPANSION_FLOOR, EXPANSION * packed):
        raise CorpusError(
            f"{file_id}: {packed:,} packed bytes become more than {expanded - 1:,}: if that is "
            "meant, unpack the file and give what was in it; else leave it out"
        )


def read_file(
    file: BinaryIO, begin: int = 0, end: int | None = None, first: int = BLOCK_BYTES
) -> Iterator[bytes]:
    """The bytes of a file from `begin` to `end`, or to its end, as they are.

    `first` is the most that is read at first: for a small file one more than it has, since to make
    room for a whole block takes longer than to read 16 KiB.
    """
    file.seek(begin)
    wanted = min(first, BLOCK_BYTES)
    while True:
        if end is not None:
            wanted = min(wanted, end - begin)
        block = file.read(wanted)
        if block:
            yield block
        if len(block) < wanted or not wanted:  # a buffered file gives less at its end alone
            return
        begin += wanted
        wanted = BLOCK_BYTES


def read_unpacked(file: BinaryIO, file_id: str, size: int) -> Iterator[bytes]:
    """The bytes of a whole file of `size` bytes, unpacked if its name ends in .gz or .zst.

    Raises `CorpusError` for a packed file that is damaged, cut short or expands absurdly.
    """
    codec = codec_of(file_id)
    if codec is None:
        return read_file(file, first=size + 1)
    return _unpacked(file, file_id, size, codec)


def _unpacked(file: BinaryIO, file_id: str, size: int, codec: str) -> Iterator[bytes]:
    import pyarrow as pa

    file.seek(0)
    # Arrow's C++ reads several streams that were joined, as cat and pigz do.
    stream = pa.CompressedInputStream(pa.PythonFile(_Borrowed(file), mode="r"), codec)
    expanded = 0
    while True:
        try:
            block = stream.read(BLOCK_BYTES)
        except OSError as error:
            if error.errno is not None:  # of the file, not of the codec
                raise
            raise CorpusError(
                f"{file_id}: not a whole {codec} file ({error}): fetch it again or leave it out"
            ) from None
        if not block:
            return
        expanded += len(block)
        check_expansion(file_id, expanded, size)
        yield block


class _Borrowed:
    """A file that Arrow may read and forget, but not close."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        return self._file.read(size)

    def close(self) -> None:
        pass


class Splitter:
    """The texts between the separators of a stream, each as blocks, in bounded memory.

    A separator ends a text; behind the last one there is a text only if there are bytes. With
    `carriage_returns`, one that stands before a separator belongs to it. The blocks of a text are
    to be consumed before the next text is asked for; what is left of them is skipped.
    """

    def __init__(
        self,
        blocks: Iterator[bytes],
        separator: bytes,
        *,
        carriage_returns: bool = False,
        begin: int = 0,
    ) -> None:
        self._blocks = blocks
        self._separator = separator
        self._carriage_returns = carriage_returns
        # Read and not yet handed on: `_held` from `_at`, which lies `_begin + _at` in the stream.
        self._held, self._at, self._begin = b"", 0, begin

    def skip(self, end: int) -> None:
        """Go behind the next separator, or to where none that lies before `end` can follow."""
        for _ in self._text():
            if self._begin + self._at >= end:
                return

    def texts(self, end: int | None = None) -> Iterator[Iterator[bytes]]:
        """The texts that begin before position `end` of the stream."""
        for run in self.runs(end):
            if isinstance(run, list):
                yield from map(in_blocks, run)
            else:
                yield run

    def runs(self, end: int | None = None) -> Iterator[list[bytes] | Iterator[bytes]]:
        """The same texts: lists of short ones as they are found, and each long one as blocks."""
        while end is None or self._begin + self._at < end:
            begin = self._begin + self._at
            found = self._held[self._at :].split(self._separator)
            rest = found.pop()
            self._begin = begin + len(self._held) - self._at - len(rest)
            self._held, self._at = rest, 0
            if found:
                if end is not None and self._begin > end:
                    found = self._before(found, end - begin)
                if self._carriage_returns:
                    found = [text.removesuffix(b"\r") for text in found]
                yield found
            elif len(rest) >= BLOCK_BYTES:
                text = self._text()
                yield text
                for _ in text:
                    pass
            elif not self._read():
                if rest:
                    yield [rest]
                return

    def _before(self, texts: list[bytes], length: int) -> list[bytes]:
        """Those of adjoining texts that begin within the first `length` bytes."""
        at, kept = 0, 0
        while at < length:
            at += len(texts[kept]) + len(self._separator)
            kept += 1
        return texts[:kept]

    def _text(self) -> Iterator[bytes]:
        """One text, block by block; `_at` is behind what was yielded."""
        separator = self._separator
        while True:
            found = self._held.find(separator, self._at)
            if found >= 0:
                text = self._held[self._at : found]
                self._at = found + len(separator)
                yield from in_blocks(text.removesuffix(b"\r") if self._carriage_returns else text)
                return
            # What may be the beginning of a separator stays.
            safe = len(self._held) - (len(separator) - 1) - self._carriage_returns
            if safe > self._at:
                text = self._held[self._at : safe]
                self._at = safe
                yield from in_blocks(text)
            if not self._read():
                text = self._held[self._at :]
                self._at = len(self._held)
                yield from in_blocks(text)
                return

    def _read(self) -> bool:
        block = next(self._blocks, b"")
        if block:
            self._held, self._begin, self._at = (
                self._held[self._at :] + block,
                self._begin + self._at,
                0,
            )
        return bool(block)
