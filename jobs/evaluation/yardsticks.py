"""What general-purpose compressors make of the same text: honest yardsticks for bits per byte.

They see the whole split as one stream and learn from nothing else; the model sees a window at a
time and has learnt from the training split.
"""

import gzip
import lzma
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.manifest import Manifest, tokenizer_of
from pipeline.storage import Location
from pipeline.stored_documents import stored_documents


class Yardsticks(NamedTuple):
    """Bits per byte of a split's text."""

    gzip: float
    """gzip -9."""
    xz: float
    """xz -9e."""


def yardsticks(corpora: Sequence[Location], split: str) -> Yardsticks:
    """Compresses a split's text, its documents joined in stored order, in memory.

    Of several corpora: the text of the one behind that of the other.
    """
    text = b"".join(split_text(corpus, split) for corpus in corpora)
    packed = (gzip.compress(text, 9), lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    return Yardsticks(*(8 * len(data) / len(text) for data in packed))


def split_text(corpus: Location, split: str) -> bytes:
    """The text of a split, its documents joined in stored order."""
    manifest = Manifest.load(corpus)
    tokenizer = tokenizer_of(corpus, manifest)
    return b"".join(
        tokenizer.decode(part)
        for document in stored_documents(corpus, manifest, split)
        for part in document.parts
    )
