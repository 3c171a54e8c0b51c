"""Corpora for tests, written without Ray."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from pipeline.formats import FormatSettings
from pipeline.manifest import (
    FORMAT_VERSION,
    FingerprintBuilder,
    Manifest,
    Split,
    TokenizerInfo,
)
from pipeline.plan import PrepareSettings
from pipeline.prepare import prepare
from pipeline.shards import Row, Shard, ShardWriter
from pipeline.sources import SourceSettings
from pipeline.splits import SPLITS
from pipeline.tasks import run_here
from pipeline.tokenizers import ByteTokenizer

Documents = Sequence[Sequence[bytes]]
"""Documents, each the list of its parts."""


def write_shard(corpus: Path, path: str, documents: Documents, first: int = 0) -> Shard:
    """A shard of documents named by their number."""
    (corpus / path).parent.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(corpus, path, ByteTokenizer.dtype)
    for number, document in enumerate(documents, first):
        for part, text in enumerate(document):
            tokens = np.frombuffer(text, np.uint8)
            writer.append(Row(f"doc{number}", part, tokens, len(text), len(text.split())))
    return writer.finish()


def write_pictures(source: Path, corpus: Path) -> None:
    """A folder of three pictures, and the corpus of them."""
    source.mkdir()
    for number in range(3):
        Image.effect_noise((70, 64), 9 + number).convert("RGB").save(source / f"{number}.png")
    settings = PrepareSettings(
        SourceSettings((str(source),)),
        format=FormatSettings(kind="images"),
        tokenizer="image-64x64x3",
    )
    prepare(settings, corpus, run_here)


def write_corpus(corpus: Path, **splits: Sequence[Documents]) -> Manifest:
    """A corpus with the given shards of documents in each split; the other splits are empty."""
    made = {}
    for name in SPLITS:
        shards, fingerprint, count = [], FingerprintBuilder("uint8"), 0
        for index, documents in enumerate(splits.get(name, ())):
            path = f"shards/test/{name}-{index:05d}.arrow"
            shards.append(write_shard(corpus, path, documents, count))
            for document in documents:
                text = b"".join(document)
                fingerprint.add(f"doc{count}", len(text), hashlib.sha256(text).hexdigest())
                count += 1
        made[name] = Split(
            fingerprint.fingerprint(),
            sum(s.documents for s in shards),
            sum(s.tokens for s in shards),
            sum(s.n_bytes for s in shards),
            sum(s.n_words for s in shards),
            tuple(shards),
        )
    tokenizer = TokenizerInfo("bytes", ByteTokenizer.fingerprint, 259, 3, "uint8")
    manifest = Manifest(FORMAT_VERSION, "plan", {}, tokenizer, made, (), {}, None, {})
    manifest.save(corpus)
    return manifest


parts = st.lists(st.binary(min_size=1, max_size=12), min_size=1, max_size=3)
shards_of_documents = st.lists(st.lists(parts, min_size=1, max_size=5), min_size=1, max_size=4)
"""One to four shards of one to five documents of one to three parts."""


def stream(shards: Sequence[Documents]) -> list[int]:
    """The oracle of stream windows: a model's ids of the whole split, an eos behind a document."""
    ids: list[int] = []
    for documents in shards:
        for document in documents:
            ids += [byte + 3 for byte in b"".join(document)] + [1]
    return ids
