"""What general-purpose compressors make of the same text: honest yardsticks for bits per byte.

They see the whole split as one stream and learn from nothing else; the model sees a window at a
time and has learnt from the training split.
"""

import gzip
import lzma
from pathlib import Path
from typing import NamedTuple

from pipeline.manifest import Manifest
from pipeline.shards import ShardReader
from pipeline.tokenizers import make_tokenizer


class Yardsticks(NamedTuple):
    """Bits per byte of a split's text."""

    gzip: float
    """gzip -9."""
    xz: float
    """xz -9e."""


def yardsticks(corpus: Path, split: str) -> Yardsticks:
    """Compresses the split's text, its documents joined in stored order, in memory."""
    text = split_text(corpus, split)
    packed = (gzip.compress(text, 9), lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    return Yardsticks(*(8 * len(data) / len(text) for data in packed))


def split_text(corpus: Path, split: str) -> bytes:
    """The text of a split, its documents joined in stored order."""
    manifest = Manifest.load(corpus)
    tokenizer = make_tokenizer(manifest.tokenizer.kind, manifest.tokenizer.fingerprint)
    parts = []
    for shard in manifest.split(split).shards:
        reader = ShardReader(corpus, shard, tokenizer.dtype)
        parts += [tokenizer.decode(reader.tokens(row)) for row in range(shard.rows)]
    return b"".join(parts)
