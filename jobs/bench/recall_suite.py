"""`tvq bench recall`: what a model remembers, by how far back it lies.

The documents are pairs of a key and a value, each pair twice (`pipeline/recall_documents.py`). One
recipe is trained three times: with attention to all keys as they are, the control that must solve
the task or the comparison says nothing; with quantised keys behind a compressive cache; and with
the window alone. Accuracy is taken from the log-probabilities of every token of the test split.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from jobs import recipe as recipes
from jobs.console import Console
from jobs.evaluation.evaluate import evaluate_run
from jobs.recipe import Recipe
from jobs.training.train import train
from pipeline.formats import FormatSettings
from pipeline.plan import PrepareSettings
from pipeline.prepare import prepare
from pipeline.recall_documents import VALUES, RecallDocuments, recall_documents
from pipeline.sources import SourceSettings
from pipeline.storage import LocalStore
from pipeline.tasks import run_here
from pipeline.tokenizers import TOKEN_OFFSET

CONTROL = "dense"
VARIANTS = {
    CONTROL: ("model.quantized_keys=false", "model.kmeans_iterations=0", "model.revive_below=0"),
    "vq": (),
    "window-only": ("model.compressive_cache=false",),
}
SOLVED = 0.99
"""Accuracy from which the control counts as having learnt the task."""
HELD_OUT = 512
"""Documents of the validation split, and of the test split."""
SEED = 0


class Recall(NamedTuple):
    """The answers of one model at distances from `begin` up to `end`."""

    begin: int
    end: int
    questions: int
    correct: int


def recall_command(
    name: str,
    overrides: tuple[str, ...],
    *,
    output: Path,
    documents: int,
    console: Console,
    as_json: bool = False,
) -> dict[str, list[Recall]]:
    """Makes the corpus, trains and evaluates the variants, and prints accuracy by distance.

    What an earlier call in `output` finished is not done again.
    """
    corpus, runs = output / "corpus", output / "runs"
    fixed = (f"data.corpus={corpus}",)
    variants = {
        variant: recipes.load(name, (*overrides, *changed, *fixed))
        for variant, changed in VARIANTS.items()
    }
    recipe = variants["vq"]
    length = recipe.data.sequence_length
    write_recall_corpus(output / "texts", corpus, documents, length)
    asked = recall_documents(SEED, _numbers(documents)["test"], length)
    found = {}
    for variant, variant_recipe in variants.items():
        console.heading(f"train {variant}")
        run = train(variant_recipe, root=runs, name=variant, console=console).run
        dump = output / f"{variant}.parquet"
        evaluate_run(run, "test", dump=dump, console=console)
        found[variant] = by_distance(answers(dump, asked), asked.distances)
    if as_json:
        console.json(_as_json(recipe, found))
        return found
    console.heading("recall by distance")
    _print(recipe, found, console)
    return found


def write_recall_corpus(texts: Path, corpus: Path, documents: int, length: int) -> None:
    """Writes a line a document, split by split, and prepares that."""
    for split, numbers in _numbers(documents).items():
        lines = recall_documents(SEED, numbers, length).texts
        data = b"".join(line.tobytes() + b"\n" for line in lines)
        if not LocalStore(texts).exists(f"{split}.txt") or (
            LocalStore(texts).read(f"{split}.txt") != data
        ):
            LocalStore(texts).write(f"{split}.txt", data)
    settings = PrepareSettings(
        SourceSettings((str(texts),)), format=FormatSettings("lines"), split_by="name"
    )
    prepare(settings, corpus, run_here)


def answers(dump: Path, asked: RecallDocuments) -> npt.NDArray[np.bool_]:
    """Whether each byte [documents, T] of the test split was the likeliest, from its dump.

    Raises RuntimeError if the dump is of other documents.
    """
    table = pq.read_table(dump, columns=["position", "token", "correct"])
    shape = asked.texts.shape
    position, token, correct = (
        table[name].to_numpy().reshape(shape) for name in ("position", "token", "correct")
    )
    same = np.array_equal(token - TOKEN_OFFSET, asked.texts)
    if not (same and np.array_equal(position, np.broadcast_to(np.arange(shape[1]), shape))):
        raise RuntimeError(f"{dump}: holds other documents than those that were asked about")
    return correct


def by_distance(correct: npt.NDArray[np.bool_], distances: npt.NDArray[np.int64]) -> list[Recall]:
    """The answers at distances 2 to 3, 4 to 7, 8 to 15, ..."""
    found, begin = [], 2
    while begin <= distances.max():
        here = (distances >= begin) & (distances < 2 * begin)
        found.append(Recall(begin, 2 * begin, int(here.sum()), int(correct[here].sum())))
        begin *= 2
    return found


def accuracy(found: list[Recall]) -> float:
    """Over all distances."""
    return sum(part.correct for part in found) / sum(part.questions for part in found)


def _numbers(documents: int) -> dict[str, range]:
    """The numbers of each split's documents; the held-out ones first, whatever `documents` is."""
    return {
        "validation": range(HELD_OUT),
        "test": range(HELD_OUT, 2 * HELD_OUT),
        "train": range(2 * HELD_OUT, 2 * HELD_OUT + documents),
    }


def _print(recipe: Recipe, found: dict[str, list[Recall]], console: Console) -> None:
    model = recipe.model
    console.line(
        f"accuracy of recalled values; the window has {model.window} tokens, the codebook"
        f" {model.n_codes} codes, a document {recipe.data.sequence_length // 4} keys; guessing"
        f" gives {1 / len(VALUES):.1%}"
    )
    distances = found[CONTROL]
    rows = [
        [
            f"{part.begin} to {part.end - 1}",
            f"{part.questions:,}",
            *(f"{found[variant][index].correct / part.questions:.1%}" for variant in found),
        ]
        for index, part in enumerate(distances)
    ]
    questions = sum(part.questions for part in distances)
    rows.append(["all", f"{questions:,}", *(f"{accuracy(parts):.1%}" for parts in found.values())])
    console.table(["distance", "questions", *found], rows)
    if accuracy(distances) < SOLVED:
        console.warning(
            f"the control has not learnt the task ({accuracy(distances):.1%}, needs {SOLVED:.0%}):"
            " the others say nothing yet; train longer with training.steps"
        )


def _as_json(recipe: Recipe, found: dict[str, list[Recall]]) -> dict[str, object]:
    return {
        "window": recipe.model.window,
        "codes": recipe.model.n_codes,
        "keys": recipe.data.sequence_length // 4,
        "control_solved": accuracy(found[CONTROL]) >= SOLVED,
        "accuracy": {variant: accuracy(parts) for variant, parts in found.items()},
        "by_distance": {
            variant: [part._asdict() for part in parts] for variant, parts in found.items()
        },
    }
