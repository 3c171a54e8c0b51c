"""A training from a mixture: by recipe, resumed where corpora moved, refused with other weights."""

import io
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from jobs import recipe as recipes
from jobs.checkpoints.manifest import complete_checkpoints
from jobs.console import Console
from jobs.errors import UserError
from jobs.evaluation.evaluate import evaluate_command
from jobs.evaluation.trained_model import load_trained_model
from jobs.recipe_yaml import stated
from jobs.runs.metric_spool import MetricPoint
from jobs.runs.run_directory import RunDirectory
from jobs.training.train import train
from pipeline.errors import CorpusError
from pipeline.manifest import Manifest
from tests.micro import write_micro
from tests.pipeline.corpora import write_corpus

STEPS = 16  # of two updates a batch, four windows each: 32 rows, of which books have 8
BITS = "eval/bits_per_byte"


class Workplace(NamedTuple):
    folder: Path
    wiki: Path
    books: Path
    recipe: Path

    def loaded(self, *overrides: str) -> recipes.Recipe:
        fixed = (
            f"training.steps={STEPS}",
            f"optimizer.schedule_steps={STEPS}",
            "training.evaluate_every=8",
        )
        return recipes.load(str(self.recipe), (*fixed, *overrides))


class Begun(NamedTuple):
    output: str
    points: list[MetricPoint]
    run: RunDirectory

    @property
    def sums(self) -> dict[str, int]:
        """Over every bit of the newest checkpoint."""
        return complete_checkpoints(self.run)[-1].sums

    def losses(self) -> dict[int, float]:
        name = "train/loss_nats_per_token"
        return {point.step: point.values[name] for point in self.points if name in point.values}


def begin(workplace: Workplace, name: str, *overrides: str) -> Begun:
    output, points = io.StringIO(), []
    trained = train(
        workplace.loaded(*overrides),
        root=workplace.folder / "runs",
        name=name,
        console=Console(output, output),
        stated=stated(str(workplace.recipe), overrides),
        on_points=points.extend,
    )
    return Begun(output.getvalue(), points, trained.run)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    folder = tmp_path_factory.mktemp("a place with spaces")
    wiki, recipe = write_micro(folder)
    wiki = wiki.rename(folder / "wiki")
    books = folder / "books"
    pages = [[[b"the cat sat on the mat, and then the dog sat on it too\n" * 3]] * 4]
    write_corpus(books, train=pages, validation=pages, test=pages)
    return Workplace(folder, wiki, books, recipe)


def mixture(first: Path, a: float, second: Path, b: float) -> str:
    return f"data.mixture={{{first}: {a}, {second}: {b}}}"


@pytest.fixture(scope="module")
def undisturbed(workplace) -> Begun:
    return begin(workplace, "undisturbed", mixture(workplace.wiki, 3, workplace.books, 1))


@pytest.mark.compiles
@pytest.mark.tracking
def test_the_start_tells_shares_and_epochs(workplace, undisturbed):
    lines = undisturbed.output.splitlines()
    for name, weight in (("wiki", 3), ("books", 1)):
        split = Manifest.load(workplace.folder / name).splits["train"]
        assert (
            f"data      {name}, {weight} of 4 windows: {split.tokens:,} tokens of"
            f" {split.documents:,} documents, fingerprint {split.fingerprint[:16]}"
        ) in lines
    [epochs] = [line for line in lines if line.startswith("epochs")]
    n_windows = -(-(4 * (3 * 55 + 1)) // 64)  # of books: four pages of 165 bytes and their eos
    assert f"books {8 / n_windows:.2f} epochs" in epochs
    assert epochs.endswith(" over the training")
    assert not any("recipe" in line and "mixture" in line for line in lines)


@pytest.mark.compiles
@pytest.mark.tracking
def test_each_corpus_is_evaluated_on_its_own_and_all_together(workplace, undisturbed):
    evaluations = [point.values for point in undisturbed.points if BITS in point.values]
    assert len(evaluations) == 2
    sizes = {
        name: Manifest.load(workplace.folder / name).splits["validation"].n_bytes
        for name in ("wiki", "books")
    }
    for values in evaluations:
        bits = {name: values[f"eval/{name}/bits_per_byte"] for name in sizes}
        assert bits["wiki"] != bits["books"]
        together = sum(bits[name] * sizes[name] for name in sizes) / sum(sizes.values())
        assert values[BITS] == pytest.approx(together, rel=1e-12)


@pytest.mark.compiles
@pytest.mark.tracking
@pytest.mark.slow
def test_stopped_and_resumed_where_the_corpora_moved(workplace, undisturbed):
    begin(
        workplace,
        "moved",
        mixture(workplace.wiki, 3, workplace.books, 1),
        "training.steps=8",
    )
    elsewhere = workplace.folder / "elsewhere"
    shutil.copytree(workplace.books, elsewhere)
    resumed = begin(workplace, "moved", mixture(elsewhere, 0.25, workplace.wiki, 0.75))
    assert "resuming from the checkpoint at update 8" in resumed.output
    assert resumed.sums == undisturbed.sums
    later = resumed.losses()
    assert list(later) == list(range(9, STEPS + 1))
    assert later.items() <= undisturbed.losses().items()
    # And what reads the run finds the corpora where it was last trained from.
    trained = load_trained_model(resumed.run)
    assert {corpus.path for corpus in trained.mixture().corpora} == {
        str(workplace.wiki),
        str(elsewhere),
    }


@pytest.mark.compiles
@pytest.mark.tracking
def test_other_weights_or_corpora_are_refused_with_the_difference(workplace, undisturbed):
    wiki, books = workplace.wiki, workplace.books
    before = undisturbed.run.recipe_text()
    with pytest.raises(UserError) as caught:
        begin(workplace, "undisturbed", mixture(wiki, 1, books, 1))
    assert "was begun with other weights" in str(caught.value)
    there, here = str(caught.value).split("there they are ")[1].split(", here ")
    assert "wiki 3" in there
    assert "wiki 1" in here
    assert "--run" in here
    for data in (f"data.corpus={wiki}", f"data.mixture={{{wiki}: 3}}"):
        with pytest.raises(UserError, match="was begun on another corpus: the train split there"):
            begin(workplace, "undisturbed", data)
    assert undisturbed.run.recipe_text() == before


@pytest.mark.compiles
@pytest.mark.tracking
def test_evaluation_scores_each_split_whole(workplace, undisturbed):
    output = io.StringIO()
    root = workplace.folder / "runs"
    figures = evaluate_command(root, "undisturbed", "test", console=Console(output, output))
    splits = {
        name: Manifest.load(workplace.folder / name).splits["test"] for name in ("wiki", "books")
    }
    assert figures.n_bytes == sum(split.n_bytes for split in splits.values())
    assert figures.targets == sum(split.tokens + split.documents for split in splits.values())
    for name in splits:
        own = np.array(figures.documents.corpus) == name
        bits = figures.documents.nats[own].sum() / math.log(2) / splits[name].n_bytes
        assert figures.corpora[name] == pytest.approx(bits, rel=1e-12)
        assert figures.documents.n_bytes[own].sum() == splits[name].n_bytes
        assert f"  on {name}" in output.getvalue()
    together = sum(figures.corpora[name] * splits[name].n_bytes for name in splits)
    assert figures.bits_per_byte == pytest.approx(together / figures.n_bytes, rel=1e-9)


def test_mistakes_are_named_before_anything_is_written(workplace):
    wiki, books = workplace.wiki, workplace.books
    with pytest.raises(UserError, match=r"data\.mixture: takes the place of data\.corpus"):
        workplace.loaded(f"data.corpus={wiki}", f"data.mixture={{{wiki}: 1}}")
    for weight in ("many", "true", "[1]", "null"):
        with pytest.raises(UserError, match=r"data\.mixture\.a"):
            workplace.loaded(f"data.mixture={{a: {weight}}}")
    twice = f"data.mixture={{{wiki}: 3, {wiki.parent / '.' / 'wiki' / ''}/: 1}}"
    for data, message in (
        (twice, r"data\.mixture: names .*wiki twice"),
        (mixture(wiki, 1, books, 0), "must be more than 0, got 0"),
        (mixture(wiki, 1, workplace.folder / "nowhere", 1), "nowhere: there is no such folder"),
        ("data.mixture={}", r"data\.corpus: no corpus given"),
    ):
        with pytest.raises((UserError, CorpusError), match=message):
            begin(workplace, "mistaken", data)
    assert not (workplace.folder / "runs" / "mistaken").exists()


def test_a_mixture_survives_yaml_and_does_not_change_the_identity(workplace):
    recipe = workplace.loaded("data.mixture={a b/c: 3, 'd: #e': 0.5}")
    assert recipe.data.mixture == {"a b/c": 3, "d: #e": 0.5}
    assert recipes.from_yaml(recipes.to_yaml(recipe), "here") == recipe
    assert recipes.identity(recipe) == recipes.identity(workplace.loaded())
    assert recipe.data.corpora == recipe.data.mixture
    assert workplace.loaded("data.corpus=x").data.corpora == {"x": 1}
    assert workplace.loaded().data.corpora == {}
