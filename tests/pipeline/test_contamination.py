"""Decontamination, against sets of n-grams in plain Python."""

import io
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.contamination import (
    ContaminationSettings,
    HeldOutIndex,
    held_out_hashes,
    ngram_hashes,
)
from pipeline.errors import CorpusError

EXACT = ContaminationSettings(one_in=1)
SAMPLED = ContaminationSettings()
BOTH = pytest.mark.parametrize("settings", [EXACT, SAMPLED], ids=["exact", "sampled"])


def words(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [f"w{rng.randrange(3000)}" for _ in range(count)]


def index_of(documents: list[list[str]], settings: ContaminationSettings) -> HeldOutIndex:
    hashed = (held_out_hashes([" ".join(one).encode()], settings) for one in documents)
    return HeldOutIndex.build(hashed, settings)


def overlap(index: HeldOutIndex, document: list[str]):
    content = ", ".join(document).upper().encode()
    return index.overlap([content[at : at + 1000] for at in range(0, len(content), 1000)])


def plain(train: list[str], held_out: list[list[str]], n: int) -> list[float]:
    """The share with each held-out document, by the definition."""

    def grams(document: list[str]) -> list[tuple[str, ...]]:
        return [tuple(document[at : at + n]) for at in range(len(document) - n + 1)]

    sets, shares = [set(grams(one)) for one in held_out], []
    ours = grams(train)
    for one in sets:
        counted = {gram for gram in one if sum(gram in other for other in sets) < 4}
        fewer = min(len(counted), len(ours))
        shares.append(len(counted & set(ours)) / fewer if fewer >= 32 else 0.0)
    return shares


# Few words and short n-grams, so that documents share many; drawn from a few stretches of text.
stretches = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 60), st.integers(0, 80)), max_size=3
).map(lambda parts: [w for seed, at, length in parts for w in words(seed, 200)[at : at + length]])


@given(st.lists(stretches, max_size=8), stretches, st.integers(2, 5))
def test_shares_are_those_of_sets_of_ngrams(held_out, train, n):
    settings = ContaminationSettings(ngram_words=n, one_in=1)
    shares = plain(train, held_out, n)
    found = overlap(index_of(held_out, settings), train)
    assert found.share == pytest.approx(max(shares, default=0.0), abs=1e-12)
    if found.document is not None:
        assert shares[found.document] == pytest.approx(found.share, abs=1e-12)


@BOTH
def test_copies_are_found_wherever_they_are_and_phrases_are_not(settings):
    held_out = [words(seed, 1000) for seed in range(20)]
    index = index_of(held_out, settings)
    noise, other = words(100, 30_000), words(101, 1000)
    copy = held_out[7]
    edited = [f"new{i}" if i % 50 == 0 else word for i, word in enumerate(copy)]
    for document, least in (
        (copy, 1.0),
        (edited, 0.6),  # a word in 50 changed leaves 37 of 50 n-grams
        (noise[:15_000] + copy + noise[15_000:], 1.0),  # inside a long document
        (noise[:900] + copy[:800] + noise[900:], 0.6),  # most of it
        (copy[300:500], 0.9),  # a passage of it
    ):
        found = overlap(index, document)
        assert found.share >= least
        assert found.document == 7
        assert found.share >= settings.share
    for document in (
        noise,
        other + copy[:40] + noise[:1000],  # a quotation
        [word for one in held_out for word in one[:30] + other[:200]],  # of each a little
        copy[:30],  # too short to tell
    ):
        assert overlap(index, document).share < 0.25


@BOTH
def test_what_many_held_out_documents_have_does_not_count(settings):
    licence = words(50, 300)
    held_out = [licence] + [licence + words(seed, 400) for seed in range(6)]
    index = index_of(held_out, settings)
    for train in (licence, licence + words(60, 100), licence + words(61, 20_000)):
        assert overlap(index, train).share == 0
    # A copy with its licence is one still, and so is one without.
    assert overlap(index, held_out[3]).share == 1
    assert overlap(index, words(2, 400)).share >= 0.9
    # That of three documents counts.
    assert overlap(index_of(held_out[:3], settings), licence).share == 1


def test_a_sample_looks_at_the_same_ngrams_in_every_document():
    text = [words(1, 40_000)]
    every, some = (index_of(text, ContaminationSettings(one_in=n)) for n in (1, 8))
    assert len(some._hashes) == pytest.approx(len(every._hashes) / 8, rel=0.1)
    content = " ".join(text[0]).encode()
    all_hashes = np.concatenate(list(ngram_hashes([content], EXACT)))
    sampled = np.concatenate(list(ngram_hashes([content[:777], content[777:]], SAMPLED)))
    assert sampled.tolist() == [h for h in all_hashes.tolist() if h <= (2**64 - 1) // 8]


def test_a_short_document_is_compared_from_32_ngrams_on():
    for length, share in ((43, 0.0), (44, 1.0)):
        document = words(9, length)
        assert overlap(index_of([document], EXACT), document).share == share


def test_many_hits_are_counted_once(monkeypatch):
    monkeypatch.setattr("pipeline.contamination._HITS", 10)
    held_out = words(3, 2000)
    index = index_of([held_out], EXACT)
    grams = 2000 - 12
    assert overlap(index, held_out[:500] * 40).share == pytest.approx(500 / grams, abs=13 / grams)


def test_an_index_is_the_same_bytes_and_comes_back():
    documents = [words(seed, 300) for seed in range(5)]
    files = [io.BytesIO(), io.BytesIO()]
    for file in files:
        index_of(documents, SAMPLED).save(file)
    assert files[0].getvalue() == files[1].getvalue()
    index = HeldOutIndex.load(files[0].getvalue(), SAMPLED)
    assert overlap(index, documents[4]) == (1.0, 4)
    older = HeldOutIndex.load(files[0].getvalue()[:-32], SAMPLED)  # it had no checksum
    assert overlap(older, documents[4]) == (1.0, 4)


def test_a_changed_byte_of_an_index_is_found():
    file = io.BytesIO()
    index_of([words(seed, 300) for seed in range(2)], SAMPLED).save(file)
    data = file.getvalue()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        with pytest.raises(ValueError):  # noqa: PT011 (NumPy's own words, or ours)
            HeldOutIndex.load(bytes(changed), SAMPLED)
    for cut in (0, 1, 31, 33, len(data) - 31, len(data) - 1):
        with pytest.raises(ValueError):  # noqa: PT011
            HeldOutIndex.load(data[:cut], SAMPLED)


def test_an_index_of_nothing():
    for documents in ([], [[]], [["few", "words"]]):
        assert overlap(index_of(documents, EXACT), words(1, 500)) == (0.0, None)
    assert overlap(index_of([words(1, 500)], EXACT), []) == (0.0, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ngram_words": 1}, "ngram_words: must be 2 to 1000, got 1"),
        ({"share": 0.0}, "share: must be above 0 and at most 1, got 0.0"),
        ({"one_in": 33}, "one_in: must be 1 to 32, got 33"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(CorpusError, match=message):
        ContaminationSettings(**settings)
