"""Text to tokens and back, behind one protocol with a fingerprint.

Stored ids begin at 0 and leave the special tokens out; a model's id is the stored id plus
`TOKEN_OFFSET`, and the ids below it are the special tokens.
"""

import hashlib
import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.errors import CorpusError

PAD = 0
"""Fills rows beyond their end; never predicted."""
EOS = 1
"""Ends a document; also the first input of every window."""
UNK = 2
"""Reserved for text that a tokenizer cannot write; ours write everything."""
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

    @property
    def needs_utf8(self) -> bool:
        """Only valid UTF-8 can be encoded; other documents are found before, in the scan."""
        ...

    @property
    def model(self) -> bytes | None:
        """The file that goes into the corpus, without which `make_tokenizer` cannot make it."""
        ...

    @property
    def stores_bytes(self) -> bool:
        """The stored ids of a text are its bytes."""
        ...

    @property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """The bytes of text that each stored id writes [ids]."""
        ...

    def encode(self, text: bytes) -> npt.NDArray:
        """Stored ids [tokens] of a text, or of one part of a long one.

        Raises `CorpusError` for a text that this tokenizer cannot write.
        """
        ...

    def decode(self, tokens: npt.NDArray) -> bytes:
        """The text of stored ids [tokens]; raises `ValueError` for an id that is not one."""
        ...


class ByteTokenizer:
    """Each byte is a token: any text, valid UTF-8 or not, comes back exactly."""

    kind = "bytes"
    fingerprint = hashlib.sha256(b"tvq tokenizer: bytes, version 1").hexdigest()
    vocab_size = 256 + TOKEN_OFFSET
    dtype = np.dtype(np.uint8)
    needs_utf8 = False
    model = None
    stores_bytes = True
    token_bytes = np.ones(256, np.int64)

    def encode(self, text: bytes) -> npt.NDArray[np.uint8]:
        """The bytes themselves, without a copy; read-only."""
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: npt.NDArray) -> bytes:
        """The bytes; raises `ValueError` for an id that is not one."""
        return _bytes_of(self.kind, tokens)


class ImageTokenizer:
    """Each byte of a picture of 64x64 pixels is a token: rows from the top, pixels from the left,
    red, green, blue."""

    kind = "image-64x64x3"
    fingerprint = hashlib.sha256(b"tvq tokenizer: image-64x64x3, version 1").hexdigest()
    vocab_size = 256 + TOKEN_OFFSET
    dtype = np.dtype(np.uint8)
    needs_utf8 = False
    model = None
    stores_bytes = True
    token_bytes = np.ones(256, np.int64)
    shape = (64, 64, 3)
    """Rows, pixels of a row, colours of a pixel."""

    def encode(self, text: bytes) -> npt.NDArray[np.uint8]:
        """The bytes of one picture [12288], without a copy; read-only.

        Raises `CorpusError` for another length.
        """
        if len(text) != math.prod(self.shape):
            raise CorpusError(
                f"tokenizer: a document of {self.kind} has {math.prod(self.shape)} bytes, this has "
                f"{len(text)}: prepare pictures from an image source, or text with another "
                "tokenizer"
            )
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: npt.NDArray) -> bytes:
        """The bytes, also of a part of a picture; raises `ValueError` for an id that is not one."""
        return _bytes_of(self.kind, tokens)

    def picture(self, tokens: npt.NDArray) -> npt.NDArray[np.uint8]:
        """The pixels [64, 64, 3] of a whole picture's stored ids [12288]."""
        return np.frombuffer(self.decode(tokens), np.uint8).reshape(self.shape)


def _bytes_of(kind: str, tokens: npt.NDArray) -> bytes:
    check_stored_ids(kind, tokens, 256)
    return tokens.astype(np.uint8).tobytes()


def check_stored_ids(kind: str, tokens: npt.NDArray, count: int) -> None:
    """Raise `ValueError` unless all the stored ids [tokens] of a tokenizer lie below `count`."""
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < count:
        wrong = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
        raise ValueError(f"stored ids of {kind} lie in 0..{count - 1}, got {wrong}")


def make_tokenizer(
    kind: str, fingerprint: str | None = None, model: bytes | None = None
) -> Tokenizer:
    """Make a tokenizer by its name, or the one with which a corpus or a model was made.

    `model` is the content of its `.model` file, for `sentencepiece` alone. Raises `CorpusError`
    for a name that is not there, for a file that is missing or will not do, and where the
    tokenizer made is not the one with the `fingerprint`.
    """
    # Here and not above, for it takes what it shares with the others from this module.
    from pipeline.sentencepiece_tokenizer import SentencePieceTokenizer, load_sentencepiece

    plain = {made.kind: made for made in (ByteTokenizer, ImageTokenizer)}
    if kind in plain:
        tokenizer = plain[kind]()
    elif kind != SentencePieceTokenizer.kind:
        there = ", ".join([*plain, SentencePieceTokenizer.kind])
        raise CorpusError(f"tokenizer: there is no tokenizer {kind!r}; there is: {there}")
    elif model is None:
        raise CorpusError(f"tokenizer: {kind} needs its .model file: give it, or train one")
    else:
        tokenizer = load_sentencepiece(model)
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
