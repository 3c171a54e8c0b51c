"""What real folders hold, through the whole of `prepare`: kept exactly, counted, or refused.

The formats' own tests hold each case against one file; here it lies among others, and nothing of
the corpus that is there already may suffer from it.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.cli.main import run_cli
from pipeline.errors import CorpusError
from pipeline.filters import FilterSettings
from pipeline.formats import FormatSettings
from pipeline.manifest import Manifest, tokenizer_of
from pipeline.normalization import Normalization
from pipeline.plan import PrepareSettings
from pipeline.prepare import prepare
from pipeline.sentencepiece_tokenizer import SentencePieceSettings
from pipeline.sources import SourceSettings
from pipeline.stored_documents import stored_documents
from pipeline.tasks import run_here
from pipeline.verification import verify
from tests.pipeline.serial import contents, make_corpus
from tests.pipeline.test_increments import files, text

ORDINARY = {f"{i}.txt": text(i).encode() for i in range(8)}

STRANGE = {
    "invalid UTF-8": b"caf\xe9 \xff\xfe \xc0\xaf \xed\xa0\x80 end",
    "cut off in a character": "wörter".encode()[:2],
    "crlf.txt": b"one\r\ntwo\rthree\n\rfour\r\n",
    "bom.txt": b"\xef\xbb\xbfafter the mark",
    "utf16.txt": "wide".encode("utf-16-be").replace(b"\0", b"\x01"),
    "space.txt": b" ",
    "newline.txt": b"\n",
    "no newline at its end": b"x\ny",
    "separators": "a\u2028b\u0085c\x0bd\x0ce\x1cf\u2581g".encode(),
    "name with  spaces ": b"1",
    " leading": b"2",
    "Größe und 漢字 😀.txt": b"3",
    "composed \u00e9": b"4",
    "decomposed e\u0301": b"5",
    "a name\nof two\tlines": b"6",
    "-rf": b"7",
    "[a-z]*?.txt": b"8",
    "back\\slash": b"9",
    "'quotes\" %s {x}": b"10",
    "upper/CASE.TXT": b"11",
    "upper/case.txt": b"12",
    "sha#1": b"13",
    "..fairly.hidden.not": b"hidden",
    "x" * 255: b"14",
}


def drops(manifest: Manifest) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {reason: (drop.count, drop.examples) for reason, drop in manifest.drops.items()}


def plant(folder: Path, texts: dict[str, bytes]) -> Path:
    for name, data in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def again(source: Path | str, corpus: Path, **changed: Any):
    changed.setdefault("shard_bytes", 2000)
    return prepare(PrepareSettings(SourceSettings((str(source),)), **changed), corpus, run_here)


def refused(source: Path | str, corpus: Path, **changed: Any) -> str:
    """The one line of a prepare that is refused; what was there stays, to the byte."""
    before = files(corpus)
    with pytest.raises(CorpusError) as caught:
        again(source, corpus, **changed)
    after = files(corpus)
    assert before.items() <= after.items()
    # What is more is scans that are done, which the next run finds; never half a file.
    assert all(name.startswith("scan/") for name in after.keys() - before.keys())
    if before:
        verify(corpus)
    [line] = str(caught.value).splitlines()
    return line


def test_what_is_in_files_and_their_names_is_kept_exactly(tmp_path):
    texts = ORDINARY | STRANGE
    manifest = make_corpus(tmp_path / "source", tmp_path / "corpus", texts)
    stored = contents(tmp_path / "corpus", manifest)
    del texts["..fairly.hidden.not"]
    assert {name: data for name, (_, data) in stored.items()} == texts
    assert manifest.drops == {}
    assert verify(tmp_path / "corpus").documents == len(texts)
    listed = [f"{tmp_path / 'source'}/{name}" for name in STRANGE if "/" not in name]
    named = PrepareSettings(SourceSettings(tuple(listed)))
    made = prepare(named, tmp_path / "named", run_here).manifest  # each by itself, no pattern
    assert contents(tmp_path / "named", made).keys() == {n for n in STRANGE if "/" not in n}


def test_empty_and_binary_files_are_counted_and_can_be_kept(tmp_path):
    texts = ORDINARY | {
        "empty": b"",
        "nul": b"a\0b",
        "late nul": b"x" * 3_000_000 + b"\0",
        "e2": b"",
    }
    manifest = make_corpus(tmp_path / "source", tmp_path / "corpus", texts)
    expected = {"empty": (2, ("e2", "empty")), "binary": (2, ("late nul", "nul"))}
    assert drops(manifest) == expected
    kept = again(tmp_path / "source", tmp_path / "all", filters=FilterSettings(keep_binary=True))
    stored = contents(tmp_path / "all", kept.manifest)
    assert {n: d for n, (_, d) in stored.items()} == {n: d for n, d in texts.items() if d}
    assert drops(kept.manifest) == {"empty": (2, ("e2", "empty"))}


def test_normalisation_is_asked_for(tmp_path):
    change = Normalization(byte_order_mark=True, newlines=True)
    make_corpus(tmp_path / "source", tmp_path / "corpus", ORDINARY | STRANGE, normalization=change)
    stored = contents(tmp_path / "corpus", Manifest.load(tmp_path / "corpus"))
    assert stored["crlf.txt"][1] == b"one\ntwo\nthree\n\nfour\n"
    assert stored["bom.txt"][1] == b"after the mark"
    assert stored["invalid UTF-8"][1] == STRANGE["invalid UTF-8"]


def test_sentencepiece_keeps_valid_text_exactly_and_counts_the_rest(tmp_path):
    texts = ORDINARY | STRANGE
    trained = SentencePieceSettings(vocab_size=300)
    manifest = make_corpus(
        tmp_path / "source", tmp_path / "corpus", texts, tokenizer="sentencepiece",
        sentencepiece=trained,
    )  # fmt: skip
    invalid = ("cut off in a character", "invalid UTF-8")
    assert drops(manifest) == {"not UTF-8": (2, invalid)}
    tokenizer = tokenizer_of(tmp_path / "corpus", manifest)
    stored = {
        document.id: b"".join(map(tokenizer.decode, document.parts))
        for split in manifest.splits
        for document in stored_documents(tmp_path / "corpus", manifest, split)
    }
    left_out = {*invalid, "..fairly.hidden.not"}
    assert stored == {name: data for name, data in texts.items() if name not in left_out}


DAMAGED = {
    "cut.txt.gz": (gzip.compress(os.urandom(5000))[:-900], r"not a whole gzip file"),
    "not.txt.gz": (b"plain text", r"not a whole gzip file"),
    "cut.jsonl.zst": (
        bytes(pa.compress(b'{"text": "a"}\n' * 9000, "zstd", asbytes=True))[:-9],
        r"not a whole zstd file",
    ),
    "bomb.txt.zst": (
        bytes(pa.compress(bytes(300_000_000), "zstd", asbytes=True)),
        r"packed bytes become more than 6",
    ),
    "not.parquet": (b"PAR1 and no more", r"parquet"),
    "no column.csv": (b"id,body\n1,x\n", r"no column is named 'text': the columns are id, body"),
    "quotes.csv": (b'text\n"never closed\n', r"line 2 begins a record that is not CSV"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*DAMAGED, "wrong column.parquet"])
def test_a_file_that_is_not_what_it_says_is_named_and_the_corpus_stays(tmp_path, name):
    source, corpus = plant(tmp_path / "source", ORDINARY), tmp_path / "corpus"
    whole = again(source, corpus).manifest
    if name in DAMAGED:
        data, message = DAMAGED[name]
    else:
        sink = io.BytesIO()
        pq.write_table(pa.table({"body": ["a"]}), sink)
        data, message = sink.getvalue(), r"no one column 'text' of strings.*body"
    plant(source, {name: data})
    line = refused(source, corpus)
    assert name in line
    assert re.search(message, line), line
    # Left out, the corpus is found as it is; mended, it grows by the file.
    (source / name).unlink()
    assert again(source, corpus).manifest == whole
    plant(source, {f"{name}.txt": b"mended"})
    assert again(source, corpus).manifest.splits["train"].documents == (
        whole.splits["train"].documents + 1
    )


def test_archives_that_expand_or_reach_outside(tmp_path):
    bomb, reaching = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", bytes(100_000_000))
    with zipfile.ZipFile(reaching, "w") as archive:
        archive.writestr("../enwik8", b"x")
    two = plant(tmp_path / "two", {"enwik8": b"x", "enwik8.zip": bomb.getvalue()})
    one = plant(tmp_path / "one", {"enwik8.zip": reaching.getvalue()})
    corpus, kind = tmp_path / "corpus", {"format": FormatSettings(kind="enwik8")}
    assert "enwik8 is one file, and here are 2" in refused(two, corpus, **kind)
    # Deflate reaches 1,029 times: a bomb made for it is over the limit.
    assert "packed bytes become more than" in refused(two / "enwik8.zip", corpus, **kind)
    assert "names a path outside itself, '../enwik8'" in refused(one, corpus, **kind)
    assert not (tmp_path / "enwik8").exists()
    assert not corpus.exists()  # it was made for nothing


def test_nothing_matches_and_what_cannot_be_read(tmp_path):
    source, corpus = plant(tmp_path / "source", ORDINARY), tmp_path / "corpus"
    again(source, corpus)
    plant(tmp_path / "hidden", {".a": b"x", "__pycache__/b": b"x", ".git/c": b"x"})
    assert "no file matches" in refused(tmp_path / "hidden", corpus)
    assert "no file matches" in refused(f"{source}/*.md", corpus)
    assert "no such file or folder" in refused(tmp_path / "nowhere", corpus)
    (source / "broken\nlink").symlink_to(tmp_path / "gone")
    line = refused(source, corpus)
    assert line.endswith(r"source/broken\nlink: a link to nothing: mend it or exclude it")
    (source / "broken\nlink").unlink()
    os.mkfifo(source / "pipe")  # would be waited on for ever
    (source / "loop").symlink_to(source)
    (source / "folder.txt").mkdir()
    assert again(source, corpus).reused
    assert "pipe: neither a file nor a folder" in refused(source / "pipe", corpus)
    name = os.fsdecode(b"not \xff UTF-8")
    (source / name).write_bytes(b"x")
    assert "the name is not valid UTF-8" in refused(source, corpus)


def test_a_name_of_two_lines_is_refused_in_one_on_the_command_line(tmp_path, capsys):
    source = plant(tmp_path / "source", ORDINARY)
    (source / "broken\nlink").symlink_to(tmp_path / "gone")
    assert run_cli(["prepare", str(source), "--output", str(tmp_path / "corpus")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert r"broken\nlink: a link to nothing" in line
    assert not (tmp_path / "corpus").exists()


def test_no_two_documents_have_one_id(tmp_path):
    lines = b"".join(b'{"text": "record %d"}\n' % i for i in (0, 1, 2, 3, 1))
    source, corpus = plant(tmp_path / "source", ORDINARY | {"a.jsonl": lines}), tmp_path / "corpus"
    first = again(source, corpus).manifest
    # Two records of one content: the second is dropped, under an id of its own.
    assert drops(first) == {"duplicate": (1, ("a.jsonl#4",))}
    stored = contents(corpus, first)
    assert stored["a.jsonl#1"][1] == b"record 1"
    plant(source, {"a.jsonl#1": b"another"})
    assert "a.jsonl#1: its id could be that of a record of a.jsonl" in refused(source, corpus)
    (source / "a.jsonl#1").rename(source / "a.jsonl#one")
    assert contents(corpus, again(source, corpus).manifest)["a.jsonl#one"][1] == b"another"
    other = plant(tmp_path / "other", {"0.txt": b"in another folder"})
    with pytest.raises(CorpusError, match=r"would both be document '0\.txt'"):
        prepare(PrepareSettings(SourceSettings((str(source), str(other)))), corpus, run_here)


def test_records_that_are_none_are_counted_among_those_that_are(tmp_path):
    bad = [
        (b'{"text": "half a pair \\ud800"}', "not valid Unicode"),
        (b'{"text": "caf\xe9"}', "not valid Unicode"),
        (b'{"text": 5}', "text field is not text"),
        (b'{"body": "x"}', "no text field"),
        (b'["text"]', "no text field"),
        (b'{"text": "cut off', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": ""}', "empty"),
        (b'{"text": "a\\u0000b"}', "binary"),
    ]
    good = [json.dumps({"text": f"text {i} \u2028 \n\r\n é"}).encode() for i in range(9)]
    lines = [line for pair in zip([b for b, _ in bad], good, strict=True) for line in pair]
    data = b"\xef\xbb\xbf" + b"\r\n \n\r\n".join(lines)  # a mark, CRLF, blank lines, no last end
    sheet = io.StringIO()
    writer = csv.writer(sheet)
    writer.writerows([("id", "text"), (1, 'two\nlines, "quoted"'), (2,), (3, "\0"), (4, "")])
    texts = {"a.jsonl": data, "b.csv": sheet.getvalue().encode()}
    manifest = make_corpus(tmp_path / "source", tmp_path / "corpus", texts)
    stored = contents(tmp_path / "corpus", manifest)
    expected = {f"a.jsonl#{2 * i + 1}": f"text {i} \u2028 \n\r\n é".encode() for i in range(9)}
    expected["b.csv#0"] = b'two\nlines, "quoted"'
    assert {name: found for name, (_, found) in stored.items()} == expected
    reasons: dict[str, list[str]] = {}
    for i, (_, reason) in enumerate(bad):
        reasons.setdefault(reason, []).append(f"a.jsonl#{2 * i}")
    reasons["wrong number of columns"] = ["b.csv#1"]
    reasons["binary"].append("b.csv#2")
    reasons["empty"].append("b.csv#3")
    assert {reason: list(names) for reason, (_, names) in drops(manifest).items()} == reasons


def png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def test_pictures_that_do_not_decode_or_are_a_gigapixel(tmp_path):
    texts, expected = {}, {}
    for i in range(6):
        pixels = hashlib.shake_256(bytes([i])).digest(64 * 64 * 3)
        sink = io.BytesIO()
        Image.frombytes("RGB", (64, 64), pixels).save(sink, "PNG")
        texts[f"{i}.png"], expected[f"{i}.png"] = sink.getvalue(), pixels
    black = io.BytesIO()
    Image.new("RGB", (64, 64)).save(black, "PNG")
    texts["black.png"], expected["black.png"] = black.getvalue(), bytes(64 * 64 * 3)
    texts["gigapixel.png"] = png(40_000, 30_000, zlib.compress(bytes(1000)))
    texts["cut.png"] = texts["0.png"][:2000]
    texts["lies.png"] = png(4000, 4000, zlib.compress(b"\0"))
    texts["text.png"] = b"no picture"
    texts["empty.png"] = b""
    manifest = make_corpus(
        tmp_path / "source", tmp_path / "corpus", texts, tokenizer="image-64x64x3",
        format=FormatSettings(kind="images"),
    )  # fmt: skip
    stored = contents(tmp_path / "corpus", manifest)
    assert {name: pixels for name, (_, pixels) in stored.items()} == expected
    assert drops(manifest) == {
        "undecodable image": (4, ("cut.png", "empty.png", "lies.png", "text.png")),
        "too many pixels": (1, ("gigapixel.png",)),
    }


LINE = b"".join(b"%07d " % i for i in range(1_000_000))  # 8 MB


@pytest.mark.parametrize(
    "megabytes", [16, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
@pytest.mark.parametrize("kind", ["text", "lines", "jsonl"])
def test_a_line_of_any_length_is_kept_exactly(tmp_path, megabytes, kind):
    line = LINE * (megabytes // 8)
    data = line if kind == "text" else b"first\n" + line + b"\nlast"
    if kind == "jsonl":
        quoted = [json.dumps({"text": part.decode()}).encode() for part in data.split(b"\n")]
        data = b"\n".join(quoted)
    plant(tmp_path / "source", {"long": data})
    form = FormatSettings(kind=kind)
    manifest = again(
        tmp_path / "source", tmp_path / "corpus", format=form, shard_bytes=3_000_000,
        validation_fraction=0, test_fraction=0,
    ).manifest  # fmt: skip
    digest, sizes = hashlib.sha256(), []
    name = "long" if kind == "text" else "long#1"
    for document in stored_documents(tmp_path / "corpus", manifest, "train"):
        for part in document.parts if document.id == name else ():
            digest.update(part.tobytes())
            sizes.append(len(part))
    assert digest.digest() == hashlib.sha256(line).digest()
    assert max(sizes) <= 4 * 2**20 < len(line)
    assert manifest.splits["train"].documents == (1 if kind == "text" else 3)
    words = len(line.split()) + (0 if kind == "text" else 2)
    assert manifest.splits["train"].n_words == words
