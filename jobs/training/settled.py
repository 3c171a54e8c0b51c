"""What a training is: its recipe and its corpora, settled against what its run was begun with."""

from dataclasses import replace
from typing import Any

from jobs import recipe as recipes
from jobs.checkpoints import init_from
from jobs.errors import UserError
from jobs.recipe import Recipe
from jobs.runs.run_directory import RunDirectory, RunRecord
from pipeline.mixture import Mixture
from pipeline.shards import check_length
from pipeline.storage import open_store


def with_corpora(recipe: Recipe) -> tuple[Recipe, Mixture]:
    """The recipe with absolute paths to its corpora, and these, checked."""
    named = recipe.data.corpora
    if not named:
        raise UserError(
            "data.corpus: no corpus given; make one with `tvq prepare FOLDER --output corpus` and"
            " add data.corpus=corpus"
        )
    # Absolute: workers and a later start need not share our working folder.
    weights: dict[str, int | float] = {}
    for name, weight in named.items():
        path = open_store(name).location
        if path in weights:
            raise UserError(f"data.mixture: names {path} twice; name it once, with both weights")
        weights[path] = weight
    mixture = Mixture.load(weights)
    tokenizer = mixture.tokenizer
    if recipe.model.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size: is {recipe.model.vocab_size}, but the tokenizer of"
            f" {mixture.corpora[0].path} ({tokenizer.kind}) has {tokenizer.vocab_size} ids; set"
            f" model.vocab_size={tokenizer.vocab_size}"
        )
    for split in ("train", "validation"):
        for corpus, held in zip(mixture.corpora, mixture.splits(split), strict=True):
            for shard in held.shards:
                check_length(corpus.path, shard)
    if recipe.data.mixture:
        data = replace(recipe.data, mixture=weights)
    else:
        data = replace(recipe.data, corpus=str(mixture.corpora[0].path))
    return replace(recipe, data=data), mixture


def settled(run: RunDirectory, recipe: Recipe, stated: frozenset[str] | None) -> Recipe:
    """The recipe to train by.

    On resume the stored mathematical fields stand, so that another version's defaults change
    nothing; a stated one that differs is refused. Operational fields are those asked for.

    Raises:
        UserError: the run exists with other mathematics.
    """
    stored = None
    if run.record():
        stored = recipes.from_yaml(run.recipe_text(), f"{run.location}/recipe.yaml")
    recipe = init_from.settle(recipes.resolve(recipe, stored), stored, run.root)
    if not stored:
        return recipe
    changes = recipes.difference(recipe, stored, mathematical_only=True, only=stated)
    if changes:
        raise UserError(
            f"run {run.name}: exists with other mathematics; asked for (and stored):"
            f" {'; '.join(changes)}. Give the stored values to resume it, or choose another"
            " name with --run"
        )
    return recipes.with_mathematics_of(stored, recipe)


def begin_or_resume(
    run: RunDirectory, recipe: Recipe, mixture: Mixture, stated: frozenset[str] | None
) -> tuple[Recipe, RunRecord]:
    """The recipe to train by, and who the run is."""
    stored = run.record() is not None
    recipe, origin = settled(run, recipe, stated), None
    if not stored:
        recipe, origin = init_from.look_up(recipe, run.root)
    identity, text = recipes.identity(recipe), recipes.to_yaml(recipe)
    record = run.claim(identity, mixture.fingerprints(), text, origin)
    if not stored and record.identity != identity:
        raise UserError(
            f"run {run.name}: was begun this moment by another process with other mathematics;"
            " choose another name with --run"
        )
    refuse_other_corpus(run, record, mixture)
    return recipe, record


def refuse_other_corpus(run: RunDirectory, record: RunRecord, mixture: Mixture) -> None:
    """Raises UserError if the run was begun on another corpus."""
    for split in ("train", "validation"):
        if difference := mixture.difference(split, record.fingerprints[split]):
            raise UserError(
                f"run {run.name}: was begun {difference}; give what it was begun with to resume"
                " it, or choose another name with --run"
            )


def changed_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields that are not as in a new recipe, but for the corpora."""
    defaults = recipes.flatten(Recipe())
    return {
        name: value
        for name, value in recipes.flatten(recipe).items()
        if value != defaults[name] and name not in ("data.corpus", "data.mixture")
    }
