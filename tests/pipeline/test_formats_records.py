"""JSON lines, CSV and Parquet: one field is the text; what has none is counted or refused."""

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import parquet_format, record_formats, streams
from pipeline.errors import CorpusError
from tests.pipeline.format_reading import (
    CountingFile,
    chunks,
    contents,
    lengths,
    peak_memory,
    pieces_of,
    read,
    texts,
)

MB = 1_000_000
BAD = (record_formats.BAD_JSON, record_formats.BAD_TEXT, record_formats.BAD_UNICODE)

# ---- JSON lines ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"id": 1, "text": "a\\u00e9\\n\\u0000"}', "aé\n\0".encode()),
        (b'{"text": ""}', b""),
        (b'{"text": "a", "text": "b"}', b"b"),
        (b' {"text": "a"} \r', b"a"),
        (b'{"text": null}', record_formats.BAD_TEXT),
        (b'{"text": 5}', record_formats.BAD_TEXT),
        (b'{"text": ["a"]}', record_formats.BAD_TEXT),
        (b'{"Text": "a"}', record_formats.NO_FIELD),
        (b'["text"]', record_formats.NO_FIELD),
        (b'"text"', record_formats.NO_FIELD),
        (b'{"text": "a"', record_formats.BAD_JSON),
        (b"text", record_formats.BAD_JSON),
        (b'{"text": "a"} {"text": "b"}', record_formats.BAD_JSON),
        (b"\x00", record_formats.BAD_JSON),
        (b"[" * 200_000, record_formats.BAD_JSON),
        (b'{"text": ' + b"9" * 10_000 + b"}", record_formats.BAD_JSON),
        (b'{"text": "\xff"}', record_formats.BAD_UNICODE),
        (b'{"text": "\\ud800"}', record_formats.BAD_UNICODE),
        (b'{"text": "\\ud83d\\ude00"}', "😀".encode()),
    ],
)
def test_one_line(line, expected):
    assert texts(b'{"text": "before"}\n' + line + b'\n{"text": "after"}', "a.jsonl") == [
        b"before",
        expected,
        b"after",
    ]


def test_blank_lines_and_a_mark_at_the_start_are_no_records():
    data = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n \t\n{"text": "b"}\n'
    assert texts(data, "a.jsonl") == [b"a", b"b"]
    assert texts(b"\xef\xbb\xbf", "a.jsonl") == []
    assert texts(b"", "a.jsonl") == []
    # In the middle it is no mark but a character that JSON does not know.
    assert texts(b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}', "a.jsonl") == [
        b"a",
        record_formats.BAD_JSON,
    ]


def test_another_field_and_packing():
    data = json.dumps({"content": "a"}).encode()
    assert texts(gzip.compress(data), "a.jsonl.gz", field="content") == [b"a"]
    packed = pa.compress(data, "zstd", asbytes=True)
    assert texts(packed, "a.json.zst", field="content") == [b"a"]


@given(
    st.lists(st.one_of(st.text(), st.none(), st.sampled_from(["\r\n", "\x85\u2028", "\0"]))),
    st.integers(1, 60),
    st.booleans(),
)
def test_json_lines_do_not_depend_on_the_cut(values, limit, ascii_only):
    data = "\n".join(json.dumps({"text": v}, ensure_ascii=ascii_only) for v in values).encode()
    expected = [record_formats.BAD_TEXT if v is None else v.encode() for v in values]
    assert texts(data, "a.jsonl", limit) == expected


def test_a_line_over_the_limit_is_dropped_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr(record_formats, "RECORD_BYTES", 20 * MB)
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        file.writelines(chunks(b"x" * MB, 200))
        file.write(b'"}\n{"text": "bb"}')
    peak = peak_memory(lambda: lengths(path))
    assert lengths(path) == [1, record_formats.TOO_LONG, 2]
    assert peak < 30 * MB


def test_a_line_of_200_mb_is_kept_by_default(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        file.writelines(chunks(b"x" * MB, 200))
        file.write(b'"}\n')
    assert lengths(path) == [200 * MB]


# ---- CSV -----------------------------------------------------------------------------------------


def test_csv_keeps_quoted_texts_exactly():
    data = b'\xef\xbb\xbfid,text\r\n1,"a,\r\nb""c\n"\r\n\r\n2,\xff\x00 d\r\n3,\r\n4,"x"'
    assert texts(data, "a.csv") == [b'a,\r\nb"c\n', b"\xff\x00 d", b"", b"x"]


def test_csv_rows_of_another_width_are_counted():
    assert texts(b"id,text\n1,a\n2\n3,b,c\n4,d\n", "a.csv") == [
        b"a",
        record_formats.BAD_WIDTH,
        record_formats.BAD_WIDTH,
        b"d",
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"id,Text\n1,a\n", r"^a\.csv: no column is named 'text': the columns are id, Text; set"),
        (b"text,text\n1,a\n", r"^a\.csv: not one column is named 'text'"),
        (b"\n1,a\n", r"^a\.csv: no column is named 'text'"),
        (b'text\na\n"b\nc\n', r"^a\.csv: line 3 begins a record that is not CSV \(unexpected end"),
        (b'text\n"a"b\n', r"^a\.csv: line 2 begins a record that is not CSV \(',' expected after"),
        (b"text\ra\rb", r"^a\.csv: line 1 begins a record that is not CSV"),
    ],
)
def test_csv_that_is_in_doubt_is_refused(data, message):
    with pytest.raises(CorpusError, match=message):
        texts(data, "a.csv")


def test_empty_csv_has_no_documents():
    assert texts(b"", "a.csv") == []
    assert texts(b"id,text\n", "a.csv") == []
    assert pieces_of(b"id,text\n1,a\n", "a.csv", 3) == [(0, 12)]


def test_csv_fields_may_be_long_and_records_are_bounded(monkeypatch):
    long = b"x" * 5 * MB
    assert texts(b'id,text\n1,"' + long + b'"\n', "a.csv") == [long]
    monkeypatch.setattr(record_formats, "RECORD_BYTES", MB)
    file = CountingFile(b'id,text\n1,"' + b"y\n" * 20 * MB)
    with pytest.raises(CorpusError, match=r"^a\.csv: the record that begins on line 2 is longer"):
        list(contents(file, "a.csv"))
    assert file.n_read < 4 * MB


@given(st.lists(st.tuples(st.text(), st.text())), st.sampled_from(["\n", "\r\n"]))
def test_csv_reads_what_pythons_writer_wrote(rows, end):
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "id"), *rows])
    assert texts(out.getvalue().encode(), "a.csv") == [text.encode() for text, _ in rows]


# ---- Parquet -------------------------------------------------------------------------------------


def parquet(table: pa.Table, **options) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


ROWS = st.lists(st.one_of(st.none(), st.binary(max_size=9)), max_size=40)


@given(ROWS, st.integers(1, 10), st.integers(1, 500), st.sampled_from(["none", "zstd", "snappy"]))
def test_parquet_does_not_depend_on_row_groups_or_the_cut(rows, group, limit, packing):
    table = pa.table({"id": range(len(rows)), "text": pa.array(rows, pa.binary())})
    data = parquet(table, row_group_size=group, compression=packing)
    expected = [parquet_format.NULL if row is None else row for row in rows]
    assert texts(data, "a.parquet", limit) == expected


def test_parquet_pieces_hold_whole_row_groups():
    rows = [b"x" * 1000] * 100
    table = pa.table({"other": [b"y" * 5000] * 100, "text": rows})
    data = parquet(table, row_group_size=10, use_dictionary=False, compression="none")
    assert pieces_of(data, "a.parquet", 25_000) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [len(p) for p in read(data, "a.parquet", 25_000)] == [30, 30, 30, 10]
    assert texts(parquet(table[:0]), "a.parquet") == []


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.binary(2),
        pa.dictionary(pa.int32(), pa.string()),
    ],
)
def test_parquet_types_that_hold_text(kind):
    values = pa.array(["ab", None, "cd"]).cast(kind if kind != pa.binary(2) else pa.binary())
    data = parquet(pa.table({"t.x": values.cast(kind)}))
    assert texts(data, "a.parquet", field="t.x") == [b"ab", parquet_format.NULL, b"cd"]


@pytest.mark.parametrize("field", ["text", "n", "inner", "inner.text"])
def test_parquet_with_the_wrong_column_is_refused(field):
    data = parquet(pa.table({"n": [1], "inner": [{"text": "a"}], "body": ["b"]}))
    message = (
        rf"^a\.parquet: no one column '{field}' of strings or bytes: the columns are n \(int64\), "
        r"inner \(struct<text: string>\), body \(string\); set"
    )
    with pytest.raises(CorpusError, match=message):
        pieces_of(data, "a.parquet", field=field)
    with pytest.raises(CorpusError, match=message):
        list(contents(io.BytesIO(data), "a.parquet", field=field))


def test_damaged_parquet_is_refused():
    data = parquet(pa.table({"text": [str(n) * 50 for n in range(5000)]}), compression="zstd")
    for damaged in (data[:-5], data[: len(data) // 2], b"garbage" * 9, b""):
        with pytest.raises(CorpusError, match=r"^a\.parquet: not a whole Parquet file"):
            texts(damaged, "a.parquet")
    broken = bytearray(data)
    broken[5000:5100] = bytes(100)
    with pytest.raises(CorpusError, match=r"^a\.parquet: not a whole Parquet file"):
        texts(bytes(broken), "a.parquet")


def test_parquet_is_read_in_bounded_memory():
    """Of a row group of 64 MB a few pages are held, in Arrow's memory and in Python's."""
    rows = [bytes([n]) * MB for n in range(64)]
    table = pa.table({"text": rows})
    data = parquet(table, compression="none", use_dictionary=False, write_batch_size=1)
    del rows, table
    before, allocated = pa.total_allocated_bytes(), [0]

    def measure():
        for item in contents(io.BytesIO(data), "a.parquet"):
            assert sum(map(len, item.blocks)) == MB
            allocated.append(pa.total_allocated_bytes() - before)

    assert peak_memory(measure) < 24 * MB
    assert max(allocated) < 24 * MB


def test_a_parquet_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(streams, "EXPANSION_FLOOR", MB)
    same = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), ["x" * 100_000])
    data = parquet(pa.table({"text": same}), compression="zstd")
    assert len(data) < 100_000
    with pytest.raises(CorpusError, match=r"^a\.parquet: .* packed bytes become more than"):
        texts(data, "a.parquet")
