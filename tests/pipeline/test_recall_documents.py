"""Recall documents against a reading of them with a plain dictionary."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CorpusError
from pipeline.recall_documents import KEYS, LONGEST, VALUES, recall_documents


@given(st.integers(0, 5), st.integers(0, 10**6), st.sampled_from([4, 16, 64, 200, LONGEST]))
def test_every_key_comes_twice_with_its_value(seed, number, length):
    texts, distances = recall_documents(seed, [number], length)
    [text], [distance] = texts.tolist(), distances.tolist()
    assert len(text) == length
    bound: dict[int, int] = {}
    values: dict[int, int] = {}
    for at in range(0, length, 2):
        key, value = text[at : at + 2]
        assert key in KEYS
        assert value in VALUES
        assert distance[at] == 0
        if key in bound:
            assert value == values[key]
            assert distance[at + 1] == at - bound.pop(key)
        else:
            assert key not in values
            assert distance[at + 1] == 0
            bound[key], values[key] = at, value
    assert not bound
    assert len(values) == length // 4


def test_a_document_is_a_function_of_its_number():
    texts, distances = recall_documents(3, range(50), 64)
    for number in (0, 7, 49):
        alone = recall_documents(3, [number], 64)
        assert np.array_equal(alone.texts[0], texts[number])
        assert np.array_equal(alone.distances[0], distances[number])
    assert len(np.unique(texts, axis=0)) == 50
    assert not np.array_equal(recall_documents(4, range(50), 64).texts, texts)
    # The documents of other versions are these.
    digest = hashlib.sha256(texts.tobytes()).hexdigest()
    assert digest == "3385001c23b99cf9c02d7862548ad4ae6a8358a63108d5241c5a84a4cfcfe17b"


def test_values_cannot_be_guessed_and_distances_spread():
    texts, distances = recall_documents(0, range(2000), 128)
    first = (distances == 0)[:, 1::2]
    counts = np.array([np.sum(texts[:, 1::2][first] == value) for value in VALUES])
    assert counts.min() / counts.mean() > 0.95
    for begin in (2, 4, 8, 16, 32, 64):
        inside = (distances >= begin) & (distances < 2 * begin)
        assert inside.sum() > 2000 * 2  # each doubling is asked some times in every document


@pytest.mark.parametrize("length", [0, 2, 66, LONGEST + 4])
def test_impossible_lengths_are_refused(length):
    with pytest.raises(CorpusError, match=f"at most {LONGEST}, got {length}"):
        recall_documents(0, [0], length)
