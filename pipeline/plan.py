"""What corpus to make of which source, and the hash that says whether it was made before."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from pipeline.contamination import ContaminationSettings
from pipeline.errors import CorpusError
from pipeline.filters import FilterSettings
from pipeline.formats import FormatSettings
from pipeline.manifest import FORMAT_VERSION
from pipeline.near_duplicates import NearDuplicateSettings
from pipeline.normalization import Normalization
from pipeline.parts import PART_BYTES
from pipeline.scanning import ScanSettings
from pipeline.sentencepiece_tokenizer import SentencePieceSettings
from pipeline.sources import SourceSettings
from pipeline.tokenizers import ByteTokenizer, ImageTokenizer, Tokenizer, make_tokenizer

# Raise it when the same inputs would become other bytes.
_RECIPE_VERSION = 2


@dataclass(frozen=True)
class PrepareSettings:
    """What corpus to make of which source."""

    source: SourceSettings
    """What is read."""

    format: FormatSettings = field(default_factory=FormatSettings)
    """How files become documents."""

    split_by: Literal["hash", "name"] = "hash"
    """Which split a document falls into: by a hash of its id, or by the name of its file."""

    validation_fraction: float = 0.05
    """Share of the documents held out for validation, where nothing names them; 0 for none."""

    test_fraction: float = 0.05
    """Share of the documents held out for the final test, likewise; 0 for none."""

    normalization: Normalization = field(default_factory=Normalization)
    """What is changed in the text."""

    filters: FilterSettings = field(default_factory=FilterSettings)
    """Which documents are dropped by themselves."""

    near_duplicates: NearDuplicateSettings | None = None
    """How much alike documents must be for one to be dropped; none are if this is null."""

    contamination: ContaminationSettings | None = None
    """When a training document repeats a held-out one and is dropped; none are if this is null."""

    tokenizer: str = ByteTokenizer.kind
    """How text becomes tokens: bytes, sentencepiece or image-64x64x3."""

    sentencepiece: SentencePieceSettings | None = None
    """How to train the tokenizer on the corpus; null: `tokenizer_model` is given."""

    tokenizer_model: bytes | None = None
    """The content of a SentencePiece `.model` file."""

    shard_bytes: int | None = None
    """Source bytes that one task reads, and so about the most that a shard describes; null: by the
    size of the corpus, from 2 to 256 MiB."""

    @property
    def trains_tokenizer(self) -> bool:
        """The tokenizer is made from the corpus."""
        return self.sentencepiece is not None

    def given_tokenizer(self) -> Tokenizer | None:
        """The tokenizer; none if it has yet to be trained."""
        if self.trains_tokenizer:
            return None
        return make_tokenizer(self.tokenizer, model=self.tokenizer_model)

    def scan(self) -> ScanSettings:
        """What pass 1 needs of it."""
        filters = self.filters
        if self.tokenizer == ImageTokenizer.kind:  # zeros are black
            filters = dataclasses.replace(filters, keep_binary=True)
        tokenizer = self.given_tokenizer()
        return ScanSettings(
            format=self.format,
            normalization=self.normalization,
            filters=filters,
            near_duplicates=self.near_duplicates,
            split_by_name=self.split_by == "name",
            needs_utf8=True if tokenizer is None else tokenizer.needs_utf8,
        )

    def check(self) -> None:
        """Raise `CorpusError` naming what cannot be."""
        validation, test = self.validation_fraction, self.test_fraction
        for option, fraction in (("--validation", validation), ("--test", test)):
            if not 0 <= fraction < 1:
                raise CorpusError(f"{option}: must be at least 0 and below 1, got {fraction}")
        if validation + test >= 1:
            raise CorpusError(
                "--validation and --test: must leave something to train on, got "
                f"{validation} + {test}"
            )
        if self.shard_bytes is not None and self.shard_bytes < 1:
            raise CorpusError(f"shard_bytes: must be at least 1, got {self.shard_bytes}")
        if self.trains_tokenizer and self.tokenizer_model is not None:
            raise CorpusError("tokenizer: either train one or give its .model file, not both")
        self.given_tokenizer()


def mathematical(settings: PrepareSettings) -> dict[str, Any]:
    """What decides a corpus beyond its inputs, as JSON knows it."""
    tokenizer = settings.given_tokenizer()
    value = dataclasses.asdict(dataclasses.replace(settings, tokenizer_model=None))
    del value["source"], value["tokenizer_model"]
    value["tokenizer_fingerprint"] = None if tokenizer is None else tokenizer.fingerprint
    value["versions"] = {
        "format": FORMAT_VERSION,
        "recipe": _RECIPE_VERSION,
        "arrow": pa.__version__,
    }
    if tokenizer is None:
        import sentencepiece

        value["versions"]["sentencepiece"] = sentencepiece.__version__
    value["part_bytes"] = PART_BYTES
    return json.loads(json.dumps(value))


def plan_id(settings: dict[str, Any], parent: str | None, contents: list[str]) -> str:
    """The hash of all that decides the bytes of an increment.

    `settings` is `mathematical`, `parent` the plan before, `contents` the digest of what each
    range holds.
    """
    identity = json.dumps([settings, parent, contents], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()
