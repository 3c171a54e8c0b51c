"""enwik8 and PG-19 in the layouts in which they are distributed; hostile archives."""

import io
import zipfile

import numpy as np
import pytest

from pipeline import streams
from pipeline.errors import CorpusError
from tests.pipeline.format_reading import (
    CountingFile,
    Found,
    contents,
    damage,
    peak_memory,
    pieces_of,
    read,
    texts,
    zipped,
)

MB = 1_000_000

# ---- enwik8 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_enwik8_is_cut_at_90_and_95_mb(packed):
    data = np.random.default_rng(0).bytes(MB) * 100
    file = zipped({"enwik8": data}, zipfile.ZIP_STORED) if packed else data
    file_id = "x/enwik8.zip" if packed else "enwik8"
    found = []

    def measure():
        for item in contents(io.BytesIO(file), file_id, kind="enwik8"):
            assert item.row is None
            at = sum(length for _, _, length in found)
            length = 0
            for block in item.blocks:
                assert block == data[at + length : at + length + len(block)]
                length += len(block)
            found.append((item.name, item.split, length))

    assert peak_memory(measure) < 10 * MB
    assert found == [
        ("enwik8/train", "train", 90 * MB),
        ("enwik8/validation", "validation", 5 * MB),
        ("enwik8/test", "test", 5 * MB),
    ]


def test_another_length_is_not_enwik8():
    message = r"^enwik8: expected 100,000,000 bytes, found 3: fetch enwik8 again, or give byte_spl"
    with pytest.raises(CorpusError, match=message):
        texts(b"abc", "enwik8", kind="enwik8")
    with pytest.raises(CorpusError, match=r"^enwik8\.zip: enwik8: expected 100,000,000 bytes"):
        texts(zipped({"enwik8": b"abc"}), "enwik8.zip", kind="enwik8")


def test_another_file_is_cut_at_given_offsets():
    def of(*splits: int) -> list[tuple[str | None, str | None, bytes | None]]:
        [found] = read(b"abcdefghij", "t/text8", kind="enwik8", byte_splits=splits)
        return [(item.name, item.split, item.text) for item in found]

    assert of(6, 9) == [
        ("t/text8/train", "train", b"abcdef"),
        ("t/text8/validation", "validation", b"ghi"),
        ("t/text8/test", "test", b"j"),
    ]
    assert of(10, 10) == [("t/text8/train", "train", b"abcdefghij")]
    assert of(0, 10) == [("t/text8/validation", "validation", b"abcdefghij")]
    with pytest.raises(CorpusError, match="10 bytes end before the second of byte_splits, 11"):
        of(6, 11)


def test_what_is_left_unread_of_a_split_is_not_in_the_next():
    data = np.random.default_rng(0).bytes(10 * MB)
    file = zipped({"text8": data})
    items = contents(io.BytesIO(file), "text8.zip", kind="enwik8", byte_splits=(7 * MB, 8 * MB))
    next(next(items).blocks)
    next(items)
    assert b"".join(next(items).blocks) == data[8 * MB :]


def test_the_member_is_found_by_name():
    def of(members: dict[str, bytes]) -> list[bytes | str]:
        return texts(zipped(members), "text8.zip", kind="enwik8", byte_splits=(1, 2))

    assert of({"README": b"no", "text8": b"abc"}) == [b"a", b"b", b"c"]
    assert of({"folder/": b"", "folder/other": b"abc"}) == [b"a", b"b", b"c"]
    with pytest.raises(CorpusError, match=r"one file named 'text8' in it, found 'a', 'b'$"):
        of({"a": b"abc", "b": b"abc"})


HOSTILE_NAMES = ["../text8", "a/../../text8", "/etc/passwd", "..\\text8", "C:\\text8", "c:text8"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_an_archive_that_names_paths_outside_is_refused(name):
    data = zipped({"text8": b"abc", name: b"abc"})
    with pytest.raises(CorpusError, match=r"^text8\.zip: names a path outside itself, "):
        texts(data, "text8.zip", kind="enwik8", byte_splits=(1, 2))


def test_a_zip_bomb_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(streams, "EXPANSION_FLOOR", MB)
    out = io.BytesIO()
    with (
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("text8", "w") as f,
    ):
        f.write(bytes(60 * MB))
    data = out.getvalue()
    # What it claims is what counts: deflate alone stays just under a thousandfold here or above.
    at = data.rfind(b"PK\x01\x02")
    data = data[: at + 24] + (2**32 - 2).to_bytes(4, "little") + data[at + 28 :]
    file = CountingFile(data)
    with pytest.raises(CorpusError, match=r"^text8\.zip: .* packed bytes become more than"):
        list(contents(file, "text8.zip", kind="enwik8", byte_splits=(1, 2)))
    assert file.n_read < 2000


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_zip_is_refused(method):
    data = zipped({"text8": np.random.default_rng(0).bytes(100_000)}, method)
    for damaged in damage(data):
        with pytest.raises(CorpusError, match=r"^text8\.zip: not a whole, plain zip archive"):
            texts(damaged, "text8.zip", kind="enwik8", byte_splits=(1, 2))


def test_a_zip_with_a_password_or_another_method_is_refused():
    data = bytearray(zipped({"text8": b"abc"}))
    data[6] |= 1  # encrypted, in the member's header and in the table of contents
    data[data.rfind(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(CorpusError, match=r"not a whole, plain zip archive .*password"):
        texts(bytes(data), "text8.zip", kind="enwik8", byte_splits=(1, 2))
    packed = zipped({"text8": b"abc"}, zipfile.ZIP_BZIP2)
    with pytest.raises(CorpusError, match="'text8' is packed by method 12, which is not read"):
        texts(packed, "text8.zip", kind="enwik8", byte_splits=(1, 2))


# ---- PG-19 ---------------------------------------------------------------------------------------


def test_pg19_splits_by_folder_and_leaves_the_table_out():
    def of(file_id: str) -> list[Found]:
        [found] = read(b"A book.\r\n\xff", file_id, kind="pg19")
        return found

    for split in ("train", "validation", "test"):
        assert of(f"{split}/123.txt") == [Found(None, b"A book.\r\n\xff", None, split)]
    assert of("test/pg19/train/1.TXT")[0].split == "train"
    assert of("metadata.csv") == of("README.md") == of("train/LICENSE") == []
    for elsewhere in ("123.txt", "train/x/123.txt"):
        with pytest.raises(CorpusError, match=rf"^{elsewhere}: not in a folder train, validation"):
            of(elsewhere)


def test_a_book_is_one_piece():
    assert pieces_of(b"abc", "train/1.txt", kind="pg19") == [(0, 3)]
