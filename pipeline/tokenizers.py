"""Text to tokens and back, behind one protocol with a fingerprint.

Stored ids begin at 0 and leave the special tokens out; a model's id is the stored id plus
`TOKEN_OFFSET`, and the ids below it are the special tokens.
"""

import hashlib
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.errors import CorpusError

PAD = 0
"""Fills rows beyond their end; never predicted."""
EOS = 1
"""Ends a document; also the first input of every window."""
UNK = 2
"""Reserved for text that a tokenizer cannot write; bytes never need it."""
TOKEN_OFFSET = 3


class Tokenizer(Protocol):
    """What the pipeline asks of a tokenizer."""

    @property
    def kind(self) -> str:
        """The name by which `make_tokenizer` makes it."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash that differs whenever some text would be written with other ids."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids that a model needs, the special tokens counted."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """The narrowest of uint8, uint16 and int32 that holds the stored ids."""
        ...

    def encode(self, text: bytes) -> npt.NDArray:
        """Stored ids [tokens] of a text, or of one part of a long one."""
        ...

    def decode(self, tokens: npt.NDArray) -> bytes:
        """The text of stored ids [tokens]."""
        ...


class ByteTokenizer:
    """Each byte is a token: any text, valid UTF-8 or not, comes back exactly."""

    kind = "bytes"
    fingerprint = hashlib.sha256(b"tvq tokenizer: bytes, version 1").hexdigest()
    vocab_size = 256 + TOKEN_OFFSET
    dtype = np.dtype(np.uint8)

    def encode(self, text: bytes) -> npt.NDArray[np.uint8]:
        """The bytes themselves, without a copy; read-only."""
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: npt.NDArray) -> bytes:
        """The bytes; raises `ValueError` for an id that is not one."""
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < 256:
            raise ValueError(f"stored ids of bytes lie in 0..255, got {int(tokens.max())}")
        return tokens.astype(np.uint8).tobytes()


def make_tokenizer(kind: str, fingerprint: str | None = None) -> Tokenizer:
    """Make a tokenizer by its name, or the one with which a corpus or a model was made.

    Raises `CorpusError` for a name that is not there, and where this program's tokenizer of that
    name is not the one with the `fingerprint`.
    """
    if kind != ByteTokenizer.kind:
        raise CorpusError(f"tokenizer: there is no tokenizer {kind!r}; there is: bytes")
    tokenizer = ByteTokenizer()
    if fingerprint not in (None, tokenizer.fingerprint):
        raise CorpusError(
            f"the tokenizer {kind!r} of this tvq is not the one that was used (fingerprints "
            f"{tokenizer.fingerprint[:8]} and {fingerprint[:8]}): prepare the corpus again"
        )
    return tokenizer


def model_ids(tokenizer: Tokenizer, text: bytes) -> npt.NDArray[np.int32]:
    """The ids [tokens] that a model takes for a text, without eos."""
    return tokenizer.encode(text).astype(np.int32) + TOKEN_OFFSET


def text_of(tokenizer: Tokenizer, ids: npt.NDArray) -> bytes:
    """The text of a model's ids [tokens]; special tokens are left out."""
    return tokenizer.decode(ids[ids >= TOKEN_OFFSET] - TOKEN_OFFSET)
