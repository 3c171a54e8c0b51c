"""Text by file, line and separator: exact, cut anywhere, in bounded memory."""

import gzip
import io
import itertools
import re

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import streams
from pipeline.contents import BLOCK_BYTES
from pipeline.errors import CorpusError
from pipeline.formats import FormatSettings, make_format
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
HOSTILE = b"\xef\xbb\xbfa\r\nb\x00\xff\r\r\n\n\rc"


def split_by_hand(data: bytes, separator: bytes) -> list[bytes]:
    """The texts that each end at a separator, the last one perhaps at the end."""
    out = data.split(separator)
    return out if out[-1] else out[:-1]


def lines_by_hand(data: bytes) -> list[bytes]:
    return [
        line.removesuffix(b"\r") if end else line
        for line, end in re.findall(rb"([^\n]*)(\n|\Z)", data)
        if line or end
    ]


def test_a_text_file_is_kept_exactly():
    assert texts(HOSTILE, "a.txt") == [HOSTILE]
    assert texts(b"", "a.txt") == [b""]
    assert read(b"x", "a.txt")[0][0].row is None


def test_lines_lose_their_ends_alone():
    assert texts(HOSTILE, "a", kind="lines") == [
        b"\xef\xbb\xbfa",
        b"b\x00\xff\r",
        b"",
        b"\rc",
    ]
    assert texts(b"a\r", "a", kind="lines") == [b"a\r"]
    assert texts(b"", "a", kind="lines") == []
    assert texts(b"\n", "a", kind="lines") == [b""]


def test_texts_between_separators():
    def of(data: bytes, separator: str) -> list[bytes | str]:
        return texts(data, "a", kind="separator", separator=separator)

    assert of(b"a<|end|>b\n<|end|>", "<|end|>") == [b"a", b"b\n"]
    assert of(b"<|end|><|end|>a", "<|end|>") == [b"", b"", b"a"]
    assert of(b"a\n---\nb---\n", "\n---\n") == [b"a", b"b---\n"]
    assert of("aéb".encode(), "é") == [b"a", b"b"]
    assert of(b"a\n\n\nb", "\n\n") == [b"a", b"\nb"]


SMALL = st.lists(st.sampled_from([b"a", b"bb", b"\r", b"\n", b"\r\n", b"\x00", b"\xff"])).map(
    b"".join
)


@given(SMALL, st.integers(1, 20))
def test_lines_do_not_depend_on_the_cut(data, limit):
    assert texts(data, "a", limit, kind="lines") == lines_by_hand(data)


@given(SMALL, st.sampled_from(["a", "ab", "\n", "a\n", "bb", "\n\n", "\r\na"]), st.integers(1, 20))
def test_separated_texts_do_not_depend_on_the_cut(data, separator, limit):
    expected = split_by_hand(data, separator.encode())
    assert texts(data, "a", limit, kind="separator", separator=separator) == expected


@given(
    SMALL,
    st.integers(1, 9),
    st.integers(1, 20),
    st.sampled_from([None, "\r\na", "\n\n", "ab", "a"]),
)
def test_texts_do_not_depend_on_blocks(data, block_bytes, limit, separator):
    """With blocks of a few bytes, separators lie across their borders, and texts are long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BLOCK_BYTES", block_bytes)
        if separator is None:
            assert texts(data, "a", limit, kind="lines") == lines_by_hand(data)
        else:
            found = texts(data, "a", limit, kind="separator", separator=separator)
            assert found == split_by_hand(data, separator.encode())


@pytest.mark.parametrize("separator", [b"\n", b"\r\n", b"<|end|>"])
def test_a_separator_behind_a_long_text_may_lie_across_blocks(separator):
    by_string = separator == b"<|end|>"
    kind = "separator" if by_string else "lines"
    for shift in range(9):
        long = b"x" * (2 * BLOCK_BYTES - shift)
        assert texts(
            long + separator + b"tail", "a", kind=kind, separator="<|end|>" if by_string else None
        ) == [long, b"tail"]


@given(SMALL, st.lists(st.booleans()))
def test_a_text_may_be_left_unread(data, wanted):
    """What the reader leaves of a document does not become part of the next."""
    expected = lines_by_hand(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BLOCK_BYTES", 2)
        for n, item in enumerate(contents(io.BytesIO(data), "a", kind="lines")):
            if n >= len(wanted) or wanted[n]:
                assert b"".join(item.blocks) == expected[n]
            else:
                next(item.blocks, None)


def test_pieces_are_cut_by_the_limit_and_only_where_they_can_be():
    data = b"x\n" * 500
    assert len(pieces_of(data, "a", 100, kind="lines")) == 10
    assert len(pieces_of(data, "a", 100, kind="jsonl")) == 10
    assert len(pieces_of(data, "a", 100, kind="separator", separator="ab")) == 10
    assert len(pieces_of(data, "a", 100, kind="separator", separator="\n\n")) == 1
    assert len(pieces_of(data, "a.gz", 100, kind="lines")) == 1
    assert pieces_of(data, "a", 100) == [(0, 1000)]


def test_a_piece_inside_a_long_line_reads_no_further_than_its_end():
    data = b"x" * (20 * BLOCK_BYTES)
    form = make_format(FormatSettings("lines"), "a")
    file = CountingFile(data)
    pieces = form.pieces(file, "a", len(data), 5 * BLOCK_BYTES)
    assert file.n_read == 0
    assert len(pieces) == 4
    assert list(form.documents(file, "a", pieces[1])) == []
    assert file.n_read < 7 * BLOCK_BYTES


def test_a_line_of_200_mb_stays_out_of_memory(tmp_path):
    path = tmp_path / "long.txt"
    with path.open("wb") as file:
        file.write(b"first\r\n")
        file.writelines(chunks(b"x" * MB, 200))
        file.write(b"\r\nlast")

    def measure():
        assert lengths(path, kind="lines") == [5, 200 * MB, 4]
        assert lengths(path, kind="text") == [200 * MB + 13]
        assert lengths(path, kind="separator", separator="last") == [200 * MB + 9]

    assert peak_memory(measure) < 10 * MB


@pytest.mark.parametrize("pack", [gzip.compress, lambda d: pa.compress(d, "zstd", asbytes=True)])
def test_packed_text_is_unpacked(pack):
    data = b"".join(b"line %d\r\n" % n for n in range(100_000))
    ending = ".gz" if pack is gzip.compress else ".ZST"
    assert texts(pack(data), "a.txt" + ending) == [data]
    assert texts(pack(data) + pack(b"more"), "a.txt" + ending) == [data + b"more"]
    assert texts(pack(data), "a" + ending, kind="lines") == data.split(b"\r\n")[:-1]
    assert texts(b"", "a" + ending) == [b""]


@pytest.mark.parametrize("pack", [gzip.compress, lambda d: pa.compress(d, "zstd", asbytes=True)])
def test_damaged_packed_files_are_refused(pack):
    codec, ending = ("gzip", ".gz") if pack is gzip.compress else ("zstd", ".zst")
    whole = pack(b"".join(b"line %d\n" % n for n in range(20_000)))
    middle = len(whole) // 2
    for damaged in (whole[:-1], whole[:middle], whole[:3], b"no archive", whole + b"rest"):
        for kind in ("text", "lines", "jsonl"):
            with pytest.raises(CorpusError, match=rf"^Ä b{ending}: not a whole {codec} file \("):
                texts(damaged, "Ä b" + ending, kind=kind)


def test_a_flipped_byte_in_gzip_is_refused():
    whole = bytearray(gzip.compress(b"".join(b"line %d\n" % n for n in range(20_000))))
    whole[-8] ^= 1  # its checksum
    with pytest.raises(CorpusError, match="not a whole gzip file"):
        texts(bytes(whole), "a.gz")


def test_a_bomb_is_refused_early_and_modest_repetition_is_not():
    bomb = pa.compress(bytes(400 * MB), "zstd", asbytes=True)
    file = io.BytesIO(bomb)
    [item] = contents(file, "bomb.zst")
    blocks = itertools.islice(item.blocks, streams.EXPANSION_FLOOR // BLOCK_BYTES)
    assert sum(map(len, blocks)) == streams.EXPANSION_FLOOR
    with pytest.raises(CorpusError, match=r"^bomb\.zst: .* packed bytes become more than .*unpack"):
        next(item.blocks)
    assert len(texts(gzip.compress(bytes(60 * MB)), "zeros.gz")[0]) == 60 * MB


def test_an_error_of_the_disk_is_not_taken_for_a_damaged_file():
    class Broken(CountingFile):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        [list(item.blocks) for item in contents(Broken(b""), "a.gz")]
