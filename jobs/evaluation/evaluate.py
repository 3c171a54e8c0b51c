"""`tvq evaluate`: a checkpoint on a held-out split, every token exactly once."""

import contextlib
import dataclasses
import itertools
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jobs import recipe as recipes
from jobs.checkpoints.manifest import manifest_of
from jobs.console import Console
from jobs.errors import UserError
from jobs.evaluation.bootstrap import interval
from jobs.evaluation.record import (
    FEW_DOCUMENTS,
    Blocks,
    Documents,
    Evaluation,
    PositionBucket,
    Settings,
    blocks_of,
    settings_of,
    store,
    stored,
)
from jobs.evaluation.report import print_evaluation
from jobs.evaluation.score_dump import ScoreDump
from jobs.evaluation.scoring import Job, batches, rows_of
from jobs.evaluation.tally import Tally, cut_documents, whole_documents
from jobs.evaluation.trained_model import damage_on_stderr, load_checkpoint, refuse_other_text
from jobs.evaluation.yardsticks import Yardsticks, yardsticks
from jobs.recipe import Recipe
from jobs.runs.run_directory import RunDirectory
from jobs.runs.run_figures import positions_png
from jobs.training.host_memory import keep_freed_memory
from jobs.units import NATS_PER_BIT
from pipeline.document_table import DocumentTable, document_table
from pipeline.evaluation_rows import Spans, evaluation_spans
from pipeline.manifest import tokenizer_of
from pipeline.mixture import MixedCorpus, Mixture
from pipeline.storage import Location
from pipeline.tokenizers import ImageTokenizer
from pipeline.windows import Windows

_CHECKPOINT = re.compile(r"(.+)/checkpoints/(\d{8,})/?")


class _Part(NamedTuple):
    """The split of one corpus."""

    corpus: MixedCorpus
    documents: DocumentTable
    spans: Spans
    tally: Tally


def evaluate_run(
    run: RunDirectory,
    split: str,
    *,
    update: int | None = None,
    length: int | None = None,
    carry: bool = False,
    workers: int = 0,
    dump: Path | None = None,
    reuse: bool = False,
    console: Console,
) -> Evaluation:
    """Scores every target of a split once, and stores the evaluation in the run directory.

    Of a mixture: the split of the one corpus after that of the other, whatever their weights.

    Args:
        run: whose checkpoint.
        split: validation or test.
        update: of the checkpoint; None: the newest.
        length: T, targets scored at a time; None: as in training.
        carry: hand the cache on through each document, so that each target sees all of it that is
            before; else every window of T begins with an empty cache.
        workers: Ray workers; 0: this process. Any number gives the same figures.
        dump: a Parquet file for the log-probability of every token.
        reuse: take the stored evaluation, if there is one of the same weights, text and settings.
        console: for progress.

    Raises:
        UserError: no such checkpoint, or it is damaged; the corpus is another one than that which
            the run was begun on.
        CorpusError: the corpus is damaged, or a window of T cannot hold a document.
    """
    with damage_on_stderr():
        checkpoint = manifest_of(run, update)
    recipe = recipes.from_yaml(checkpoint.recipe, f"the recipe of run {run.name}")
    mixture = Mixture.load(recipe.data.corpora)
    refuse_other_text(run, mixture, split, checkpoint.fingerprints[split])
    length = length or recipe.data.sequence_length
    settings = settings_of(
        checkpoint,
        split,
        mixture.fingerprint(split),
        window=recipe.data.window,
        length=length,
        carry=carry,
    )
    if reuse and dump is None and (earlier := stored(run, settings)):
        return earlier
    parts = _parts(mixture, recipe, settings)
    everything = [
        batch
        for index, part in enumerate(parts)
        for batch in batches(index, part.spans, rows_of(length))
    ]
    job = Job(
        split,
        tuple(part.corpus.path for part in parts),
        length,
        max(_longest(part.spans) for part in parts),
        len(everything),
        rows_of(length),
    )
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(ScoreDump(dump)) if dump else None
        if workers:
            from jobs.evaluation.ray_scoring import ScoringOnRay

            cluster = dataclasses.replace(recipe.cluster, workers=workers)
            scoring = ScoringOnRay(run, checkpoint.update, job, cluster, stack)
        else:
            from jobs.evaluation.scoring import ScoringHere

            keep_freed_memory()
            scoring = ScoringHere(load_checkpoint(run, checkpoint), job)
        progress = stack.enter_context(
            console.progress("token", sum(_targets(part.spans) for part in parts))
        )
        began, done = time.monotonic(), 0
        for batch, scores in zip(everything, scoring.scores(everything), strict=True):
            part = parts[batch.corpus]
            for begin, span in zip(batch.spans[:, 0].tolist(), scores, strict=True):
                part.tally.add(begin, span)
                if writer:
                    writer.add(part.corpus.name, part.documents, begin, span)
                done += len(span.nats)
            progress.update(done, tokens_per_second=done / (time.monotonic() - began))
        elapsed = time.monotonic() - began
    for part in parts:
        _check_coverage(part, recipe.data.window == "stream")
    evaluation = _evaluation(run, settings, parts, done / elapsed)
    store(run, settings, evaluation)
    return evaluation


def _parts(mixture: Mixture, recipe: Recipe, settings: Settings) -> list[_Part]:
    """What is scored of each corpus."""
    cache = recipe.data.cache_bytes
    tables = [
        document_table(corpus.path, settings.split, cache_bytes=cache) for corpus in mixture.corpora
    ]
    few = sum(len(table.ids) for table in tables) < FEW_DOCUMENTS
    parts = []
    for corpus, table in zip(mixture.corpora, tables, strict=True):
        spans = evaluation_spans(
            table,
            sequence_length=settings.length,
            window=recipe.data.window,
            carry=settings.carry,
        )
        blocks = whole_documents(table)
        if few:
            windows = Windows(
                corpus.path, settings.split, sequence_length=settings.length, cache_bytes=cache
            )
            tokenizer = tokenizer_of(corpus.path, corpus.manifest)
            blocks = cut_documents(table, windows, tokenizer.token_bytes)
        parts.append(_Part(corpus, table, spans, Tally(blocks)))
    return parts


def _targets(spans: Spans) -> int:
    return int((spans[:, 1] - spans[:, 0]).sum())


def _longest(spans: Spans) -> int:
    return int((spans[:, 1] - spans[:, 0]).max())


def _check_coverage(part: _Part, eos: bool) -> None:
    """Raises RuntimeError unless every document got as many scores as it has targets."""
    scored = part.tally.by_document(part.tally.n_tokens)
    wrong = np.flatnonzero(scored != part.documents.tokens + eos)
    if wrong.size:
        name = part.documents.ids[wrong[0]]
        raise RuntimeError(
            f"{name}: {scored[wrong[0]]} scores for {part.documents.tokens[wrong[0]] + eos} targets"
        )


def _evaluation(
    run: RunDirectory, settings: Settings, parts: Sequence[_Part], tokens_per_second: float
) -> Evaluation:
    documents = Documents(
        corpus=[part.corpus.name for part in parts for _ in part.documents.ids],
        doc_id=[name for part in parts for name in part.documents.ids],
        nats=np.concatenate([p.tally.by_document(p.tally.nats) for p in parts]),
        n_tokens=np.concatenate([p.tally.by_document(p.tally.n_tokens) for p in parts]),
        n_correct=np.concatenate([p.tally.by_document(p.tally.n_correct) for p in parts]),
        n_bytes=np.concatenate([part.documents.n_bytes for part in parts]),
        n_words=np.concatenate([part.documents.n_words for part in parts]),
    )
    blocks = blocks_of(documents)
    if len(documents) < FEW_DOCUMENTS:
        blocks = Blocks(
            "blocks of 64 KiB",
            np.concatenate([part.tally.nats for part in parts]),
            np.concatenate([part.tally.n_tokens for part in parts]),
            np.concatenate([part.tally.blocks.n_bytes for part in parts]),
        )
    # One document after the other, as they are stored.
    nats = float(sum(documents.nats.tolist()))
    targets, n_bytes, n_words = (
        int(column.sum()) for column in (documents.n_tokens, documents.n_bytes, documents.n_words)
    )
    is_text = parts[0].corpus.manifest.tokenizer.kind != ImageTokenizer.kind
    corpora = {}
    for part in parts:
        of_corpus = float(sum(part.tally.by_document(part.tally.nats).tolist()))
        bits = of_corpus / NATS_PER_BIT
        corpora[part.corpus.name] = bits / int(part.documents.n_bytes.sum())
    return Evaluation(
        run=run.name,
        update=settings.update,
        split=settings.split,
        fingerprint=settings.fingerprint,
        length=settings.length,
        carry=settings.carry,
        windows=sum(len(part.spans) for part in parts),
        targets=targets,
        n_bytes=n_bytes,
        n_words=n_words,
        nats_per_token=nats / targets,
        bits_per_byte=nats / NATS_PER_BIT / n_bytes,
        bits_per_byte_interval=interval(blocks.nats / NATS_PER_BIT, blocks.n_bytes),
        word_perplexity=word_perplexity(nats, n_words) if is_text else None,
        accuracy=int(documents.n_correct.sum()) / targets,
        tokens_per_second=tokens_per_second,
        positions=_positions(parts),
        corpora=corpora,
        documents=documents,
        blocks=blocks,
    )


def word_perplexity(nats: float, n_words: int) -> float:
    """The convention of PG-19: the perplexity of a word, whatever the tokens it was cut into."""
    return math.exp(min(nats / max(n_words, 1), 700))


def _positions(parts: Sequence[_Part]) -> tuple[PositionBucket, ...]:
    """The buckets of all corpora together: those of one begin where those of the other do."""
    merged = []
    for buckets in itertools.zip_longest(
        *(part.tally.positions(_longest(part.spans)) for part in parts)
    ):
        there = [bucket for bucket in buckets if bucket]
        merged.append(
            PositionBucket(
                there[0].begin,
                max(bucket.end for bucket in there),
                sum(bucket.targets for bucket in there),
                sum(bucket.nats for bucket in there),
            )
        )
    return tuple(merged)


# ---- The command ---------------------------------------------------------------------------------


def evaluate_command(
    root: Location,
    name: str,
    split: str,
    *,
    update: int | None = None,
    length: int | None = None,
    carry: bool = False,
    workers: int = 0,
    dump: Path | None = None,
    console: Console,
    as_json: bool = False,
) -> Evaluation:
    """Evaluates, prints, and adds the figures to the run in MLflow.

    Args:
        root: where the runs are.
        name: of a run, or the path or URL of one or of one of its checkpoints.
    """
    if match := _CHECKPOINT.fullmatch(name):
        if update is not None:
            raise UserError(f"--update: {name} is a checkpoint already; give its run, or no update")
        name, update = match[1], int(match[2])
    run = RunDirectory.existing(root, name)
    figures = evaluate_run(
        run,
        split,
        update=update,
        length=length,
        carry=carry,
        workers=workers,
        dump=dump,
        console=console,
    )
    recipe = recipes.from_yaml(manifest_of(run, figures.update).recipe, run.name)
    yardstick = yardsticks(list(Mixture.load(recipe.data.corpora).weights), split)
    _track(run, recipe, figures, yardstick, console)
    if as_json:
        console.json(
            {
                **figures.figures(),
                "gzip_bits_per_byte": yardstick.gzip,
                "xz_bits_per_byte": yardstick.xz,
            }
        )
    else:
        print_evaluation(figures, yardstick, dump, console)
    return figures


def _track(
    run: RunDirectory,
    recipe: Recipe,
    figures: Evaluation,
    yardstick: Yardsticks,
    console: Console,
) -> None:
    from jobs.tracking.adding import add_artifact, add_to_run
    from jobs.training.train import store_of_run

    record = run.record()
    if record is None or record.mlflow_run_id is None:
        console.warning(f"run {run.name} has no MLflow run; the figures are printed only")
        return
    # Other ways to measure the same split are figures of their own.
    name = figures.split + ("-carried" if figures.carry else "")
    if figures.length != recipe.data.sequence_length and not figures.carry:
        name += f"-{figures.length}"
    values = {
        f"{name}/loss_nats_per_token": figures.nats_per_token,
        f"{name}/bits_per_byte": figures.bits_per_byte,
        f"{name}/accuracy": figures.accuracy,
        f"yardstick/{figures.split}_xz_bits_per_byte": yardstick.xz,
        f"yardstick/{figures.split}_gzip_bits_per_byte": yardstick.gzip,
    }
    if figures.word_perplexity is not None:
        values[f"{name}/word_perplexity"] = figures.word_perplexity
    if low_high := figures.bits_per_byte_interval:
        values[f"{name}/bits_per_byte_low"], values[f"{name}/bits_per_byte_high"] = low_high
    if len(figures.corpora) > 1:
        values |= {f"{name}/{corpus}/bits_per_byte": b for corpus, b in figures.corpora.items()}
    measured_on = None
    if len(figures.corpora) == 1:  # MLflow takes one, so those of a mixture are not named
        [corpus] = figures.corpora
        measured_on = f"{corpus}-{figures.split}", figures.fingerprint
    try:
        uri = store_of_run(run).uri
        add_to_run(uri, record.mlflow_run_id, values, figures.update, measured_on)
        picture = positions_png(
            figures.positions, f"{run.name}, {name} split, update {figures.update:,}"
        )
        plot = f"plots/loss_by_position_{name}_{figures.update:08d}.png"
        add_artifact(uri, record.mlflow_run_id, plot, picture)
    except UserError as error:  # the figures stand, whatever the tracking server does
        console.warning(f"the figures are not in MLflow: {error}")
