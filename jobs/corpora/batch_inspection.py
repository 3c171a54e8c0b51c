"""`tvq inspect --step`: the documents and the text behind one batch of a training."""

from dataclasses import asdict
from typing import Any, NamedTuple

from jobs.console import Console
from jobs.errors import UserError
from jobs.evaluation.trained_model import recipe_of, refuse_other_text
from jobs.readable import in_one_line
from jobs.recipe import Recipe
from jobs.runs.ledger import skipped_batch
from jobs.runs.run_directory import RunDirectory
from pipeline.batch_contents import BatchRow, Span, batch_contents
from pipeline.manifest import tokenizer_of
from pipeline.mixture import Mixture
from pipeline.storage import Location
from pipeline.tokenizers import EOS, text_of

_CHARACTERS = 100
"""Of a row's text."""
_SPANS = 8
"""Documents of a row that are named; --json names all."""


class BatchOptions(NamedTuple):
    """What the command line says of a training on a plain corpus; None: as in a new recipe."""

    batch_size: int | None
    sequence_length: int | None
    update_length: int | None
    seed: int | None
    window: str | None
    shuffle_span: int | None


class _Training(NamedTuple):
    """What decides the batches."""

    mixture: Mixture
    batch_size: int
    sequence_length: int
    update_length: int
    seed: int
    window: Any
    shuffle_span: int | None


def batch_command(
    corpus: str | None,
    step: int,
    *,
    run: str | None,
    root: Location,
    options: BatchOptions,
    console: Console,
    as_json: bool = False,
) -> None:
    """Prints batch `step` of a training on the corpus, or of the run."""
    if run is not None:
        given = [name for name, value in options._asdict().items() if value is not None]
        if given:
            raise UserError(
                f"--{given[0].replace('_', '-')}: the run's recipe says it; leave it out with --run"
            )
        trained = RunDirectory.existing(root, run)
        training = _of_run(trained)
    else:
        assert corpus is not None
        trained, training = None, _of_corpus(corpus, options)
    skipped = skipped_batch(trained.store, step) if trained else None
    rows = _rows(training, step)
    per_batch = training.sequence_length // training.update_length
    updates = (step * per_batch + 1, (step + 1) * per_batch)
    texts = [_text(training.mixture, row) for row in rows]
    if as_json:
        tree = _as_json(training, step, updates, rows, texts)
        if trained:
            tree["skipped"] = [asdict(update) for update in skipped.updates] if skipped else []
        console.json(tree)
        return
    made = (
        f"update {updates[0]:,}" if per_batch == 1 else f"updates {updates[0]:,} to {updates[1]:,}"
    )
    console.result(
        f"batch {step:,} (counted from 0) is {made}: update u lies in batch (u - 1) // {per_batch}"
    )
    console.line(
        f"{training.batch_size} rows of {training.sequence_length:,} tokens, {per_batch}"
        f" update{'s' * (per_batch > 1)} of {training.update_length:,}; {training.window} windows,"
        f" seed {training.seed}"
    )
    for update in skipped.updates if skipped else []:
        console.result(
            f"update {update.update:,} was skipped: loss {update.loss:.4g} nats per token,"
            f" {update.sigmas:.1f} deviations above its mean, gradient norm"
            f" {update.gradient_norm:.4g}"
        )
    several = len(training.mixture.corpora) > 1
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        where = f"{training.mixture.corpora[row.corpus].name}, " if several else ""
        console.result("")
        console.result(
            f"row {number}  {where}window {row.window:,}, epoch {row.epoch:,}, {row.shard}"
        )
        for span in row.spans[:_SPANS]:
            console.result(f"  {_described(span)}")
        if len(row.spans) > _SPANS:
            console.result(f"  and {len(row.spans) - _SPANS:,} documents more")
        console.result(f"  | {in_one_line(text, _CHARACTERS)}")


def documents_of_batch(recipe: Recipe, mixture: Mixture, step: int) -> list[str]:
    """The ids of the documents that have tokens in batch `step` of a training, each once; of a
    mixture, behind the corpus's name.

    Raises:
        CorpusError: the corpus cannot be read now.
    """
    several = len(mixture.corpora) > 1
    names = [f"{corpus.name}: " if several else "" for corpus in mixture.corpora]
    rows = _rows(_of_recipe(recipe, mixture), step)
    return list(dict.fromkeys(names[row.corpus] + span.id for row in rows for span in row.spans))


def _rows(training: _Training, step: int) -> list[BatchRow]:
    return batch_contents(
        training.mixture,
        batch=step,
        batch_size=training.batch_size,
        sequence_length=training.sequence_length,
        seed=training.seed,
        window=training.window,
        shuffle_span=training.shuffle_span,
    )


def _of_run(run: RunDirectory) -> _Training:
    recipe, record = recipe_of(run), run.record()
    mixture = Mixture.load(recipe.data.corpora)
    assert record is not None
    refuse_other_text(run, mixture, "train", record.fingerprints["train"])
    return _of_recipe(recipe, mixture)


def _of_recipe(recipe: Recipe, mixture: Mixture) -> _Training:
    return _Training(
        mixture,
        recipe.training.batch_size,
        recipe.data.sequence_length,
        recipe.training.update_length,
        recipe.training.seed,
        recipe.data.window,
        recipe.data.shuffle_span,
    )


def _of_corpus(corpus: str, options: BatchOptions) -> _Training:
    usual = _of_recipe(Recipe(), Mixture.load({corpus: 1}))
    given = {name: value for name, value in options._asdict().items() if value is not None}
    training = usual._replace(**given)
    if "update_length" not in given:
        usual_length = min(usual.update_length, training.sequence_length)
        fits = training.sequence_length % usual_length == 0
        training = training._replace(
            update_length=usual_length if fits else training.sequence_length
        )
    if training.sequence_length % training.update_length:
        raise UserError(
            f"--update-length: must divide the {training.sequence_length} tokens of a row, got"
            f" {training.update_length}"
        )
    return training


def _text(mixture: Mixture, row: BatchRow) -> bytes:
    """What the row says; an end of a document is an empty line."""
    corpus = mixture.corpora[row.corpus]
    tokenizer = tokenizer_of(corpus.path, corpus.manifest)
    pieces, begin = [], 0
    for at in [*(row.targets == EOS).nonzero()[0].tolist(), len(row.targets)]:
        pieces.append(text_of(tokenizer, row.targets[begin:at]))
        begin = at + 1
        if sum(map(len, pieces)) > 4 * _CHARACTERS:
            break
    return b"\n\n".join(pieces)


def _described(span: Span) -> str:
    if span.begin == span.end:
        return f"{span.id}  its end of document"
    part = "whole" if span.end - span.begin == span.tokens else f"of {span.tokens:,}"
    ends = ", and its end of document" if span.eos else ""
    return f"{span.id}  tokens {span.begin:,} to {span.end - 1:,}, {part}{ends}"


def _as_json(
    training: _Training,
    step: int,
    updates: tuple[int, int],
    rows: list[BatchRow],
    texts: list[bytes],
) -> dict[str, Any]:
    settings = training._asdict()
    del settings["mixture"]
    corpora = training.mixture.corpora
    return {
        "batch": step,
        "first_update": updates[0],
        "last_update": updates[1],
        **settings,
        "rows": [
            {
                "row": row.row,
                "corpus": corpora[row.corpus].path,
                "epoch": row.epoch,
                "window": row.window,
                "shard": row.shard,
                "documents": [span._asdict() for span in row.spans],
                "text": in_one_line(text, _CHARACTERS),
            }
            for row, text in zip(rows, texts, strict=True)
        ],
    }
