"""`tvq verify` and `tvq inspect`, as a user reads them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.cli.main import run_cli
from jobs.corpora.inspection import histogram
from jobs.errors import ExitCode
from jobs.readable import in_one_line, indented, readable
from jobs.recipe import Recipe, identity, resolve, to_yaml
from jobs.runs.run_directory import RunDirectory
from pipeline.corpus_survey import Survey
from pipeline.manifest import Manifest
from tests.pipeline.corpora import write_corpus
from tests.pipeline.serial import contents, make_corpus

TEXTS = {
    **{f"{n}.txt": (b"Line %d.\n" % n) * (n + 1) for n in range(40)},
    "escape.txt": b"one\x1b[2Jtwo\0three",
    "twin.txt": b"Line 0.\n",
    "none.txt": b"",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    filters = {"keep_binary": True}
    from pipeline.filters import FilterSettings

    make_corpus(folder / "source", folder / "corpus", TEXTS, filters=FilterSettings(**filters))
    return folder / "corpus"


@pytest.fixture
def tvq(capsys, monkeypatch, tmp_path):
    """Runs a command that must succeed; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        assert run_cli([str(argument) for argument in arguments]) == ExitCode.OK
        output = capsys.readouterr()
        assert output.err == ""
        assert "\x1b" not in output.out
        assert "\0" not in output.out
        return output.out

    return run


@pytest.fixture
def mistake(capsys):
    def run(*arguments: object) -> str:
        assert run_cli([str(argument) for argument in arguments]) == ExitCode.USER
        output = capsys.readouterr()
        assert len(output.err.splitlines()) == 1
        return output.err

    return run


def test_verify(made, tvq, mistake, tmp_path):
    n_shards = len([p for p in made.rglob("*.arrow") if not p.name.startswith("records")])
    length = sum(p.stat().st_size for p in made.rglob("*.arrow") if "records" not in p.name)
    expected = f"{n_shards} shards, 41 documents, {length / 1e6:.1f} MB, 43 records: all as written"
    assert tvq("verify", made).splitlines()[-1] == expected
    found = json.loads(tvq("verify", made, "--json"))
    assert (found["shards"], found["documents"], found["n_bytes"]) == (n_shards, 41, length)
    write_corpus(tmp_path / "damaged", train=[[[b"some text"]]])
    path = tmp_path / "damaged/shards/test/train-00000.arrow"
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    assert re.search(r"train-00000\.arrow: chunk 0 ", mistake("verify", tmp_path / "damaged"))


def test_the_card(made, tvq):
    manifest, texts = Manifest.load(made), contents(made, Manifest.load(made))
    text = tvq("inspect", made)
    assert str(made) in text
    assert manifest.plan_id[:16] in text
    assert "43 files, 43 documents" in text
    assert "filters.keep_binary=True" in text
    for name, split in manifest.splits.items():
        mine = [content for s, content in texts.values() if s == name]
        row = next(line.split() for line in text.splitlines() if line.startswith(name + " "))
        assert row[1:3] == [f"{len(mine):,}", f"{sum(map(len, mine)):,}"]
        assert row[4] == f"{sum(len(content.split()) for content in mine):,}"
        assert row[-1] == split.fingerprint[:16]
    assert re.search(r"^duplicate +1  'twin\.txt'$", text, re.M)
    assert re.search(r"^empty +1  'none\.txt'$", text, re.M)
    only = tvq("inspect", made, "--split", "test")
    assert "train  " not in only
    assert "samples of test" in only


def test_the_card_as_json(made, tvq):
    card = json.loads(tvq("inspect", made, "--json"))
    texts = contents(made, Manifest.load(made))
    for name, split in card["splits"].items():
        lengths = [len(content).bit_length() - 1 for s, content in texts.values() if s == name]
        counts = split["documents_by_log2_tokens"]
        assert counts == [lengths.count(k) for k in range(len(counts))]
    assert card["sources"]["files"] == 43
    assert {s["id"] for s in card["samples"]} <= texts.keys()
    assert card["drops"]["duplicate"] == {"count": 1, "examples": ["twin.txt"]}


def test_a_corpus_without_records_has_a_card(tmp_path, tvq, mistake):
    write_corpus(tmp_path / "old", train=[[[b"some text"]]], test=[[[b"held"], [b"out"]]])
    assert "has no records" in tvq("inspect", tmp_path / "old")
    assert tvq("inspect", tmp_path / "old", "--document", "doc1").splitlines()[-1] == "out"
    assert "no document has the id 'x'" in mistake("inspect", tmp_path / "old", "--document", "x")


def test_one_document(made, tvq, mistake):
    split, text = contents(made, Manifest.load(made))["7.txt"]
    shown = tvq("inspect", made, "--document", "7.txt")
    assert shown.startswith(f"7.txt  in {split}, {len(text)} tokens")
    assert shown.endswith(text.decode() + "\n")
    value = json.loads(tvq("inspect", made, "--document", "7.txt", "--json"))
    assert (value["split"], value["text"], value["tokens"]) == (split, text.decode(), len(text))
    assert "one\\x1b[2Jtwo\\x00three" in tvq("inspect", made, "--document", "escape.txt")
    dropped = tvq("inspect", made, "--document", "twin.txt")
    assert dropped.startswith("twin.txt  dropped as duplicate: the same as '0.txt', which is in ")
    assert "dropped as empty; 0 bytes" in tvq("inspect", made, "--document", "none.txt")
    assert "ids that contain it: 'escape.txt'" in mistake("inspect", made, "--document", "esc")


def test_a_batch_shows_the_text_of_its_documents(made, tvq):
    options = ("--batch-size", 3, "--sequence-length", 50, "--seed", 4)
    value = json.loads(tvq("inspect", made, "--step", 2, *options, "--json"))
    texts = contents(made, Manifest.load(made))
    stream = b"".join(text + b"\n\n" for split, text in texts.values() if split == "train")
    assert (value["batch"], value["batch_size"], len(value["rows"])) == (2, 3, 3)
    for row in value["rows"]:
        pieces = [texts[d["id"]][1][d["begin"] : d["end"]] for d in row["documents"]]
        assert b"\n\n".join(pieces) in stream
        assert sum(d["end"] - d["begin"] + d["eos"] for d in row["documents"]) == 50
        start = b"\n\n".join(pieces)[:20].decode()
        assert readable(start.encode()).replace("\n", "\\n")[:20] == row["text"][:20]
    shown = tvq("inspect", made, "--step", 2, *options, "--update-length", 10)
    assert shown.startswith(
        "batch 2 (counted from 0) is updates 11 to 15: update u lies in batch (u - 1) // 5\n"
    )
    for number, row in enumerate(value["rows"]):
        assert f"row {number}  window {row['window']}, epoch {row['epoch']}, " in shown
        first = row["documents"][0]
        assert f"  {first['id']}  tokens {first['begin']} to {first['end'] - 1}" in shown


def test_a_batch_of_a_run(made, tvq, mistake, tmp_path):
    recipe = Recipe()
    recipe = resolve(
        replace(
            recipe,
            data=replace(recipe.data, corpus=str(made), sequence_length=64),
            training=replace(recipe.training, batch_size=2, update_length=32, seed=9),
        )
    )
    prints = {name: split.fingerprint for name, split in Manifest.load(made).splits.items()}
    RunDirectory.at(tmp_path / "runs", "mine").claim(identity(recipe), prints, to_yaml(recipe))
    run = ("--run", "mine", "--root", tmp_path / "runs")
    of_run = tvq("inspect", *run, "--step", 7)
    assert "batch 7 (counted from 0) is updates 15 to 16" in of_run
    by_hand = ("--batch-size", 2, "--sequence-length", 64, "--update-length", 32, "--seed", 9)
    assert of_run == tvq("inspect", made, "--step", 7, *by_hand)
    assert "--seed: the run's recipe says it" in mistake("inspect", *run, "--step", 7, "--seed", 1)
    other = dict.fromkeys(prints, "0" * 64)
    RunDirectory.at(tmp_path / "runs", "other").claim(identity(recipe), other, to_yaml(recipe))
    line = mistake("inspect", "--run", "other", "--root", tmp_path / "runs", "--step", 7)
    assert "run other was begun on another corpus" in line


def test_differences(made, tvq, tmp_path):
    changed = {**TEXTS, "7.txt": b"changed", "new.txt": b"new", "twin.txt": b"no longer"}
    del changed["9.txt"]
    make_corpus(tmp_path / "source", tmp_path / "other", changed)
    text = tvq("inspect", made, "--diff", tmp_path / "other")
    assert re.search(r"^filters\.keep_binary +True +False$", text, re.M)
    assert "sources: 42 in both, 1 only here, 1 only there" in text
    assert re.search(r"1  only here: \w+ +'9\.txt'", text)
    assert re.search(r"1  only there: \w+ +'new\.txt'", text)
    assert re.search(r"1  other text: \w+ +'7\.txt'", text)
    assert re.search(r"1  dropped: duplicate here, \w+ there +'twin\.txt'", text)
    assert re.search(r"1  \w+ here, dropped: \w+ there +'escape\.txt'", text)
    value = json.loads(tvq("inspect", made, "--diff", tmp_path / "other", "--json"))
    assert value["same"] is False
    assert sum(group["count"] for group in value["documents"]) >= 5
    assert "the same: a training on one" in tvq("inspect", made, "--diff", made)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "expected either CORPUS, or --run NAME"),
        (("corpus", "--run", "x"), "--run: goes with --step"),
        (("corpus", "--run", "x", "--step", "1"), "expected either CORPUS, or --run"),
        (("corpus", "--seed", "1"), "--seed: goes with --step"),
        (("corpus", "--step", "1", "--diff", "corpus"), "--diff and --step: give one of them"),
        (("nowhere",), "there is no such folder"),
        (("corpus", "--diff", "nowhere"), "there is no such folder"),
        (("corpus", "--split", "validation"), "split 'validation' is empty"),
        (("--run", "nobody", "--step", "1"), "run 'nobody': not found"),
        (
            ("corpus", "--step", "1", "--sequence-length", "50", "--update-length", "20"),
            "--update-length: must divide the 50 tokens",
        ),
        (
            ("corpus", "--step", "1", "--sequence-length", "4", "--window", "document"),
            "a window has 4",
        ),
    ],
)
def test_mistakes(mistake, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus", train=[[[b"some text"]]])
    assert expected in mistake("inspect", *arguments)


def test_bars_are_in_proportion():
    lengths = {"train": np.array([0, 8, 0, 80]), "test": np.array([0, 0, 0, 0])}
    columns, rows = histogram(Survey(1, 1, 1, lengths), ["train", "test"])
    assert columns == ["tokens", "train", "test", ""]
    assert rows == [
        ("2 to 3", "8", "0", "####"),
        ("4 to 7", "0", "0", ""),
        ("8 to 15", "80", "0", "#" * 40),
    ]


def test_text_that_could_move_the_cursor_is_escaped():
    assert readable(b"a\x1b[2J\r\n\tb\0\x9b\xff") == "a\\x1b[2J\\r\n\tb\\x00\ufffd\ufffd"
    assert readable("\u009b".encode()) == "\\x9b"
    assert in_one_line(b"a\nb\tc", 4) == "a\\nb\\t..."
    assert indented(b"\n\na\n\n\n\nb\n", 100) == "    a\n\n    b"
