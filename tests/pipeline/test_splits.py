"""Documents shared among train, validation and test."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CorpusError
from pipeline.splits import assign_splits

names = st.lists(st.text(min_size=1, max_size=8), min_size=3, max_size=60, unique=True)


@given(names, st.sampled_from([0.0, 0.01, 0.3, 0.9]), st.sampled_from([0.0, 0.01, 0.09]))
def test_no_split_is_empty_unless_asked(ids, validation, test):
    splits = assign_splits(ids, validation, test)
    assert set(splits) == set(ids)
    expected = {"train"} | ({"validation"} if validation else set()) | ({"test"} if test else set())
    assert set(splits.values()) == expected
    assert splits == assign_splits(list(reversed(ids)), validation, test)


def test_a_document_stays_in_its_split_when_others_come():
    few, many = (assign_splits([f"{i}.txt" for i in range(n)], 0.1, 0.1) for n in (500, 2000))
    assert few.items() <= many.items()
    counts = {name: list(many.values()).count(name) for name in ("train", "validation", "test")}
    assert 160 < counts["validation"] < 240
    assert 160 < counts["test"] < 240


def test_golden():
    # printf 'tvq split\000%s.txt' 5 | sha256sum, and so on; the first digits over 16**4 are below
    # 0.1 for the three, and below 0.2 for the five.
    splits = assign_splits([f"{i}.txt" for i in range(40)], 0.1, 0.1)
    held_out = {name for name, split in splits.items() if split != "train"}
    assert {name for name in held_out if splits[name] == "test"} == {"5.txt", "15.txt", "20.txt"}
    assert held_out - {"5.txt", "15.txt", "20.txt"} == {
        "3.txt",
        "7.txt",
        "32.txt",
        "10.txt",
        "29.txt",
    }


def test_too_few_documents():
    with pytest.raises(
        CorpusError, match=r"2 documents are left .* at least 3 are needed: add documents, or cut"
    ):
        assign_splits(["a", "b"], 0.05, 0.05)
    with pytest.raises(CorpusError, match=r"0 documents are left .* at least 1 are needed"):
        assign_splits([], 0, 0)
    assert assign_splits(["a"], 0, 0) == {"a": "train"}
