"""Which format a file has, and which settings cannot be."""

import dataclasses
import gzip
import json

import pytest

from pipeline import formats
from pipeline.contents import Piece, cut
from pipeline.errors import CorpusError
from pipeline.formats import FormatSettings, make_format, survey
from tests.pipeline.format_reading import texts

RECORD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("file_id", "expected"),
    [
        ("a.jsonl", [b"a"]),
        ("folder.csv/a.NDJSON", [b"a"]),
        ("a.txt", [RECORD]),
        ("a.json", [RECORD]),
        ("jsonl", [RECORD]),
        ("a.jsonl.zip", [RECORD]),
    ],
)
def test_auto_goes_by_the_ending(file_id, expected):
    assert texts(RECORD, file_id) == expected


@pytest.mark.parametrize("file_id", ["a.jsonl.gz", "a.JSON.GZ", "a.ndjson.gz"])
def test_auto_sees_packed_records(file_id):
    assert texts(gzip.compress(RECORD), file_id) == [b"a"]


def test_auto_sees_csv_and_packed_text():
    assert texts(b"id,text\n1,a\n", "a.csv") == [b"a"]
    assert texts(gzip.compress(b"id,text\n1,a\n"), "a.csv.gz") == [b"a"]
    assert texts(gzip.compress(RECORD), "a.txt.gz") == [RECORD]
    assert texts(gzip.compress(RECORD), "a.parquet.gz") == [RECORD]


def test_auto_sees_parquet():
    with pytest.raises(CorpusError, match=r"^x\.parquet: not a whole Parquet file"):
        texts(b"", "x.parquet")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "json"}, r"^kind: must be one of auto, text, .*got 'json'$"),
        ({"kind": "separator"}, "^separator: kind separator needs one"),
        ({"kind": "separator", "separator": ""}, "^separator: kind separator needs one"),
        ({"separator": "x"}, "^separator: needs kind separator, got auto$"),
        ({"byte_splits": (1, 2)}, "^byte_splits: needs kind enwik8, got auto$"),
        ({"kind": "enwik8", "byte_splits": (2, 1)}, "^byte_splits: must be two rising offsets"),
        ({"kind": "imagenet64", "train_rows": -1}, "^train_rows: must be at least 0, got -1$"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(CorpusError, match=message):
        make_format(FormatSettings(**settings), "a.txt")


@pytest.mark.parametrize("kind", formats.KINDS)
def test_each_kind_has_a_format_and_settings_survive_json(kind):
    settings = FormatSettings(kind, separator="x" if kind == "separator" else None)
    again = FormatSettings(**json.loads(json.dumps(dataclasses.asdict(settings))))
    assert type(make_format(again, "a")) is type(make_format(settings, "a"))


def test_survey_leaves_other_kinds_alone():
    settings = FormatSettings("jsonl")

    def fail():
        raise AssertionError("opened")

    assert survey(settings, [("a.jsonl", fail)]) is settings


def test_pieces_cover_and_are_even():
    assert cut(10, 3) == [Piece(0, 3), Piece(3, 6), Piece(6, 10)]
    assert cut(2, 5) == [Piece(0, 1), Piece(1, 2)]
    assert cut(0, 0) == [Piece(0, 0)]
