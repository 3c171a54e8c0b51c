"""The hashes of word n-grams, against splitting and hashing in plain Python."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ngrams import MOST_WORDS, NgramHasher

SEPARATORS = " \n\t.,_-'\"#\0\u00a0«»“”—…\u2028。，「」！？"
ALONE = "中文字一龥ぁんアヶกไທမក豈"
LOWER = {"A": "a", "Z": "z", "É": "é", "Þ": "þ", "Ж": "ж", "Σ": "σ", "Ω": "ω", "Ạ": "ạ"}
# These stay: some have a lower case of another length, or none.
LOWER |= {
    character: character for character in "ab09éßςжŸΩ\u0301×أहिन्दी한글😀" if character not in LOWER
}
LOWER["Ÿ"] = "ÿ"
texts = st.text(alphabet=SEPARATORS + ALONE + "".join(LOWER), max_size=60)


def split(content: bytes, cuts: list[int]) -> list[bytes]:
    borders = sorted({min(cut, len(content)) for cut in cuts} | {0, len(content)})
    return [content[a:b] for a, b in pairwise(borders)]


def hashes(blocks: list[bytes], words: int, *, short: bool = False) -> list[int]:
    hasher = NgramHasher(words)
    parts = [hasher.update(block) for block in blocks]
    return np.concatenate([*parts, hasher.finish(short=short)]).tolist()


def plain_words(text: str) -> list[str]:
    words, word = [], ""
    for character in text:
        if character in SEPARATORS or character in ALONE:
            words += [word] * bool(word) + [character] * (character in ALONE)
            word = ""
        else:
            word += LOWER[character]
    return words + [word] * bool(word)


def mixed(value: int) -> int:
    """The finish of splitmix64."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def polynomial(values: list[int] | bytes, base: int) -> int:
    total, power = 0, 1
    for value in values:
        total, power = (total + value * power) % 2**64, power * base % 2**64
    return mixed(total)


@given(texts, st.integers(1, 4), st.lists(st.integers(0, 200), max_size=8))
def test_words_and_hashes_are_those_of_plain_python(text, n, cuts):
    words = [polynomial(word.encode(), 0x9E3779B97F4A7C15) for word in plain_words(text)]
    grams = [words[at : at + n] for at in range(len(words) - n + 1)]
    expected = [polynomial(gram, 0xD1342543DE82EF95) for gram in grams]
    blocks = split(text.encode(), cuts)
    assert hashes(blocks, n) == expected
    whole = [polynomial(words, 0xD1342543DE82EF95)] if 0 < len(words) < n else []
    assert hashes(blocks, n, short=True) == expected + whole


pieces = st.sampled_from(
    [b"a", b"B ", b"\xe2", b"\x80", b"\xa6", b"\xe4\xb8\xad", b"\xe4", b"\xc3"]
)


@given(
    st.lists(pieces | st.binary(max_size=3), max_size=40).map(b"".join),
    st.lists(st.integers(0, 120), max_size=12),
)
def test_any_bytes_in_any_blocks_have_the_same_hashes(content, cuts):
    assert hashes(split(content, cuts), 2) == hashes([content], 2)
    assert hashes([content[i : i + 1] for i in range(len(content))], 2) == hashes([content], 2)


def test_a_long_document_is_hashed_in_pieces_that_cannot_be_seen():
    rng = np.random.default_rng(0)
    alphabet = ["lorem", "ipsum", "中文", "é", "\n", "—", "a" * 70_000, " "]
    content = "".join(alphabet[i] for i in rng.integers(0, 7, 40)).encode()
    assert len(content) > 300_000
    cuts = rng.integers(0, len(content), 30).tolist()
    assert hashes(split(content, cuts), 3) == hashes([content], 3)
    long_word = b"ab" * 100_000
    expected = polynomial([polynomial(long_word, 0x9E3779B97F4A7C15)], 0xD1342543DE82EF95)
    assert hashes(split(long_word, cuts), 1) == hashes([long_word], 1) == [expected]


def test_golden():
    # Whoever changes these changes what is dropped from every corpus: raise the recipe version.
    assert hashes(["The quick, brown Fox — ÉTÉ 中文!".encode()], 3) == GOLDEN


def test_words_out_of_range():
    for words in (0, MOST_WORDS + 1):
        with pytest.raises(ValueError, match="words: must be 1 to 1000"):
            NgramHasher(words)


GOLDEN = [
    5838879908894741717,
    3173769377660199435,
    5512126777934743781,
    11482244596721269002,
    9367019779592391685,
]
