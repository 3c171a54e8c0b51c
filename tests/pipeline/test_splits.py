"""Documents shared among train, validation and test."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CorpusError
from pipeline.splits import SPLITS, assign_splits, named_split, place

names = st.lists(st.text(min_size=1, max_size=8), min_size=3, max_size=60, unique=True)


def assigned(ids: list[str], validation: float, test: float) -> dict[str, str]:
    splits = assign_splits(np.array([place(doc_id) for doc_id in ids]), validation, test)
    return {doc_id: SPLITS[split] for doc_id, split in zip(ids, splits.tolist(), strict=True)}


@given(names, st.sampled_from([0.0, 0.01, 0.3, 0.9]), st.sampled_from([0.0, 0.01, 0.09]))
def test_no_split_is_empty_unless_asked(ids, validation, test):
    splits = assigned(ids, validation, test)
    expected = {"train"} | ({"validation"} if validation else set()) | ({"test"} if test else set())
    assert set(splits.values()) == expected
    assert splits == assigned(list(reversed(ids)), validation, test)


def test_a_document_stays_in_its_split_when_others_come():
    few, many = (assigned([f"{i}.txt" for i in range(n)], 0.1, 0.1) for n in (500, 2000))
    assert few.items() <= many.items()
    counts = {name: list(many.values()).count(name) for name in ("train", "validation", "test")}
    assert 160 < counts["validation"] < 240
    assert 160 < counts["test"] < 240


def test_golden():
    # printf 'tvq split\000%s.txt' 5 | sha256sum, and so on; the first digits over 16**4 are below
    # 0.1 for the three, and below 0.2 for the five.
    splits = assigned([f"{i}.txt" for i in range(40)], 0.1, 0.1)
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
        assigned(["a", "b"], 0.05, 0.05)
    with pytest.raises(CorpusError, match=r"0 documents are left .* at least 1 are needed"):
        assigned([], 0, 0)
    assert assigned(["a"], 0, 0) == {"a": "train"}


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train/a.txt", "train"),
        ("books/VALID/1.txt", "validation"),
        ("wiki.test-00001-of-00002.parquet", "test"),
        ("val_data.jsonl", "validation"),
        ("dev.csv", "validation"),
        ("training-data/test.txt", "train"),  # the first word decides
    ],
)
def test_a_path_names_a_split(path, split):
    assert named_split(path) == split


def test_a_path_that_names_none_is_refused():
    for path in ("books/contest.txt", "latest.txt", "a/b.txt"):
        with pytest.raises(CorpusError, match=f"{path}: its path names no split; expected train"):
            named_split(path)
