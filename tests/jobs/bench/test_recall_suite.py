"""`tvq bench recall`: the corpus that it makes, and what it counts."""

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.bench.recall_suite import HELD_OUT, SEED, answers, by_distance, write_recall_corpus
from jobs.cli.main import run_cli
from jobs.console import Console
from jobs.errors import ExitCode
from jobs.evaluation.evaluate import evaluate_run
from pipeline.manifest import Manifest
from pipeline.recall_documents import recall_documents
from tests.jobs.made_run import MODEL, make_run, network_of, unigram
from tests.pipeline.serial import contents


def test_the_corpus_is_the_documents_by_their_numbers(tmp_path: Path):
    corpus = tmp_path / "corpus"
    write_recall_corpus(tmp_path / "texts", corpus, 20, 16)
    found = contents(corpus, Manifest.load(corpus))
    for split, first, count in (("validation", 0, HELD_OUT), ("test", HELD_OUT, HELD_OUT),
                                ("train", 2 * HELD_OUT, 20)):  # fmt: skip
        texts = recall_documents(SEED, range(first, first + count), 16).texts
        for number, text in enumerate(texts):
            assert found[f"{split}.txt#{number}"] == (split, text.tobytes())
    assert len(found) == 2 * HELD_OUT + 20


def test_answers_are_counted_by_distance(tmp_path: Path):
    """Of a model that always says F: it is right where the value is F."""
    corpus = tmp_path / "corpus"
    write_recall_corpus(tmp_path / "texts", corpus, 4, 32)
    logits = np.where(np.arange(259) == ord("F") + 3, 5.0, 0.0)
    run = make_run(
        tmp_path, "says-f", corpus, unigram(network_of(MODEL), logits),
        window="document", sequence_length=32,
    )  # fmt: skip
    dump = tmp_path / "dump.parquet"
    evaluate_run(run, "test", dump=dump, console=Console(quiet=True))
    asked = recall_documents(SEED, range(HELD_OUT, 2 * HELD_OUT), 32)
    correct = answers(dump, asked)
    assert np.array_equal(correct, asked.texts == ord("F"))
    found = by_distance(correct, asked.distances)
    assert [part.begin for part in found] == [2, 4, 8, 16]
    assert sum(part.questions for part in found) == HELD_OUT * 8
    for part in found:
        here = (asked.distances >= part.begin) & (asked.distances < part.end)
        assert part.questions == here.sum()
        assert part.correct == (asked.texts[here] == ord("F")).sum()
    other = recall_documents(SEED + 1, range(HELD_OUT, 2 * HELD_OUT), 32)
    with pytest.raises(RuntimeError, match="other documents"):
        answers(dump, other)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.tracking
def test_dense_attention_solves_it_and_a_window_does_not(tmp_path: Path, capsys):
    command = ["bench", "recall", "--output", str(tmp_path / "recall"), "--json"]
    assert run_cli(command) == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    assert found["control_solved"]
    assert found["accuracy"]["dense"] >= 0.99
    far = [
        part["correct"] / part["questions"]
        for part in found["by_distance"]["window-only"]
        if part["begin"] > 2 * found["window"] + 1
    ]
    assert far
    assert max(far) < 0.2  # guessing gives 0.0625
