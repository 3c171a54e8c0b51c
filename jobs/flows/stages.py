"""The stages of a flow, each by the commands that people use.

A stage has a key, the hash of all that its output follows from; a stage that is done under the
same key is not done again. What a stage does is itself resumed where it broke: prepare goes on
with its shards, a training with its newest checkpoint, an evaluation is read where it is stored.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jobs.console import Console
from jobs.flows.flow_file import Flow
from jobs.runs.run_directory import RunDirectory
from pipeline.storage import Location


class Champion(NamedTuple):
    """The version of the flow's model that is to be beaten."""

    version: int
    run: str
    """Path or URL of the run that it was trained in."""
    update: int
    file: str
    """Path or URL of its weights, which no retention touches."""
    weights: str
    """Hash of its arrays."""
    identity: str
    """Of the recipe that it was trained by, wherever that training began."""
    trained_on: str
    """Fingerprint of the train split."""


class Corpus(NamedTuple):
    """What prepare left behind."""

    location: str
    fingerprints: dict[str, str]
    """Of each split."""
    documents: int
    """Of train."""
    tokens: int
    """Of train."""
    increments: int
    reused: bool
    """Nothing was new."""


class Candidate(NamedTuple):
    """What training left behind."""

    run: str
    """Path or URL."""
    update: int
    weights: str
    mlflow_run_id: str | None


class Verdict(NamedTuple):
    """What became of a candidate."""

    outcome: str
    """promoted, inconclusive, worse or refused."""
    why: str
    bits_per_byte: float
    """The candidate's."""
    champion_bits_per_byte: float | None
    """Of the champion before; None if there was none, or it cannot be compared with."""
    difference: float | None = None
    low: float | None = None
    """Ends of the 95% interval of the difference."""
    high: float | None = None


@dataclass
class Stages:
    """The stages of one flow."""

    flow: Flow
    root: Location
    console: Console

    def champion(self) -> Champion | None:
        """Who is to be beaten now: the champion of the model that is named as the flow."""
        from jobs import recipe as recipes
        from jobs.registry.promote import champion
        from jobs.registry.registered_model import ModelFolder

        version = champion(self.root, self.flow.name)
        if version is None:
            return None
        folder = ModelFolder(self.root, self.flow.name)
        recipe = folder.recipe(version.version)
        recipe = replace(recipe, training=replace(recipe.training, init_from=None))
        return Champion(
            version=version.version,
            run=version.run_location,
            update=version.update,
            file=folder.weights(version.version),
            weights=_key(version.sums),
            identity=recipes.identity(recipe),
            trained_on=version.fingerprints["train"],
        )

    def prepare(self) -> Corpus:
        """The corpus with what is new: an increment of train, validation and test as they were."""
        from jobs.corpora.prepare import PrepareOptions, prepare_corpus, settings_of, source_of

        options = self.flow.prepare_options()
        output, refresh = options.pop("output"), options.pop("refresh_held_out")
        options.pop("as_json")
        source = source_of(
            options.pop("sources"),
            options.pop("stdlib"),
            options.pop("include"),
            options.pop("exclude"),
        )
        settings = settings_of(source, PrepareOptions(**options))
        prepared = prepare_corpus(settings, output, self.console, refresh_held_out=refresh)
        splits = prepared.manifest.splits
        return Corpus(
            location=output,
            fingerprints={name: split.fingerprint for name, split in splits.items()},
            documents=splits["train"].documents,
            tokens=splits["train"].tokens,
            increments=len(prepared.manifest.increments),
            reused=prepared.reused,
        )

    def train_key(self, corpus: Corpus, champion: Champion | None) -> str:
        """Of the mathematics, the text, and where it begins."""
        begin = champion.weights if champion and self.flow.begin_from == "champion" else None
        return _key("train", self._identity(), corpus.fingerprints, begin)

    def train(self, key: str, corpus: Corpus, champion: Champion | None) -> Candidate:
        """A training under a name made of its key: one that broke goes on, one that is done is
        found. The champion itself if it was trained by this recipe on this text."""
        from jobs.training.train import train

        if champion and (champion.identity, champion.trained_on) == (
            self._identity(),
            corpus.fingerprints["train"],
        ):
            self.console.line("nothing is new since the champion was trained")
            return Candidate(champion.run, champion.update, champion.weights, None)
        begin = None
        if champion and self.flow.begin_from == "champion":
            begin = champion.file
        name = f"{self.flow.name}-{key[:10]}"
        trained = train(self.flow.recipe(begin), root=self.root, name=name, console=self.console)
        record = trained.run.record()
        assert record is not None, "a run that was trained was claimed"
        return Candidate(
            run=trained.run.location,
            update=trained.update,
            weights=_weights(trained.run, trained.update),
            mlflow_run_id=record.mlflow_run_id,
        )

    def judge_key(self, corpus: Corpus, candidate: Candidate, champion: Champion | None) -> str:
        """Of both models, the text that they are held against, and the rule."""
        return _key(
            "judge",
            candidate.weights,
            champion and champion.weights,
            corpus.fingerprints["validation"],
            self.flow.metric,
            self.flow.min_delta,
        )

    def judge(self, candidate: Candidate, champion: Champion | None) -> Verdict:
        """Registers the candidate and promotes it if it is better on the validation split."""
        from jobs.registry.promote import promote
        from jobs.registry.register import register
        from jobs.registry.registered_model import ModelFolder
        from jobs.registry.scored_version import scored

        name = self.flow.name
        folder = ModelFolder(self.root, name)

        def bits_per_byte(version: int) -> float:
            return scored(folder, folder.version(version), self.console).bits_per_byte

        if champion and champion.weights == candidate.weights:
            why = "the candidate is the champion: nothing is new since it was trained"
            bits = bits_per_byte(champion.version)
            return Verdict("inconclusive", why, bits, bits)
        registered = register(RunDirectory(candidate.run), name, update=candidate.update)
        version = registered.version.version
        promotion = promote(
            self.root,
            name,
            version=version,
            metric=self.flow.metric,
            min_delta=self.flow.min_delta,
            console=self.console,
        )
        why, theirs = promotion.why, None
        if promotion.outcome == "refused":
            why += "; a flow of another name begins anew"
        elif champion:
            theirs = bits_per_byte(champion.version)
        return Verdict(
            promotion.outcome,
            why,
            bits_per_byte(version),
            theirs,
            promotion.difference,
            promotion.low,
            promotion.high,
        )

    def _identity(self) -> str:
        from jobs import recipe as recipes

        return recipes.identity(recipes.resolve(self.flow.recipe()))


def _weights(run: RunDirectory, update: int) -> str:
    from jobs.checkpoints.init_from import network_sums
    from jobs.checkpoints.manifest import manifest_of

    return _key(network_sums(manifest_of(run, update).sums))


def _key(*parts: Any) -> str:
    """The hash of plain values, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
