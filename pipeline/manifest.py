"""The manifest of a corpus: `manifest.json`, written last; without it there is no corpus.

Readers trust it and never list a folder. Two hashes: the *plan id* (inputs, settings, versions)
decides what a second `prepare` reuses, the *fingerprint* of a split is the hash of its documents'
ids and tokens in stored order. Neither sees time, machine, parallelism or where files lie.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import CorpusError, NewerFormatError
from pipeline.files import write_json
from pipeline.shards import Shard, check_length, check_sums
from pipeline.sources import CORPUS_MARKER

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
"""Of the shards and the manifest. Older ones are read, newer ones refused."""
SPLITS = ("train", "validation", "test")


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
class Source:
    """One document that was read, kept or dropped."""

    id: str
    size: int
    """Bytes."""
    sha256: str


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
    sources: tuple[Source, ...]
    """In the order of ids."""
    drops: dict[str, tuple[str, ...]]
    """For each reason the ids that were dropped."""
    versions: dict[str, str]
    """Of the libraries, and of Unicode."""

    @classmethod
    def load(cls, corpus: Path) -> "Manifest":
        """Read the manifest of a corpus folder; raises `CorpusError` if there is no good one."""
        path = corpus / MANIFEST_NAME
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            if not corpus.is_dir():
                what = "there is no such folder; make a corpus with `tvq prepare`"
            elif (corpus / CORPUS_MARKER).exists():
                what = f"unfinished, it has no {MANIFEST_NAME} yet; run `tvq prepare` again"
            else:
                what = f"not a prepared corpus, it has no {MANIFEST_NAME}; run `tvq prepare` first"
            raise CorpusError(f"{corpus}: {what}") from None
        except OSError as error:
            raise CorpusError(f"{path}: cannot be read ({error.strerror})") from None
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

    def save(self, corpus: Path) -> None:
        """Write `manifest.json` into the corpus folder, whole or not at all."""
        value = {"format": "tvq corpus", **dataclasses.asdict(self)}
        value = json.loads(json.dumps(value))
        write_json(corpus / MANIFEST_NAME, value | {"checksum": _checksum(value)}, indent=1)

    def split(self, name: str) -> Split:
        """A split by its name; raises `CorpusError` if there is none or it is empty."""
        if name not in self.splits:
            raise CorpusError(f"there is no split {name!r}; there are: {', '.join(self.splits)}")
        if not self.splits[name].documents:
            raise CorpusError(f"the split {name!r} is empty: its fraction was 0 when it was made")
        return self.splits[name]


class Verified(NamedTuple):
    """What `verify` has read."""

    shards: int
    n_bytes: int


def verify(corpus: Path) -> Verified:
    """Read every byte of a corpus and compare it with the manifest's checksums.

    Raises `CorpusError` naming the first shard that is missing or cut short, or its first chunk
    of 8 MiB that was changed.
    """
    shards = [s for split in Manifest.load(corpus).splits.values() for s in split.shards]
    for shard in shards:
        check_length(corpus, shard)
    for shard in shards:
        check_sums(corpus, shard)
    return Verified(len(shards), sum(shard.length for shard in shards))


class DocumentDigest(NamedTuple):
    """What a split's fingerprint takes of one document."""

    tokens: int
    sha256: str
    """Of its stored tokens, little-endian, in the type that the tokenizer names."""


def split_fingerprint(documents: Iterable[tuple[str, DocumentDigest]], dtype: str) -> str:
    """The hash of a split's documents (id, digest) in stored order.

    It does not see parts, shards or the order in which they were made.
    """
    digest = hashlib.sha256(f"tvq split 1 {dtype}\n".encode())
    for doc_id, document in documents:
        digest.update(json.dumps([doc_id, *document], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _checksum(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _from_json(value: dict[str, Any]) -> Manifest:
    """Build the tree; a field that is missing is a `KeyError` or `TypeError`."""
    return Manifest(
        format_version=value["format_version"],
        plan_id=value["plan_id"],
        settings=value["settings"],
        tokenizer=TokenizerInfo(**value["tokenizer"]),
        splits={name: _split_from_json(value["splits"][name]) for name in SPLITS},
        sources=tuple(Source(**source) for source in value["sources"]),
        drops={reason: tuple(ids) for reason, ids in value["drops"].items()},
        versions=value["versions"],
    )


def _split_from_json(value: dict[str, Any]) -> Split:
    fields = dict(value, shards=tuple(shard_from_json(s) for s in value["shards"]))
    return Split(**fields)


def shard_from_json(value: dict[str, Any]) -> Shard:
    """A shard's description from what `dataclasses.asdict` made of it, by way of JSON."""
    fields = dict(value, sums=tuple(value["sums"]))
    return Shard(**fields)
