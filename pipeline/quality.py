"""A few cheap signs that a document is not prose or code, after those of Gopher and C4.

They hold for any language: a character of a script without spaces counts as a word. The limits
are wide, because a wrong drop is worse than a page of noise: they drop none of Shakespeare's plays
and 2 in 100 files of Python's standard library (tables, generated tests). All is counted block by
block in bounded memory.
"""

import zlib
from collections import Counter

import numpy as np

FEW_LETTERS = "few letters"
"""Under half of the characters that are not white space are letters."""
LONG_WORDS = "long words"
"""Words have over 20 characters on average: encoded data, addresses, minified code."""
HASH_SIGNS = "hash signs"
"""There is a `#` for under 4 words."""
CUT_LINES = "cut lines"
"""Over 3 in 10 lines end with an ellipsis: a list of teasers."""
REPEATED_LINES = "repeated lines"
"""Over half of the bytes are in lines that came before in the document."""

_WHITE = b" \t\n\r\v\f"
_LETTERS = np.array([(chr(b).isalpha() and b < 0x80) or b > 0xBF for b in range(256)])
_GOING_ON = np.array([0x80 <= b < 0xC0 for b in range(256)])
_IS_WHITE = np.array([b in _WHITE for b in range(256)])
# First bytes of characters from scripts without spaces, near enough: U+3000 to U+9FFF.
_UNSPACED = slice(0xE3, 0xEA)
_BLACK = bytes(byte not in _WHITE for byte in range(256))
# How a line ends that is cut off.
_ELLIPSES = (b"...\n", b"...\r\n", "\u2026\n".encode(), "\u2026\r\n".encode())
_LONGEST = 5
# Distinct lines that are remembered: past them, only every second, fourth... by its checksum. Which
# ones are left at the end does not depend on the blocks.
_MOST_LINES = 1 << 16


class Quality:
    """The signs of one document, which is given in blocks of any length."""

    def __init__(self) -> None:
        self._bytes = np.zeros(256, dtype=np.int64)
        self._words = 0
        self._in_word = np.uint8(0)
        self._end = b""  # the last bytes
        self._lines = self._cut_lines = 0
        self._open_line = (0, 0)  # checksum and length of the line that has not ended
        # How often each (checksum, length) came of those lines whose checksum has no bit of `mask`.
        self._times: Counter[tuple[int, int]] = Counter()
        self._mask = 0

    def update(self, block: bytes) -> None:
        """Take the next block."""
        if not block:
            return
        self._bytes += np.bincount(np.frombuffer(block, dtype=np.uint8), minlength=256)
        in_word = np.frombuffer(block.translate(_BLACK), dtype=np.uint8)
        self._words += np.count_nonzero(in_word[1:] > in_word[:-1]) + (in_word[0] > self._in_word)
        self._in_word = in_word[-1]
        for ending in _ELLIPSES:
            overlap = self._end[1 - len(ending) :] + block[: len(ending) - 1]
            self._cut_lines += block.count(ending) + overlap.count(ending)
        self._end = (self._end + block[-_LONGEST:])[-_LONGEST:]
        first, *lines = block.split(b"\n")
        checksum, length = self._open_line
        checksum, length = zlib.crc32(first, checksum), length + len(first)
        if lines:
            last = lines.pop()
            self._take_lines([checksum, *map(zlib.crc32, lines)], [length, *map(len, lines)])
            checksum, length = zlib.crc32(last), len(last)
        self._open_line = checksum, length

    def fault(self) -> str | None:
        """What is wrong with the document, which has ended; `None` if nothing is."""
        self._take_lines([self._open_line[0]], [self._open_line[1]])
        lines = [(length, times) for (_, length), times in self._times.items() if length > 1]
        n_bytes = sum(length * times for length, times in lines)
        first_bytes = sum(length for length, _ in lines)
        cut_lines = self._cut_lines + (self._end + b"\n").endswith(_ELLIPSES)
        characters = int(self._bytes[~(_IS_WHITE | _GOING_ON)].sum())
        words = self._words + int(self._bytes[_UNSPACED].sum())
        if 2 * self._bytes[_LETTERS].sum() < characters:
            return FEW_LETTERS
        if characters > 20 * words:
            return LONG_WORDS
        if 4 * self._bytes[ord("#")] > words:
            return HASH_SIGNS
        if 10 * cut_lines > 3 * self._lines:
            return CUT_LINES
        if 2 * first_bytes < n_bytes:
            return REPEATED_LINES
        return None

    def _take_lines(self, checksums: list[int], lengths: list[int]) -> None:
        # Not those that are empty or have one byte, a CR for instance.
        self._lines += len(lengths) - lengths.count(0) - lengths.count(1)
        mask, pairs = self._mask, zip(checksums, lengths, strict=True)
        self._times.update((line for line in pairs if not line[0] & mask) if mask else pairs)
        while len(self._times) > _MOST_LINES:
            self._mask = 2 * self._mask + 1
            for line in [line for line in self._times if line[0] & self._mask]:
                del self._times[line]
