"""Plain text: one document a file, a line, or what lies between separators."""

from collections.abc import Iterator
from typing import BinaryIO

from pipeline.contents import Content, Piece, Rejected, cut
from pipeline.streams import Splitter, codec_of, read_file, read_unpacked


class Text:
    """A file is a document: its bytes, exactly."""

    def pieces(self, file: BinaryIO, file_id: str, size: int, limit: int) -> list[Piece]:
        return [Piece(0, size)]

    def documents(self, file: BinaryIO, file_id: str, piece: Piece) -> Iterator[Content | Rejected]:
        yield Content(None, None, read_unpacked(file, file_id, piece.end))


class Separated:
    """A document ends at each separator, which belongs to none; a last one may lack it.

    So an empty text before or between separators is a document (which the filters drop), an empty
    one behind the last is none. A plain file is cut anywhere: a piece owns the documents that begin
    in it, and reads to the end of the last.
    """

    def __init__(self, separator: bytes, *, carriage_returns: bool = False) -> None:
        self._separator = separator
        self._carriage_returns = carriage_returns
        # In the middle of a run such as \n\n\n it cannot be known which two are the separator.
        self._can_be_cut = not any(
            separator.startswith(separator[at:]) for at in range(1, len(separator))
        )

    def pieces(self, file: BinaryIO, file_id: str, size: int, limit: int) -> list[Piece]:
        if codec_of(file_id) is not None or not self._can_be_cut:
            return [Piece(0, size)]
        return cut(size, -(-size // limit))

    def texts(self, file: BinaryIO, file_id: str, piece: Piece) -> Iterator[Iterator[bytes]]:
        """The bytes of the documents of a piece, as blocks."""
        if codec_of(file_id) is not None:
            blocks = read_unpacked(file, file_id, piece.end)
            yield from self._splitter(blocks, 0).texts()
            return
        # A document begins at `begin` if a separator ends there.
        begin = max(piece.begin - len(self._separator), 0) if piece.begin else 0
        splitter = self._splitter(read_file(file, begin), begin)
        if piece.begin:
            splitter.skip(piece.end)
        yield from splitter.texts(piece.end)

    def documents(self, file: BinaryIO, file_id: str, piece: Piece) -> Iterator[Content | Rejected]:
        for row, blocks in enumerate(self.texts(file, file_id, piece)):
            yield Content(row, None, blocks)

    def _splitter(self, blocks: Iterator[bytes], begin: int) -> Splitter:
        return Splitter(
            blocks, self._separator, carriage_returns=self._carriage_returns, begin=begin
        )


def lines() -> Separated:
    """A document is a line, without its \\n or \\r\\n; an empty line is an empty document."""
    return Separated(b"\n", carriage_returns=True)
