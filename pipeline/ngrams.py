"""Hashes of a text's word n-grams, block by block: what near copies and held-out text are found by.

A word is a run of letters, digits and bytes above 0x7f, in lower case; all other ASCII, general and
Chinese/Japanese punctuation separate words. A character of a script that is written without spaces
(Chinese, Japanese, Thai, Lao, Burmese, Khmer) is a word of its own. Any byte string has hashes;
bytes that are not UTF-8 are letters. The hashes are a frozen function of the bytes: they depend on
no block border, machine, version of Python or of Unicode (golden vectors hold them).

How it is fast: a hash is sum(byte[j] * r**j) mod 2**64 from the word's start, r odd. So one running
sum over a piece gives the hash of every word in it: a difference of two sums, times the inverse of
r**start. The n-grams are made from the words' hashes the same way.
"""

import numpy as np
import numpy.typing as npt

# Bytes handled at once: few calls, and the arrays of a piece stay in the cache (5 MB of Python
# sources on a busy core: 16 Ki 77 MB/s, 64 Ki 185, 256 Ki 122).
_PIECE = 1 << 16
MOST_WORDS = 1000
"""The longest n-gram."""

_MASK = (1 << 64) - 1
_WORD_BASE = 0x9E3779B97F4A7C15
_NGRAM_BASE = 0xD1342543DE82EF95


def _powers(base: int, count: int) -> npt.NDArray[np.uint64]:
    values = np.full(count, base, dtype=np.uint64)
    values[0] = 1
    return np.multiply.accumulate(values)


_SIZE = _PIECE + MOST_WORDS + 8
_BYTE_POWERS = _powers(_WORD_BASE, _SIZE)
_BYTE_INVERSES = _powers(pow(_WORD_BASE, -1, 1 << 64), _SIZE)
_NGRAM_POWERS = _powers(_NGRAM_BASE, _SIZE)
_NGRAM_INVERSES = _powers(pow(_NGRAM_BASE, -1, 1 << 64), _SIZE)

# ASCII letters to lower case, other bytes of words to themselves, separators to 0.
_FOLD = bytes(
    byte if byte >= 0x80 else ord(chr(byte).lower()) if chr(byte).isalnum() else 0
    for byte in range(256)
)
_SEPARATORS = ((0x80, 0xBF), (0x2000, 0x206F), (0x3000, 0x303F), (0xFF00, 0xFF0F), (0xFF1A, 0xFF20))
_UNSPACED = ((0xE00, 0xEFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x9FFF), (0xF900, 0xFAFF))
# Where lower case has been the same since Unicode 7 (2014); letters that came later keep theirs.
_CASED = ((0xC0, 0x587), (0x1E00, 0x1FFF))


def _tables() -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]:
    """For each code point of 2 or 3 bytes: its lower case (0 for a separator), and if it stands
    alone as a word."""
    lower, alone = np.arange(1 << 16, dtype=np.uint16), np.zeros(1 << 16, dtype=np.bool_)
    for first, last in _CASED:
        for point in range(first, last + 1):
            small = chr(point).lower()
            # As many bytes as before, so that nothing moves.
            if len(small) == 1 and len(small.encode()) == len(chr(point).encode()):
                lower[point] = ord(small)
    for first, last in _SEPARATORS:
        lower[first : last + 1] = 0
    for first, last in _UNSPACED:
        alone[first : last + 1] = True
    return lower, alone


_LOWER, _ALONE = _tables()
_NONE = np.empty(0, dtype=np.uint64)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Spread each value over all 64 bits, one to one (the finish of splitmix64); in place."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    values ^= values >> np.uint64(31)
    return values


class NgramHasher:
    """The n-grams of one document, which is given in blocks of any length."""

    def __init__(self, words: int) -> None:
        if not 1 <= words <= MOST_WORDS:
            raise ValueError(f"words: must be 1 to {MOST_WORDS}, got {words}")
        self._n = words
        self._rest = b""  # may be the beginning of a character
        self._open: tuple[int, int] | None = None  # the last word: its sum, r ** its length
        self._in_word = False  # the last byte was of a word
        self._recent = _NONE  # hashes of the last n - 1 words
        self._any = False

    def update(self, block: bytes) -> npt.NDArray[np.uint64]:
        """The n-grams that end in `block`: one hash each, in their order."""
        found = []
        for at in range(0, len(block), _PIECE):
            piece = self._rest + block[at : at + _PIECE]
            cut = next(
                (i for i in range(max(0, len(piece) - 2), len(piece)) if piece[i] > 0xBF), None
            )
            self._rest = b"" if cut is None else piece[cut:]
            found.append(self._ngrams(self._words(piece[:cut])))
        return found[0] if len(found) == 1 else np.concatenate([_NONE, *found])

    def finish(self, *, short: bool = False) -> npt.NDArray[np.uint64]:
        """The n-grams that the end of the document completes.

        With `short`, a document of 1 to n - 1 words has one: all its words.
        """
        # A character that was cut off is folded by itself.
        words = self._words(self._rest)
        if self._open is not None:
            words = np.append(words, _mix(np.array([self._open[0]], dtype=np.uint64)))
        found = self._ngrams(words)
        if short and not self._any and len(self._recent):
            whole = np.cumsum(self._recent * _NGRAM_POWERS[: len(self._recent)])
            return _mix(whole[-1:])
        return found

    def _words(self, piece: bytes) -> npt.NDArray[np.uint64]:
        """The hashes of the words that `piece` is seen to end, by the start of another."""
        n = len(piece)
        if n == 0:
            return _NONE
        folded = np.frombuffer(piece.translate(_FOLD), dtype=np.uint8)
        alone = None
        if not piece.isascii():
            folded, alone = _fold_characters(folded)
        word = folded != 0
        starts = np.empty(n, dtype=np.bool_)
        starts[0] = word[0] and not self._in_word
        np.greater(word[1:], word[:-1], out=starts[1:])
        if alone is not None:
            starts[alone] = word[alone]
            # What follows such a character is another word.
            after = alone[alone < n - 3] + 3
            starts[after] = word[after]
        self._in_word = bool(word[-1]) and not (alone is not None and n in alone[-1:] + 3)
        sums = np.empty(n + 1, dtype=np.uint64)
        sums[0] = 0
        np.multiply(folded, _BYTE_POWERS[:n], out=sums[1:])
        np.cumsum(sums[1:], out=sums[1:])
        at = np.flatnonzero(starts)
        first = int(at[0]) if len(at) else n
        ended = _NONE
        if self._open is not None:
            total, power = self._open
            total = (total + power * int(sums[first])) & _MASK
            self._open = (total, power * int(_BYTE_POWERS[n]) & _MASK)
            ended = np.array([total], dtype=np.uint64)
        if len(at) == 0:
            return _NONE
        before = sums[at]
        inside = np.diff(before, append=sums[n:])
        inside *= _BYTE_INVERSES[at]
        self._open = (int(inside[-1]), int(_BYTE_POWERS[n - int(at[-1])]))
        return _mix(np.concatenate([ended, inside[:-1]]))

    def _ngrams(self, words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """The n-grams that end in these words; the words' hashes are mixed."""
        known = np.concatenate([self._recent, words]) if len(self._recent) else words
        count = len(known) - self._n + 1
        if count < 1:
            self._recent = known
            return _NONE
        self._recent = known[count:]
        self._any = True
        sums = np.zeros(len(known) + 1, dtype=np.uint64)
        np.cumsum(known * _NGRAM_POWERS[: len(known)], out=sums[1:])
        return _mix((sums[self._n :] - sums[:count]) * _NGRAM_INVERSES[:count])


def _fold_characters(
    folded: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.intp]]:
    """Lower case and separators above ASCII; also where the characters are that stand alone.

    A character that goes on after the last byte is not valid UTF-8: `update` cuts before leads.
    """
    n = len(folded)
    folded = np.append(folded, np.zeros(3, dtype=np.uint8))
    leads = np.flatnonzero(folded > 0xC1)
    point = folded[leads].astype(np.int32)
    second, third = folded[leads + 1], folded[leads + 2]
    goes_on = (second & 0xC0) == 0x80
    two = leads[goes_on & (point < 0xE0)]
    three = leads[goes_on & (point >= 0xE0) & (point < 0xF0) & ((third & 0xC0) == 0x80)]

    points = (folded[two].astype(np.int32) & 0x1F) << 6 | folded[two + 1] & 0x3F
    small = _LOWER[points]
    folded[two] = np.where(small == 0, 0, 0xC0 | small >> 6)
    folded[two + 1] = np.where(small == 0, 0, 0x80 | small & 0x3F)

    points = (
        (folded[three].astype(np.int32) & 0x0F) << 12
        | (folded[three + 1].astype(np.int32) & 0x3F) << 6
        | folded[three + 2] & 0x3F
    )
    small = _LOWER[points]
    folded[three] = np.where(small == 0, 0, 0xE0 | small >> 12)
    folded[three + 1] = np.where(small == 0, 0, 0x80 | small >> 6 & 0x3F)
    folded[three + 2] = np.where(small == 0, 0, 0x80 | small & 0x3F)
    return folded[:n], three[_ALONE[points]]
