"""The stages of a flow, each by the commands that people use.

A stage has a key, the hash of all that its output follows from; a stage that is done under the
same key is not done again. What a stage does is itself resumed where it broke: prepare goes on
with its shards, a training with its newest checkpoint, an evaluation is read where it is stored.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from jobs.console import Console
from jobs.errors import UserError
from jobs.flow_file import Flow
from jobs.run_directory import RunDirectory
from pipeline.storage import Location, Store


class Champion(NamedTuple):
    """The checkpoint that is to be beaten."""

    run: str
    """Path or URL."""
    update: int
    weights: str
    """Hash of its arrays."""
    identity: str
    """Of the flow's recipe that it was trained by."""
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
    store: Store
    """The flow's folder, in which the champion is noted."""
    console: Console

    def champion(self) -> Champion | None:
        """Who is to be beaten now."""
        try:
            return Champion(**json.loads(self.store.read("champion.json")))
        except FileNotFoundError:
            return None

    def prepare(self) -> Corpus:
        """The corpus with what is new: an increment of train, validation and test as they were."""
        from jobs.prepare import PrepareOptions, prepare_corpus, settings_of, source_of

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
        from jobs.train import train

        if champion and (champion.identity, champion.trained_on) == (
            self._identity(),
            corpus.fingerprints["train"],
        ):
            self.console.line("nothing is new since the champion was trained")
            return Candidate(champion.run, champion.update, champion.weights, None)
        begin = None
        if champion and self.flow.begin_from == "champion":
            begin = f"{champion.run}@{champion.update}"
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

    def judge(self, corpus: Corpus, candidate: Candidate, champion: Champion | None) -> Verdict:
        """Evaluates both on the frozen validation split; the better one is champion afterwards."""
        from jobs.evaluate import evaluate_run

        ours = evaluate_run(
            RunDirectory(candidate.run),
            "validation",
            update=candidate.update,
            reuse=True,
            console=self.console,
        )
        if champion is None:
            verdict = Verdict("promoted", "the first champion", ours.bits_per_byte, None)
        elif champion.weights == candidate.weights:
            why = "the candidate is the champion: nothing is new since it was trained"
            return Verdict("inconclusive", why, ours.bits_per_byte, ours.bits_per_byte)
        else:
            try:
                theirs = evaluate_run(
                    RunDirectory(champion.run),
                    "validation",
                    update=champion.update,
                    reuse=True,
                    console=self.console,
                )
            except UserError as error:  # gone, or trained beside another validation split
                why = (
                    f"the champion cannot be evaluated on this text ({error}); remove"
                    f" {self.store.location}/champion.json to begin anew"
                )
                return Verdict("refused", why, ours.bits_per_byte, None)
            verdict = _decide(ours, theirs, self.flow)
        if verdict.outcome == "promoted":
            self._crown(corpus, candidate)
        return verdict

    def _identity(self) -> str:
        from jobs import recipe as recipes

        return recipes.identity(recipes.resolve(self.flow.recipe()))

    def _crown(self, corpus: Corpus, candidate: Candidate) -> None:
        from jobs.checkpoint_manifest import pin

        run = RunDirectory(candidate.run)
        pin(run, candidate.update, True)  # no retention takes the champion away
        champion = Champion(
            run=candidate.run,
            update=candidate.update,
            weights=candidate.weights,
            identity=self._identity(),
            trained_on=corpus.fingerprints["train"],
        )
        text = json.dumps(champion._asdict(), indent=2) + "\n"
        self.store.write("champion.json", text.encode())


def _decide(ours: Any, theirs: Any, flow: Flow) -> Verdict:
    """Promoted if the whole 95% interval of the paired difference is below -min_delta."""
    import math

    import numpy as np

    from jobs.bootstrap import interval

    bits = (ours.bits_per_byte, theirs.bits_per_byte)
    if not np.array_equal(ours.blocks.n_tokens, theirs.blocks.n_tokens):
        return Verdict("refused", "the two count the targets of the split differently", *bits)
    if flow.metric == "eval/bits_per_byte":
        unit, denominators = math.log(2), ours.blocks.n_bytes
    else:
        unit, denominators = 1.0, ours.blocks.n_tokens
    numerators = (ours.blocks.nats - theirs.blocks.nats) / unit
    difference = float(numerators.sum() / denominators.sum())
    bounds = interval(numerators, denominators)
    if bounds is None:
        why = f"{flow.metric} {difference:+.4f}, but {len(numerators)} items are too few to tell"
        return Verdict("inconclusive", why, *bits, difference)
    low, high = bounds
    outcome = "promoted" if high < -flow.min_delta else "worse" if low > 0 else "inconclusive"
    why = (
        f"{flow.metric} {difference:+.4f} (95% of {low:+.4f} to {high:+.4f}, paired over"
        f" {len(numerators)} {ours.blocks.kind})"
    )
    return Verdict(outcome, why, *bits, difference, low, high)


def _weights(run: RunDirectory, update: int) -> str:
    from jobs.checkpoint_manifest import manifest_of

    return _key(manifest_of(run, update).sums)


def _key(*parts: Any) -> str:
    """The hash of plain values, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
