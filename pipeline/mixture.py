"""Weighted mixtures of corpora: which corpus a row of training comes from, and which of its rows.

Weights are whole numbers without a common divisor; their sum is the period W. Every W rows hold
exactly w rows of a corpus of weight w, shuffled, so the proportions are exact for ever. A row is a
window: in `stream` mode the weights are those of tokens, in `document` mode those of documents.

Each corpus keeps its own endless epoch sequence (`order.Order`), as if it were alone. One that
runs out begins its next epoch, in a new permutation, while the others are still in an earlier one;
nothing waits and nothing is left out. `Mixture.epochs` says how often that happens.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import CorpusError
from pipeline.manifest import SPLITS, Manifest, Split, TokenizerInfo
from pipeline.order import Order, mix
from pipeline.windows import WindowMode, Windows, window_count

LARGEST_PERIOD = 4096
"""Most that whole weights may add up to: a period is the work of finding one row in it."""

Weight = int | float


class MixedCorpus(NamedTuple):
    """One corpus of a mixture."""

    path: str
    name: str
    """The end of its path that tells it from the others, for people and for metrics."""
    weight: int
    """Rows of each period."""
    manifest: Manifest


@dataclass(frozen=True)
class Mixture:
    """Prepared corpora of one tokenizer, and their weights; one corpus alone is a mixture too."""

    corpora: tuple[MixedCorpus, ...]
    """By the fingerprints of their train splits: where they lie and in which order they were named
    changes nothing."""

    @classmethod
    def load(cls, weights: Mapping[str, Weight] | Mapping[Path, Weight]) -> "Mixture":
        """Read the manifests of the corpus folders.

        Raises `CorpusError` for a folder that is no corpus, for weights that are not positive or
        whose period is over `LARGEST_PERIOD`, for corpora of different tokenizers and for one
        corpus that is named twice.
        """
        whole = whole_weights({str(path): weight for path, weight in weights.items()})
        names = _names(list(whole))
        members = [
            MixedCorpus(path, names[path], weight, Manifest.load(path))
            for path, weight in whole.items()
        ]
        first = members[0]
        for member in members[1:]:
            ours, theirs = first.manifest.tokenizer, member.manifest.tokenizer
            if (ours.fingerprint, ours.vocab_size) != (theirs.fingerprint, theirs.vocab_size):
                raise CorpusError(
                    f"data.mixture: {first.path} has {_described(ours)}, {member.path} has"
                    f" {_described(theirs)}; prepare them with one tokenizer"
                )
        members.sort(key=_train_fingerprint)
        for member, other in itertools.pairwise(members):
            if _train_fingerprint(member) == _train_fingerprint(other):
                raise CorpusError(
                    f"data.mixture: {member.path} and {other.path} have the same train split; name"
                    " one of them, with the sum of their weights"
                )
        return cls(tuple(members))

    @property
    def period(self) -> int:
        """W: the sum of the weights."""
        return sum(corpus.weight for corpus in self.corpora)

    @property
    def weights(self) -> dict[str, int]:
        """The weight of each corpus by its path."""
        return {corpus.path: corpus.weight for corpus in self.corpora}

    @property
    def tokenizer(self) -> TokenizerInfo:
        """What all the corpora were tokenised with."""
        return self.corpora[0].manifest.tokenizer

    def splits(self, name: str) -> list[Split]:
        """A split of each corpus; raises `CorpusError` if one has none or it is empty."""
        found = []
        for corpus in self.corpora:
            try:
                found.append(corpus.manifest.split(name))
            except CorpusError as error:
                raise CorpusError(f"{corpus.path}: {error}") from None
        return found

    def fingerprint(self, split: str) -> str:
        """What identifies a split of the mixture: the corpora's fingerprints and, in training,
        their weights. Of one corpus alone it is that split's own.
        """
        prints = [corpus.manifest.splits[split].fingerprint for corpus in self.corpora]
        if split != "train":
            return "+".join(prints)
        return _joined([corpus.weight for corpus in self.corpora], prints)

    def fingerprints(self) -> dict[str, str]:
        """Of every split."""
        return {split: self.fingerprint(split) for split in SPLITS}

    def difference(self, split: str, recorded: str) -> str | None:
        """How a training that recorded this fingerprint of a split was begun otherwise, as the end
        of the sentence "it was begun ..."; None if it was begun with this mixture.
        """
        if recorded == self.fingerprint(split):
            return None
        then = {part[-64:]: int(part[:-65] or 1) for part in recorded.split("+")}
        if split == "train" and then.keys() == set(map(_train_fingerprint, self.corpora)):
            there = ", ".join(f"{c.name} {then[_train_fingerprint(c)]}" for c in self.corpora)
            here = ", ".join(f"{c.name} {c.weight}" for c in self.corpora)
            return f"with other weights: there they are {there}, here {here}"
        there, here = (
            re.sub("[0-9a-f]{64}", lambda match: match[0][:16], text)
            for text in (recorded, self.fingerprint(split))
        )
        return f"on another corpus: the {split} split there has fingerprint {there}, here {here}"

    def epochs(
        self, rows: int, *, sequence_length: int, window: WindowMode = "stream"
    ) -> list[float]:
        """How many epochs of each corpus so many rows of training are."""
        lengths = [
            window_count(corpus.manifest.split("train"), sequence_length, window)
            for corpus in self.corpora
        ]
        return [
            rows * corpus.weight / self.period / length
            for corpus, length in zip(self.corpora, lengths, strict=True)
        ]


class Places(NamedTuple):
    """Where rows of a mixture come from."""

    corpora: npt.NDArray[np.int64]
    """[rows]: the index of the corpus."""
    rows: npt.NDArray[np.int64]
    """[rows]: of that corpus's own endless epoch sequence."""


class MixtureOrder:
    """Rows of the endless sequence of a mixture -> windows of its corpora.

    In each period of W rows, those with the w smallest hashes of their number and the key belong
    to the first corpus, the next to the second, and so on; they take that corpus's own rows in
    sequence, so that it comes in its own `Order`. Everything is computed from the number of the
    row: nothing is stored, any row is found at once, by any number of hosts. One corpus alone has
    its own order, untouched.

    The order is a function of the fingerprints, the weights, the seed and each corpus's `Order`.
    """

    def __init__(
        self,
        orders: Sequence[Order],
        weights: Sequence[int],
        *,
        fingerprints: Sequence[str],
        seed: int,
    ) -> None:
        """Mix corpora: of each its order, its whole weight (at least 1) and its fingerprint."""
        if min(weights) < 1:
            raise ValueError(f"weights: must be at least 1, got {list(weights)}")
        self._orders = list(orders)
        self._weights = np.array(weights, np.int64)
        self._period = sum(weights)
        # What is dealt out in a period: the corpora, and the ranks of their rows in it.
        self._corpora = np.repeat(np.arange(len(weights)), weights)
        self._ranks = np.concatenate([np.arange(weight) for weight in weights])
        text = f"tvq mixture 1 {_joined(weights, fingerprints)} {seed}"
        self._key = np.frombuffer(hashlib.sha512(text.encode()).digest(), "<u8")[0]
        self.n = max(
            1, min(o.n * self._period // w for o, w in zip(self._orders, weights, strict=True))
        )
        """Rows in which no corpus ends more than one epoch."""

    def windows(self, rows: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The corpora and, in them, the windows at rows [rows], each at least 0."""
        corpora, own = self.places(rows)
        windows = np.empty_like(own)
        for index, order in enumerate(self._orders):
            here = corpora == index
            windows[here] = order.windows(own[here])
        return corpora, windows

    def places(self, rows: npt.ArrayLike) -> Places:
        """The corpora and, of their own sequences, the rows at rows [rows], each at least 0.

        The work is W for each period that the rows touch.
        """
        rows = np.asarray(rows, np.int64)
        if rows.size and int(rows.min()) < 0:
            raise IndexError("rows of the epoch sequence begin at 0")
        if len(self._orders) == 1:
            return Places(np.zeros_like(rows), rows)
        periods, of_row = np.unique(rows // self._period, return_inverse=True)
        numbers = periods[:, None] * self._period + np.arange(self._period)
        by_hash = np.argsort(mix(numbers.astype(np.uint64), self._key), axis=1, kind="stable")
        corpora = np.empty_like(numbers)
        np.put_along_axis(corpora, by_hash, self._corpora[None], axis=1)
        by_corpus = np.argsort(corpora, axis=1, kind="stable")
        ranks = np.empty_like(numbers)
        np.put_along_axis(ranks, by_corpus, self._ranks[None], axis=1)
        at = of_row.reshape(rows.shape), rows % self._period
        chosen = corpora[at]
        return Places(chosen, rows // self._period * self._weights[chosen] + ranks[at])


class MixedWindows(NamedTuple):
    """The windows of one split of several corpora, and the order in which training takes them."""

    sources: list[Windows]
    orders: list[Order]
    """Of each corpus's own windows."""
    weights: list[int]
    order: MixtureOrder

    def fetch_ahead(self, row: int) -> None:
        """Have the shards fetched that the rows from `row` of the endless sequence on need."""
        if not any(source.is_remote for source in self.sources):
            return
        # A period has rows of each corpus.
        corpora, own = self.order.places(np.arange(row, row + sum(self.weights)))
        for index, source in enumerate(self.sources):
            first = int(own[corpora == index].min())
            source.prefetch(self.orders[index].shards_ahead(first))


def mixed_windows(
    weights: Mapping[str, int],
    split: str,
    *,
    sequence_length: int,
    seed: int,
    window: WindowMode,
    shuffle_span: int | None,
    cache_bytes: int | None = None,
) -> MixedWindows:
    """Lay out a split of each corpus and their order; the weights are whole.

    Raises `CorpusError` for what the manifests show.
    """
    sources = [
        Windows(
            path,
            split,
            sequence_length=sequence_length,
            mode=window,
            # Two spans, and the shard in which a window that begins in them ends.
            shards_at_once=None if shuffle_span is None else 2 * shuffle_span + 1,
            cache_bytes=cache_bytes,
        )
        for path in weights
    ]
    fingerprints = [source.split.fingerprint for source in sources]
    orders = [
        Order(source.shard_windows, fingerprint=text, seed=seed, shuffle_span=shuffle_span)
        for source, text in zip(sources, fingerprints, strict=True)
    ]
    whole = list(weights.values())
    order = MixtureOrder(orders, whole, fingerprints=fingerprints, seed=seed)
    return MixedWindows(sources, orders, whole, order)


def whole_weights(weights: Mapping[str, Weight]) -> dict[str, int]:
    """The weights as the smallest whole numbers in their proportion: 0.7 and 0.3 are 7 and 3.

    Raises `CorpusError` if there are none, if one is not positive or if their sum is over
    `LARGEST_PERIOD`.
    """
    if not weights:
        raise CorpusError("data.mixture: names no corpus; give {FOLDER: WEIGHT, ...}")
    for path, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise CorpusError(
                f"data.mixture: the weight of {path} must be more than 0, got {weight}; leave a"
                " corpus out to train without it"
            )
    # By their decimals: the float 0.1 itself is a fraction over 2**55.
    exact = [Fraction(str(weight)) for weight in weights.values()]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * scale) for fraction in exact]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    if sum(whole) > LARGEST_PERIOD:
        raise CorpusError(
            f"data.mixture: the weights are in the proportion {':'.join(map(str, whole))}, which"
            f" adds up to {sum(whole)}, and may add up to {LARGEST_PERIOD}; round them to a"
            " proportion of smaller whole numbers"
        )
    return dict(zip(weights, whole, strict=True))


def _train_fingerprint(corpus: MixedCorpus) -> str:
    return corpus.manifest.splits["train"].fingerprint


def _joined(weights: Sequence[int], fingerprints: Sequence[str]) -> str:
    if len(fingerprints) == 1:
        return fingerprints[0]
    return "+".join(f"{w}*{f}" for w, f in zip(weights, fingerprints, strict=True))


def _described(tokenizer: TokenizerInfo) -> str:
    return (
        f"the tokenizer {tokenizer.kind} {tokenizer.fingerprint[:16]} of {tokenizer.vocab_size} ids"
    )


def _names(paths: Sequence[str]) -> dict[str, str]:
    """The shortest ends of the paths that differ, of characters that MLflow takes."""
    parts = [path.rstrip("/").split("/") for path in paths]
    depth, names = 0, [""] * len(paths)
    while depth == 0 or len(set(names)) < len(paths):
        depth += 1
        names = [re.sub(r"[^\w. -]|^\.+$", "_", "-".join(words[-depth:])) for words in parts]
        if depth > max(map(len, parts)):  # they differ in what was replaced
            names = [f"{name}-{number}" for number, name in enumerate(names, 1)]
    return dict(zip(paths, names, strict=True))
