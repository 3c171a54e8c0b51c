"""Which records become documents of which split, against a plain reading of the rules."""

import hashlib

import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import records, selection
from pipeline.filters import ExactDuplicates
from pipeline.selection import LETTERS, Earlier, Scans, first_rows, select
from pipeline.splits import SPLITS

record = st.tuples(
    st.sampled_from("abcdefghijklmnop"),  # its content
    st.sampled_from(["", "", "", "train", "validation", "test"]),  # the split that its file names
    st.booleans() | st.just(True),  # whether it is any good
)
ranges_of_records = st.lists(st.lists(record, min_size=1, max_size=8), min_size=1, max_size=4)


def scans(ranges) -> Scans:
    """One file a range, each record a row of it."""
    tables = []
    for number, range_ in enumerate(ranges):
        rows = [
            {
                "file": f"{number}",
                "piece": 0,
                "row": row,
                "name": "",
                "named_split": split,
                "n_bytes": 1,
                "sha256": hashlib.sha256(content.encode()).digest(),
                "reason": "" if good else "bad",
            }
            for row, (content, split, good) in enumerate(range_)
        ]
        tables.append(records.table(rows, records.scan_schema(0)))
    firsts = first_rows(tables.__getitem__, [[f"{n}"] for n in range(len(ranges))])
    return Scans(len(ranges), tables.__getitem__, firsts)


def hashes(contents) -> pa.Array:
    digests = [hashlib.sha256(content.encode()).digest() for content in contents]
    return pa.array(digests, pa.binary(32))


def by_the_rules(ranges, kept: set[str]) -> list[tuple[str, str]]:
    """For each record in order its content and what becomes of it; "?" where a draw decides."""
    turns = ("test", "validation", "train", "")
    flat = [r for range_ in ranges for r in range_]
    fate = ["."] * len(flat)
    for turn in ({turns[0]}, {turns[1]}, {turns[2], turns[3]}):
        for at, (content, split, good) in enumerate(flat):
            if good and split in turn:
                fate[at] = "d" if content in kept else (split or "?")
                kept.add(content)
    return [(content, fate_) for (content, _, _), fate_ in zip(flat, fate, strict=True)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranges_of_records, st.sampled_from([1, 3, 1000]))
def test_one_of_each_content_and_held_out_ones_first(monkeypatch, ranges, at_once):
    expected = by_the_rules(ranges, set())
    drawn = sum(fate == "?" for _, fate in expected)
    trains = any(fate == "train" for _, fate in expected)
    if 0 < drawn < 3 or not (drawn or trains):
        return  # too few to draw from, or nothing to train on: refused, see below
    monkeypatch.setattr(selection, "_RECORDS_AT_ONCE", at_once)
    letters = b"".join(select(scans(ranges), Earlier(0, lambda: ()), None, 0.1, 0.1, frozen=False))
    found = [
        SPLITS[LETTERS.index(letter)] if letter in LETTERS else chr(letter) for letter in letters
    ]
    for (_, fate), got in zip(expected, found, strict=True):
        assert got in SPLITS if fate == "?" else got == fate
    kept = [content for (content, _), got in zip(expected, found, strict=True) if got in SPLITS]
    assert len(set(kept)) == len(kept)
    if drawn:
        assert {got for (_, fate), got in zip(expected, found, strict=True) if fate == "?"} == set(
            SPLITS
        )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranges_of_records, ranges_of_records, st.sampled_from([1, 3, 1000]))
def test_what_comes_later_trains_unless_it_was_there(monkeypatch, first, later, at_once):
    monkeypatch.setattr(selection, "_RECORDS_AT_ONCE", at_once)
    there = {content for range_ in first for content, _, good in range_ if good}
    earlier = pa.table(
        {
            "split": [("train" if good else "") for range_ in first for _, _, good in range_],
            "sha256": hashes(content for range_ in first for content, _, _ in range_),
        }
    )
    chosen = select(
        scans(later), Earlier(len(earlier), lambda: (earlier,)), None, 0.1, 0.1, frozen=True
    )
    flat = [r for range_ in later for r in range_]
    for (content, split, good), letter in zip(flat, b"".join(chosen).decode(), strict=True):
        if not good:
            assert letter == "."
        elif split in ("validation", "test"):
            assert letter == "f"
        else:
            assert letter == ("d" if content in there else "t")
            there.add(content)


def test_what_is_held_at_once_does_not_grow_with_the_corpus(monkeypatch):
    held: list[int] = []

    class Counted(ExactDuplicates):
        def is_duplicate(self, digest: bytes) -> bool:
            found = super().is_duplicate(digest)
            held.append(len(self._seen))
            return found

    monkeypatch.setattr(selection, "ExactDuplicates", Counted)
    monkeypatch.setattr(selection, "_RECORDS_AT_ONCE", 50)
    # Each content twice, so that each must be remembered; and as many that come but once.
    names = [*map(str, range(1000)), *map(str, range(2000))]
    earlier = pa.table({"split": ["train"] * 3000, "sha256": hashes(names)})
    select(scans([[("a", "", True)]]), Earlier(3000, lambda: (earlier,)), None, 0, 0, frozen=True)
    assert len(held) == 2000
    assert max(held) < 100
