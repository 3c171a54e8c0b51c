"""What differs between two prepared corpora, and so why the fingerprints of their splits differ.

Both corpora's records are read once, side by side in the order of their sources, so memory does
not grow with them. A record is known by its source and its place there.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from pipeline.corpus_records import corpus_records, rows
from pipeline.manifest import Manifest
from pipeline.storage import Location

_EXAMPLES = 5

Side = Literal["here", "there"]


class Unequal(NamedTuple):
    """A value that is not the same here and there; None: there is none."""

    name: str
    here: Any
    there: Any


class Change(NamedTuple):
    """How a record of one corpus is not what it is in the other."""

    what: Literal["only here", "only there", "fate", "text", "tokens"]
    """`text`: its normalised content; `tokens`: of the same text."""
    here: str
    """Its split, or `dropped: REASON`; "" if it is not there."""
    there: str


@dataclass
class Changed:
    """The records of one kind of change."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    """The ids of the first few."""


@dataclass(frozen=True)
class Difference:
    """Of two corpora, here and there."""

    splits: list[Unequal]
    """Fingerprints of the splits."""
    settings: list[Unequal]
    """By dotted names, as the plans know them."""
    versions: list[Unequal]
    """Of the libraries that made them; they decide nothing by themselves."""
    tokenizer: list[Unequal]
    sources: dict[str, int] | None
    """Files in both, only here, only there; None where records are missing."""
    records: dict[Change, Changed]
    """Most first."""
    reordered: list[str]
    """Splits of the same documents in another order."""
    increments: tuple[int, int]
    """How many there are here, there."""
    ancestor: tuple[Side, int] | None
    """One corpus is what the other was after this increment, from 1."""
    not_compared: list[Side]
    """Corpora without records, as those of format 1 are."""

    @property
    def same(self) -> bool:
        """A training on one is a training on the other."""
        return not self.splits and not self.tokenizer


def difference(here: Location, there: Location) -> Difference:
    """Compare two corpora; raises `CorpusError` for one that cannot be read."""
    ours, theirs = Manifest.load(here), Manifest.load(there)
    missing: list[Side] = []
    if not ours.increments:
        missing.append("here")
    if not theirs.increments:
        missing.append("there")
    splits = [
        Unequal(name, split.fingerprint, theirs.splits[name].fingerprint)
        for name, split in ours.splits.items()
        if split.fingerprint != theirs.splits[name].fingerprint
    ]
    sources, changes, contents = None, {}, set()
    if not missing:
        sources, changes, contents = _compare(here, ours, there, theirs)
    return Difference(
        splits=splits,
        settings=_unequal(flat(ours.settings), flat(theirs.settings)),
        versions=_unequal(ours.versions, theirs.versions),
        tokenizer=_unequal(*(_tokenizer(manifest) for manifest in (ours, theirs))),
        sources=sources,
        records=dict(sorted(changes.items(), key=lambda item: -item[1].count)),
        reordered=[s.name for s in splits if not missing and s.name not in contents],
        increments=(len(ours.increments), len(theirs.increments)),
        ancestor=_ancestor(ours, theirs),
        not_compared=missing,
    )


class _Record(NamedTuple):
    key: tuple[str, int]
    """Its source and its ordinal there."""
    id: str
    fate: str
    split: str
    sha256: bytes
    tokens: tuple[int, bytes]


def _compare(
    here: Location, ours: Manifest, there: Location, theirs: Manifest
) -> tuple[dict[str, int], dict[Change, Changed], set[str]]:
    """Counts of sources, the changes, and the splits that do not hold the same documents."""
    # Another tokenizer gives all documents other tokens, which is said once.
    tokens_matter = ours.tokenizer.fingerprint == theirs.tokenizer.fingerprint
    sources = {"both": 0, "here": 0, "there": 0}
    changes: dict[Change, Changed] = {}
    contents: set[str] = set()
    sides: set[str] = set()
    file = None
    for one, other in _pairs(_in_order(here, ours), _in_order(there, theirs)):
        known = one or other
        assert known is not None
        if known.key[0] != file:
            _count_source(sources, sides)
            file, sides = known.key[0], set()
        sides |= {side for side, record in (("here", one), ("there", other)) if record}
        found = list(_changes(one, other, tokens_matter))
        for change in found:
            entry = changes.setdefault(change, Changed())
            entry.count += 1
            if len(entry.examples) < _EXAMPLES:
                entry.examples.append(known.id)
        if found or (one and other and one.tokens != other.tokens):
            contents |= {record.split for record in (one, other) if record and record.split}
    _count_source(sources, sides)
    return sources, changes, contents


def _count_source(sources: dict[str, int], sides: set[str]) -> None:
    if sides:
        sources["both" if len(sides) == 2 else next(iter(sides))] += 1


def _changes(one: _Record | None, other: _Record | None, tokens_matter: bool) -> Iterator[Change]:
    if one is None or other is None:
        if one is not None:
            yield Change("only here", one.fate, "")
        if other is not None:
            yield Change("only there", "", other.fate)
        return
    if one.fate != other.fate:
        yield Change("fate", one.fate, other.fate)
    if one.sha256 != other.sha256:
        yield Change("text", one.fate, other.fate)
    elif tokens_matter and one.split and other.split and one.tokens != other.tokens:
        yield Change("tokens", one.fate, other.fate)


def _pairs(
    here: Iterator[_Record], there: Iterator[_Record]
) -> Iterator[tuple[_Record | None, _Record | None]]:
    """Records of one key beside each other; None where one side has none."""
    one, other = next(here, None), next(there, None)
    while one is not None or other is not None:
        if other is None or (one is not None and one.key < other.key):
            yield one, None
            one = next(here, None)
        elif one is None or other.key < one.key:
            yield None, other
            other = next(there, None)
        else:
            if one.id == other.id:
                yield one, other
            else:
                yield one, None
                yield None, other
            one, other = next(here, None), next(there, None)


def _in_order(corpus: Location, manifest: Manifest) -> Iterator[_Record]:
    """All records by source: each increment has them so, and no source is in two increments."""
    by_increment = (
        _of_increment(corpus, manifest, number) for number in range(len(manifest.increments))
    )
    return heapq.merge(*by_increment, key=lambda record: record.key)


def _of_increment(corpus: Location, manifest: Manifest, number: int) -> Iterator[_Record]:
    last, ordinal = None, 0
    for table in _tables(corpus, manifest, number):
        names = ("file", "doc_id", "split", "reason", "sha256", "tokens", "tokens_sha256")
        for file, doc_id, split, reason, sha256, tokens, tokens_sha256 in rows(table, names):
            ordinal = ordinal + 1 if file == last else 0
            last = file
            fate = split or f"dropped: {reason}"
            yield _Record((file, ordinal), doc_id, fate, split, sha256, (tokens, tokens_sha256))


def _tables(corpus: Location, manifest: Manifest, number: int) -> Iterator[pa.Table]:
    only = dataclasses.replace(manifest, increments=manifest.increments[number : number + 1])
    return (found.table for found in corpus_records(corpus, only))


def _tokenizer(manifest: Manifest) -> dict[str, Any]:
    """Without where its file lies, which the plan decides."""
    return dataclasses.asdict(dataclasses.replace(manifest.tokenizer, file=None))


def _ancestor(ours: Manifest, theirs: Manifest) -> tuple[Side, int] | None:
    here, there = ([i.plan_id for i in m.increments] for m in (ours, theirs))
    if len(here) < len(there) and here and there[: len(here)] == here:
        return "here", len(here)
    if len(there) < len(here) and there and here[: len(there)] == there:
        return "there", len(there)
    return None


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings by dotted names."""
    named = {}
    for name, item in value.items():
        if isinstance(item, dict):
            named |= flat(item, f"{prefix}{name}.")
        else:
            named[prefix + name] = item
    return named


def _unequal(here: dict[str, Any], there: dict[str, Any]) -> list[Unequal]:
    names = dict.fromkeys(itertools.chain(here, there))
    return [
        Unequal(name, here.get(name), there.get(name))
        for name in names
        if here.get(name) != there.get(name)
    ]
