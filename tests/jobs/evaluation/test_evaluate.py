"""`tvq evaluate` against figures that can be told without it."""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.cli.main import run_cli
from jobs.console import Console
from jobs.errors import ExitCode, UserError
from jobs.evaluation.evaluate import evaluate_run, word_perplexity
from jobs.evaluation.record import Evaluation
from jobs.runs.run_directory import RunDirectory
from model.transformer import bind, initial_cache
from pipeline.errors import CorpusError
from tests.jobs.made_run import MODEL, make_run, network_of, unigram
from tests.pipeline.corpora import stream, write_corpus

pytestmark = pytest.mark.compiles
QUIET = Console(quiet=True)
T = 24
TEXTS = [b"it is a truth", b" universally acknowledged, that a single man in possession of a good"]
TEXTS += [b"x", b"fortune, must be in want of a wife " * 3, b"however little known", b"the" * 9]
SHARDS = [[[text] for text in TEXTS[:4]], [[text] for text in TEXTS[4:]]]
N_BYTES = sum(map(len, TEXTS))
NOWHERE = -1e9


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, train=[[[b"text"]]], validation=[[[b"other"]]], test=SHARDS)
    return folder


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A network that attends what is far, on windows of T."""
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder, "random", corpus, network_of(MODEL), sequence_length=T)


def evaluated(run: RunDirectory, split: str = "test", **options) -> Evaluation:
    return evaluate_run(run, split, console=QUIET, **options)


@pytest.fixture(scope="module")
def plain(run: RunDirectory) -> Evaluation:
    return evaluated(run)


@pytest.fixture(scope="module")
def carried(run: RunDirectory) -> Evaluation:
    return evaluated(run, carry=True)


def entropy(ids: list[int]) -> float:
    """Nats of a draw from these."""
    shares = np.array(list(Counter(ids).values())) / len(ids)
    return float(-(shares * np.log(shares)).sum())


def oracle(inputs: list[int], targets: list[int]) -> np.ndarray:
    """The nats of each target, from one pass of dense attention over all of them."""
    model = replace(MODEL, attention_form="dense")
    network = bind(model, *network_of(model))
    features = network(jnp.array([inputs]), initial_cache(model, 1)).features
    logprobs = jax.nn.log_softmax(network.logits(features))[0]
    return -np.asarray(logprobs)[np.arange(len(targets)), targets]


# ---- Models whose figures are known --------------------------------------------------------------


def test_uniform_over_the_bytes_is_eight_bits_a_byte(corpus, tmp_path):
    logits = np.where(np.arange(259) < 3, NOWHERE, 0.0)
    longest = max(map(len, TEXTS))
    run = make_run(
        tmp_path, "uniform", corpus, unigram(network_of(MODEL), logits),
        window="document", sequence_length=longest,
    )  # fmt: skip
    figures = evaluated(run)
    assert figures.targets == figures.n_bytes == N_BYTES
    assert figures.bits_per_byte == pytest.approx(8, abs=1e-7)  # float32's log(256)
    assert figures.nats_per_token == pytest.approx(math.log(256), abs=1e-7)
    # Of equal ones the first is the likeliest: the byte 0, which no text has.
    assert figures.accuracy == 0


@pytest.mark.parametrize("window", ["document", "stream"])
def test_a_unigram_head_is_the_empirical_entropy(corpus, tmp_path, window):
    ids = [t for t in stream(SHARDS) if window == "stream" or t != 1]
    counts = Counter(ids)
    logits = np.array([math.log(counts[i]) if counts[i] else NOWHERE for i in range(259)])
    length = T if window == "stream" else max(map(len, TEXTS))
    run = make_run(
        tmp_path, "unigram", corpus, unigram(network_of(MODEL), logits),
        window=window, sequence_length=length,
    )  # fmt: skip
    figures = evaluated(run)
    assert figures.targets == len(ids)
    assert figures.nats_per_token == pytest.approx(entropy(ids), rel=1e-6)
    total = entropy(ids) * len(ids)
    assert figures.bits_per_byte == pytest.approx(total / math.log(2) / N_BYTES, rel=1e-6)
    assert figures.accuracy == counts.most_common(1)[0][1] / len(ids)
    n_words = sum(len(text.split()) for text in TEXTS)
    assert figures.n_words == n_words
    assert figures.word_perplexity == pytest.approx(math.exp(total / n_words), rel=1e-5)
    # Each document's own, too.
    for index, text in enumerate(TEXTS):
        own = [b + 3 for b in text] + ([1] if window == "stream" else [])
        nats = sum(math.log(len(ids) / counts[i]) for i in own)
        assert figures.documents.nats[index] == pytest.approx(nats, rel=1e-5)


def test_word_perplexity_is_of_words_not_tokens():
    """PG-19's: 26.6 is a loss of log(26.6) nats for each word, however many tokens it had."""
    assert word_perplexity(1000 * math.log(26.6), 1000) == pytest.approx(26.6, rel=1e-12)
    assert word_perplexity(math.log(2) * 30, 10) == pytest.approx(8, rel=1e-12)


# ---- Spans, caches, sums -------------------------------------------------------------------------


def test_windows_are_scored_from_an_empty_cache(plain):
    ids, expected = stream(SHARDS), []
    for begin in range(0, len(ids), T):
        targets = ids[begin : begin + T]
        expected.append(oracle([1, *targets[:-1]], targets))
    nats = np.concatenate(expected)
    assert plain.windows == len(expected)
    assert plain.targets == len(ids)
    assert plain.nats_per_token == pytest.approx(nats.mean(), rel=1e-5)
    ends = np.cumsum([len(text) + 1 for text in TEXTS])
    by_document = [part.sum() for part in np.split(nats, ends[:-1])]
    np.testing.assert_allclose(plain.documents.nats, by_document, rtol=1e-5)
    assert plain.documents.doc_id == [f"doc{n}" for n in range(len(TEXTS))]
    assert plain.documents.n_bytes.tolist() == [len(text) for text in TEXTS]
    assert plain.documents.n_tokens.tolist() == [len(text) + 1 for text in TEXTS]


def test_carried_equals_one_long_dense_pass(plain, carried):
    expected = []
    for text in TEXTS:
        targets = [byte + 3 for byte in text] + [1]
        expected.append(oracle([1, *targets[:-1]], targets).sum())
    np.testing.assert_allclose(carried.documents.nats, expected, rtol=1e-5)
    assert carried.targets == plain.targets
    assert carried.windows == len(TEXTS)
    longest = int(np.argmax(carried.documents.n_tokens))
    assert carried.documents.n_tokens[longest] > 4 * T
    assert abs(carried.documents.nats[longest] - plain.documents.nats[longest]) > 0.1


def test_carried_figures_do_not_depend_on_where_it_is_cut(run, carried):
    whole = evaluated(run, carry=True, length=200)
    np.testing.assert_allclose(whole.documents.nats, carried.documents.nats, rtol=1e-5)


def test_positions_add_up(plain, carried, run):
    long = evaluated(run, length=100)
    for figures, last in ((plain, T), (carried, 106), (long, 100)):
        assert sum(b.targets for b in figures.positions) == figures.targets
        nats = sum(b.nats for b in figures.positions)
        assert nats == pytest.approx(figures.nats_per_token * figures.targets, rel=1e-12)
        assert nats == pytest.approx(figures.documents.nats.sum(), rel=1e-12)
        assert figures.positions[-1].end == last
    # Those with 64 tokens and more before them: of the longest document, and of the second.
    assert [b.begin for b in carried.positions] == [0, 64]
    assert carried.positions[1].targets == sum(max(len(text) + 1 - 64, 0) for text in TEXTS)


@pytest.mark.slow
def test_of_unquantised_attention_the_carried_cache_holds_all(corpus, tmp_path):
    model = replace(MODEL, quantized_keys=False)
    network = network_of(model)
    run = make_run(tmp_path, "full", corpus, network, model=model, sequence_length=T)
    carried, whole = evaluated(run, carry=True), evaluated(run, carry=True, length=128)
    np.testing.assert_allclose(carried.documents.nats, whole.documents.nats, rtol=1e-5)


# ---- What is kept and written --------------------------------------------------------------------


def test_the_dump_has_every_token_once(run, plain, carried, tmp_path):
    for carry, figures in ((False, plain), (True, carried)):
        path = tmp_path / f"{carry}.parquet"
        evaluated(run, carry=carry, dump=path)
        table = pq.read_table(path)
        rows = table.to_pydict()
        found: dict[str, list[tuple[int, int, int, float]]] = {}
        for doc, *values in zip(
            *(rows[name] for name in ("doc_id", "position", "context", "token", "logprob")),
            strict=True,
        ):
            found.setdefault(doc, []).append(tuple(values))
        for index, text in enumerate(TEXTS):
            entries = sorted(found[f"doc{index}"])
            assert [entry[0] for entry in entries] == list(range(len(text) + 1))
            assert [entry[2] for entry in entries] == [byte + 3 for byte in text] + [1]
            if carry:
                assert [entry[1] for entry in entries] == [entry[0] for entry in entries]
            total = -math.fsum(entry[3] for entry in entries)
            assert total == pytest.approx(figures.documents.nats[index], rel=1e-12)
        assert max(rows["context"]) == (105 if carry else T - 1)
        assert sum(rows["correct"]) == round(figures.accuracy * figures.targets)
    assert not list(tmp_path.glob("*.tmp"))


def test_an_evaluation_is_read_back_as_it_was(run):
    for carry in (False, True):
        figures = evaluated(run, carry=carry)
        again = evaluated(run, reuse=True, carry=carry)
        assert again.tokens_per_second == figures.tokens_per_second  # not measured anew
        assert json.dumps(again.figures()) == json.dumps(figures.figures())
        for name in ("nats", "n_tokens", "n_correct", "n_bytes", "n_words"):
            np.testing.assert_array_equal(
                getattr(again.documents, name), getattr(figures.documents, name)
            )
        assert again.documents.doc_id == figures.documents.doc_id
        np.testing.assert_array_equal(again.blocks.nats, figures.blocks.nats)
        assert again.blocks.kind == "blocks of 64 KiB"


def test_many_documents_are_what_is_resampled(tmp_path):
    texts = [[[f"document {n} of many".encode()]] for n in range(40)]
    write_corpus(tmp_path / "corpus", train=[[[b"x"]]], test=texts)
    run = make_run(tmp_path, "many", tmp_path / "corpus", network_of(MODEL), sequence_length=T)
    figures = evaluated(run)
    assert (figures.blocks.kind, len(figures.blocks)) == ("documents", 40)
    assert figures.bits_per_byte_interval is not None
    low, high = figures.bits_per_byte_interval
    assert low < figures.bits_per_byte < high
    assert not list((run.path / "evaluations").glob("*-blocks.arrow"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("carry", [False, True])
def test_any_number_of_workers_gives_the_same_digits(tmp_path, carry):
    from jobs.cluster.ray_session import ray_session

    # The text twelve times over makes nine batches of 16 windows.
    write_corpus(tmp_path / "many", train=[[[b"text"]]], test=SHARDS * 12)
    run = make_run(tmp_path, "shared", tmp_path / "many", network_of(MODEL), sequence_length=T)
    found = {}
    with ray_session(None, cpus=3):
        for workers in (1, 3):
            dump = tmp_path / f"{workers}.parquet"
            figures = evaluated(run, workers=workers, carry=carry, dump=dump)
            [stored] = (run.path / "evaluations").glob("*.arrow")
            figures = replace(figures, tokens_per_second=0.0).figures()
            found[workers] = (figures, stored.read_bytes(), dump.read_bytes())
    assert found[1] == found[3]
    here = evaluated(run, carry=carry)
    assert here.nats_per_token == pytest.approx(found[1][0]["nats_per_token"], rel=1e-6)


# ---- Mistakes ------------------------------------------------------------------------------------


def test_a_checkpoint_by_its_path_or_its_update(run, plain, capsys):
    path = f"{run.location}/checkpoints/00000004"
    for arguments in ([path], [run.location, "--update", "4"]):
        assert run_cli(["evaluate", *arguments, "--split", "test", "--json"]) == ExitCode.OK
        shown = json.loads(capsys.readouterr().out)
        assert shown["bits_per_byte"] == plain.bits_per_byte
        assert shown["documents"] == len(TEXTS)
    assert run_cli(["evaluate", path, "--update", "4"]) == ExitCode.USER
    assert "is a checkpoint already" in capsys.readouterr().err
    assert run_cli(["evaluate", run.location, "--update", "3"]) == ExitCode.USER
    assert "has no checkpoint at update 3; there are 4" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused_by_name(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "damaged")
    damaged = RunDirectory(tmp_path / "damaged")
    [largest] = sorted(
        (p for p in damaged.path.glob("checkpoints/*/state-*/**/d/*")),
        key=lambda p: p.stat().st_size,
    )[-1:]
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match="take another checkpoint with --update: there are 4"):
        evaluated(damaged)


def test_another_corpus_and_too_short_windows_are_refused(run, corpus, tmp_path):
    write_corpus(tmp_path / "other", train=[[[b"text"]]], test=[[[b"another text"]]])
    moved = tmp_path / "moved"
    shutil.copytree(corpus, moved)
    pictures = make_run(
        tmp_path, "pictures", moved, network_of(MODEL), window="document", sequence_length=128
    )
    with pytest.raises(CorpusError, match="--carry or --length 105"):
        evaluated(pictures, length=64)
    assert evaluated(pictures, length=64, carry=True).windows == len(TEXTS)
    shutil.rmtree(moved)
    shutil.copytree(tmp_path / "other", moved)
    with pytest.raises(UserError, match="was begun on another corpus"):
        evaluated(pictures)
    nowhere = tmp_path / "no" / "dump.parquet"
    with pytest.raises(UserError, match="cannot be written"):
        evaluated(run, dump=nowhere)
