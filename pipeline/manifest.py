"""The manifest of a corpus: `manifest.json`, written last; without it there is no corpus.

Readers trust it and never list a folder. Two hashes: the *plan id* (inputs, settings, versions)
decides what a second `prepare` reuses, the *fingerprint* of a split is the hash of its documents'
ids and tokens in stored order. Neither sees time, machine, parallelism or where files lie.

A corpus grows by *increments*: the first prepare draws the held-out splits, later ones add shards
to train; each has a plan of its own, which begins from the one before.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline import records
from pipeline.errors import CorpusError, NewerFormatError
from pipeline.shards import Shard, damaged
from pipeline.sources import CORPUS_MARKER
from pipeline.splits import SPLITS
from pipeline.storage import Location, open_store
from pipeline.tokenizers import Tokenizer, make_tokenizer

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2
"""Of the shards and the manifest. Older ones are read, newer ones refused."""


@dataclass(frozen=True)
class TokenizerInfo:
    """How the corpus was tokenised, and what vocabulary its model needs."""

    kind: str
    fingerprint: str
    vocab_size: int
    """Ids of the model, special tokens counted."""
    token_offset: int
    """A model's id is the stored id plus this; the ids below it are pad, eos, unk."""
    dtype: str
    """Of the stored ids: uint8, uint16 or int32."""
    file: str | None = None
    """Its model, relative to the corpus folder, if it has one."""


@dataclass(frozen=True)
class Split:
    """One split: its shards in order, and their sums."""

    fingerprint: str
    documents: int
    tokens: int
    """Stored tokens; a stream has one eos a document more."""
    n_bytes: int
    n_words: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class RecordsFile:
    """What became of each record of a range (`pipeline.records`)."""

    path: str
    """Relative to the corpus folder."""
    records: int
    content: str
    """Hash of what the records were found to be."""
    length: int
    """Bytes of the file."""
    sha256: str


@dataclass(frozen=True)
class Increment:
    """What one prepare added; the first draws the held-out splits, later ones add to train."""

    plan_id: str
    train_fingerprint: str
    """Of train from the beginning to the end of this increment."""
    records: tuple[RecordsFile, ...]
    """Of its ranges, in order."""


@dataclass(frozen=True)
class Drops:
    """The records dropped for one reason."""

    count: int
    examples: tuple[str, ...]
    """The ids of the first few."""


@dataclass(frozen=True)
class Manifest:
    """A prepared corpus."""

    format_version: int
    plan_id: str
    settings: dict[str, Any]
    """What `prepare` was told, as far as it changes the corpus."""
    tokenizer: TokenizerInfo
    splits: dict[str, Split]
    """Under the names in `SPLITS`."""
    increments: tuple[Increment, ...]
    """In order; the last has this plan, the one before it is its parent."""
    drops: dict[str, Drops]
    """By reason."""
    held_out_index: str | None
    """What new documents are decontaminated against, relative to the corpus folder."""
    versions: dict[str, str]
    """Of the libraries, and of Unicode."""

    @property
    def files(self) -> list[str]:
        """Every file of the corpus but the manifest, relative to its folder."""
        named = [shard.path for split in self.splits.values() for shard in split.shards]
        named += [file.path for increment in self.increments for file in increment.records]
        return named + [file for file in (self.tokenizer.file, self.held_out_index) if file]

    @classmethod
    def load(cls, corpus: Location) -> "Manifest":
        """Read the manifest of a corpus folder; raises `CorpusError` if there is no good one."""
        store = open_store(corpus)
        path = f"{store.location}/{MANIFEST_NAME}"
        try:
            text = store.read(MANIFEST_NAME)
        except FileNotFoundError:
            if store.exists(CORPUS_MARKER):
                what = f"unfinished, it has no {MANIFEST_NAME} yet; run `tvq prepare` again"
            elif not any(store.list()):
                what = "there is no such folder; make a corpus with `tvq prepare`"
            else:
                what = f"not a prepared corpus, it has no {MANIFEST_NAME}; run `tvq prepare` first"
            raise CorpusError(f"{corpus}: {what}") from None
        try:
            value = json.loads(text)
            if value["format"] != "tvq corpus":
                raise CorpusError(f"{path}: not the manifest of a tvq corpus")
            version = value["format_version"]
            if version > FORMAT_VERSION:
                raise NewerFormatError(
                    f"{path}: written in format {version} by a newer tvq, this one reads up to "
                    f"{FORMAT_VERSION}: upgrade tvq, or prepare the corpus again in another folder"
                )
            if value.pop("checksum") != _checksum(value):
                raise ValueError("its checksum does not fit what it says")
            return _from_json(value)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorpusError(
                f"{path}: damaged ({type(error).__name__}: {error}); run `tvq prepare` again"
            ) from None

    def save(self, corpus: Location) -> None:
        """Write `manifest.json` into the corpus folder, whole or not at all."""
        value = {"format": "tvq corpus", **dataclasses.asdict(self)}
        value = json.loads(json.dumps(value))
        value |= {"checksum": _checksum(value)}
        text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        open_store(corpus).write(MANIFEST_NAME, text.encode())

    def split(self, name: str) -> Split:
        """A split by its name; raises `CorpusError` if there is none or it is empty."""
        if name not in self.splits:
            raise CorpusError(f"there is no split {name!r}; there are: {', '.join(self.splits)}")
        if not self.splits[name].documents:
            raise CorpusError(f"the split {name!r} is empty: its fraction was 0 when it was made")
        return self.splits[name]


def read_records(corpus: Location, file: RecordsFile) -> pa.Table:
    """What became of the records of a range, as `records.with_fates` made it.

    Raises `CorpusError` naming the file if it is missing or damaged.
    """
    store = open_store(corpus)
    path = f"{store.location}/{file.path}"
    try:
        data = store.read(file.path)
    except FileNotFoundError:
        raise damaged(path, "the file is missing") from None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise damaged(path, "it was changed")
    return records.from_bytes(data)


def tokenizer_of(corpus: Location, manifest: Manifest) -> Tokenizer:
    """The tokenizer that a corpus was made with; raises `CorpusError` if it cannot be had."""
    info = manifest.tokenizer
    try:
        model = None if info.file is None else open_store(corpus).read(info.file)
    except FileNotFoundError:
        raise CorpusError(f"{corpus}: {info.file} is missing; run `tvq prepare` again") from None
    return make_tokenizer(info.kind, info.fingerprint, model)


class FingerprintBuilder:
    """The hash of a split's documents in stored order.

    It sees each document's id and tokens; not parts, shards or the order in which they were made.
    """

    def __init__(self, dtype: str) -> None:
        """`dtype` is the type of the stored ids."""
        self._digest = hashlib.sha256(f"tvq split 1 {dtype}\n".encode())

    def add(self, doc_id: str, tokens: int, sha256: str) -> None:
        """The next document: how many tokens it has, and the hash of them, little-endian."""
        text = json.dumps([doc_id, tokens, sha256], ensure_ascii=False)
        self._digest.update(text.encode() + b"\n")

    def fingerprint(self) -> str:
        """Of the documents so far."""
        return self._digest.hexdigest()


def _checksum(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _from_json(value: dict[str, Any]) -> Manifest:
    """Build the tree; a field that is missing is a `KeyError` or `TypeError`."""
    if value["format_version"] == 1:  # it knew no increments, and named every id that it dropped
        drops = {reason: Drops(len(ids), tuple(ids[:10])) for reason, ids in value["drops"].items()}
        increments, held_out_index = (), None
    else:
        drops = {
            reason: Drops(drop["count"], tuple(drop["examples"]))
            for reason, drop in value["drops"].items()
        }
        increments = tuple(_increment_from_json(item) for item in value["increments"])
        held_out_index = value["held_out_index"]
    return Manifest(
        format_version=value["format_version"],
        plan_id=value["plan_id"],
        settings=value["settings"],
        tokenizer=TokenizerInfo(**value["tokenizer"]),
        splits={name: _split_from_json(value["splits"][name]) for name in SPLITS},
        increments=increments,
        drops=drops,
        held_out_index=held_out_index,
        versions=value["versions"],
    )


def _increment_from_json(value: dict[str, Any]) -> Increment:
    files = tuple(RecordsFile(**file) for file in value["records"])
    return Increment(value["plan_id"], value["train_fingerprint"], files)


def _split_from_json(value: dict[str, Any]) -> Split:
    fields = dict(value, shards=tuple(shard_from_json(s) for s in value["shards"]))
    return Split(**fields)


def shard_from_json(value: dict[str, Any]) -> Shard:
    """A shard's description from what `dataclasses.asdict` made of it, by way of JSON."""
    fields = dict(value, sums=tuple(value["sums"]))
    return Shard(**fields)
