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
    """Counts the words of documents that come in parts.

    A word is a run of bytes other than ASCII white space, which is defined for any bytes and does
    not change with the version of Unicode. One that goes on in the next part counts in the first.
    """

    def __init__(self) -> None:
        # Made once: memory for each document anew takes as long as to count its words.
        self._scratch = np.empty(_AT_ONCE, np.uint8)
        self._outside = np.empty(1 + _AT_ONCE, np.bool_)  # of a word, each byte and the one before
        self._begins = np.empty(_AT_ONCE, np.bool_)

    def count(self, part: bytes, *, goes_on: bool = False) -> int:
        """The words that begin in a part, the first of a document or, if it `goes_on`, the one
        behind the part counted before."""
        values = np.frombuffer(part, np.uint8)
        if not goes_on:
            self._outside[0] = True
        words = 0
        for at in range(0, len(values), _AT_ONCE):
            some = values[at : at + _AT_ONCE]
            n = len(some)
            # \t \n \v \f \r are 9 to 13; what is smaller wraps around.
            scratch, begins = self._scratch[:n], self._begins[:n]
            before, outside = self._outside[:n], self._outside[1 : n + 1]
            np.less(np.subtract(some, 9, out=scratch), 5, out=outside)
            np.logical_or(outside, np.equal(some, 32, out=begins), out=outside)
            words += int(np.count_nonzero(np.greater(before, outside, out=begins)))
            self._outside[0] = self._outside[n]
        return words
