"""A document in parts, each a row of a shard, and its words counted once across them."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

PART_BYTES = 4 * 1024 * 1024
"""The most bytes of a document that one row of a shard holds."""

# Bytes whose words are counted at once: what is made of them stays in a core's cache.
_AT_ONCE = 64 * 1024


def cut_parts(blocks: Iterable[bytes], limit: int = PART_BYTES) -> Iterator[bytes]:
    """Cut a document, given in blocks, in parts of at most `limit` bytes; joined they are it.

    A part ends behind the last newline that fits; where none fits, at the last border of a UTF-8
    character, or after `limit` bytes of what is not UTF-8. How the blocks are cut changes nothing.
    Holds a part and a block in memory.
    """
    blocks = iter(blocks)
    first, second = next(blocks, b""), next(blocks, None)
    if second is None and len(first) <= limit:  # most documents: as it is, without a copy
        if first:
            yield first
        return
    pending = bytearray(first)
    for block in itertools.chain([second or b""], blocks):
        pending += block
        while len(pending) > limit:
            cut = _cut(pending, limit)
            yield bytes(pending[:cut])
            del pending[:cut]
    if pending:
        yield bytes(pending)


def _cut(data: bytearray, limit: int) -> int:
    """Where to cut data that is longer than `limit`."""
    newline = data.rfind(b"\n", 0, limit)
    if newline >= 0:
        return newline + 1
    # A UTF-8 character is a first byte and at most three bytes 10xxxxxx.
    for cut in range(limit, max(limit - 4, 0), -1):
        if data[cut] & 0xC0 != 0x80:
            return cut
    return limit


class WordCounter:
    """Counts the words of a document that comes in parts.

    A word is a run of bytes other than ASCII white space, which is defined for any bytes and does
    not change with the version of Unicode. One that goes on in the next part counts in the first.
    """

    def __init__(self) -> None:
        self._inside = False

    def count(self, part: bytes) -> int:
        """The words that begin in this part, which follows the parts counted before."""
        values = np.frombuffer(part, np.uint8)
        begins = 0
        for at in range(0, len(values), _AT_ONCE):
            some = values[at : at + _AT_ONCE]
            outside = some - np.uint8(9) < 5  # \t \n \v \f \r; what is smaller wraps around
            outside |= some == 32
            begins += int(np.count_nonzero(outside[:-1] > outside[1:]))
            begins += int(not outside[0] and not self._inside)
            self._inside = not outside[-1]
        return begins
