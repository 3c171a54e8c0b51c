"""SentencePiece without loss: the tokenizer, the sample it is trained on, and its training.

Each valid UTF-8 text comes back byte for byte. What SentencePiece would lose is written with byte
pieces instead: characters that the model does not know (its byte fallback), and U+2581, with which
SentencePiece writes a space and which would come back as one.
"""

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.errors import CorpusError
from pipeline.tokenizers import TOKEN_OFFSET, check_stored_ids

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# Part of the fingerprint: raise it when the same model and text would be written with other ids.
_ENCODING_VERSION = b"tvq tokenizer: sentencepiece, version 1\0"

_SPACE = "\u2581".encode()

# Text is encoded in stretches of at most this many bytes. In one call, 4 MiB of Shakespeare are
# 0.65 to 0.9 times as fast with unigram (8k; a few pieces differ, 17 borders of 1,259,457) and 0.3
# times with BPE (1k and 8k).
_STRETCH = 4096

# What the trainer drops with the whole sentence (U+2585, its mark for rare characters), takes for
# a border of its own (NUL), or would mistake for a space (U+2581); and newline, a piece of its own.
_SENTENCE_BORDERS = re.compile(rb"[\n\0]|\xe2\x96\x81|\xe2\x96\x85")

# The threads among which unigram's sums are shared, whatever the machine has: another number adds
# in another order and gives another model. SentencePiece's default.
_TRAINING_THREADS = 16

# What the trainer counts and a user does not see (`<unk>`), and the other way round.
_VOCABULARY_DIFFERENCE = TOKEN_OFFSET - 1

# Texts on which a model is tried before it is used.
_PROBE = (
    " \t two  spaces \r\n\n <s></s><unk><pad><0x0A>\x00\x01\x7f\u00ad\u2028\u3000\ufeffﬁÅ\ufffe😀 "
)


class SentencePieceTokenizer:
    """A `.model` file as a tokenizer; `model` is its content.

    Stored ids number the model's pieces in their order, without its unknown, control and unused
    ones. Raises `CorpusError` for a model that would not write every text back.
    """

    kind = "sentencepiece"
    needs_utf8 = True
    stores_bytes = False

    def __init__(self, model: bytes) -> None:
        texts = _piece_texts(model)
        self.model: bytes = model
        self.fingerprint = hashlib.sha256(_ENCODING_VERSION + model).hexdigest()
        self._processor = _processor(model)
        self._texts = [text for text in texts if text is not None]
        self.vocab_size = len(self._texts) + TOKEN_OFFSET
        self.token_bytes = np.array([len(text) for text in self._texts], np.int64)
        self.dtype = np.min_scalar_type(len(self._texts) - 1)
        if self.dtype.itemsize > 2:
            self.dtype = np.dtype(np.int32)
        # By the model's ids [pieces]: the stored id, and the bytes that it writes (0 for a piece
        # that is not stored, so that the check in `encode` finds it).
        is_stored = np.array([text is not None for text in texts])
        self._stored = np.where(is_stored, np.cumsum(is_stored) - 1, 0).astype(self.dtype)
        self._lengths = np.array([len(text or b"") for text in texts], np.int32)
        self._space_ids = np.array(
            [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE], np.int32
        )
        probe = _PROBE.encode() + b"".join(text for text in self._texts if len(text) > 1)
        if self.decode(self.encode(probe)) != probe:
            raise _not_lossless("pieces that do not write back the text they are read from")

    def __reduce__(self) -> tuple:
        return load_sentencepiece, (self.model,)

    def encode(self, text: bytes) -> npt.NDArray:
        """Stored ids [tokens] of a text, or of one part of a long one.

        Raises `CorpusError` for text that is not valid UTF-8.
        """
        segments = [text]
        if not text.isascii():  # which takes a tenth of splitting it
            _check_utf8(text)
            segments = text.split(_SPACE)
        encoded: list[npt.NDArray[np.int32]] = []
        for k, segment in enumerate(segments):
            if k:
                encoded.append(self._space_ids)
            for stretch in _stretches(segment):
                encoded.append(self._processor.encode(stretch, out_type="numpy"))
        ids = np.concatenate(encoded) if encoded else np.empty(0, np.int32)
        # Each id is one of the model's own: looking whether they are takes half of the time.
        if int(self._lengths.take(ids, mode="clip").sum()) != len(text):
            raise _not_lossless("pieces that write back another length of text than they read")
        return self._stored.take(ids, mode="clip")

    def decode(self, tokens: npt.NDArray) -> bytes:
        """The bytes of stored ids [tokens], exactly, also where they are no whole characters.

        Raises `ValueError` for an id that is not one.
        """
        check_stored_ids(self.kind, tokens, len(self._texts))
        return b"".join(map(self._texts.__getitem__, tokens.tolist()))


@lru_cache(maxsize=4)
def load_sentencepiece(model: bytes) -> SentencePieceTokenizer:
    """The tokenizer of a `.model` file's content, built once in each process."""
    return SentencePieceTokenizer(model)


@dataclass(frozen=True)
class SentencePieceSettings:
    """How to train a SentencePiece tokenizer."""

    model_type: str = "unigram"
    """`unigram`, or `bpe`, which trains faster and encodes more slowly."""

    vocab_size: int = 8192
    """Ids that a model needs (`model.vocab_size`): the three special tokens, the 256 bytes and the
    newline are counted."""

    character_coverage: float = 0.9995
    """Share of the sample's characters that get a piece of their own; the rarest are written as
    bytes. From 0.98 to 1."""

    sample_bytes: int = 16 * 1024 * 1024
    """Bytes of text to train on; all of it if there is less."""

    def __post_init__(self) -> None:
        if self.model_type not in ("unigram", "bpe"):
            raise CorpusError(f"model_type: is {self.model_type!r}, must be unigram or bpe")
        if not 0.98 <= self.character_coverage <= 1:
            raise CorpusError(
                f"character_coverage: is {self.character_coverage}, must be from 0.98 to 1"
            )
        for name in ("vocab_size", "sample_bytes"):
            if getattr(self, name) < 1:
                raise CorpusError(f"{name}: is {getattr(self, name)}, must be at least 1")


def reproducible_sample(documents: Iterable[tuple[str, int]], n_bytes: int) -> set[str]:
    """The ids of the documents that make up a sample, from all (id, bytes).

    They are taken in the order of a hash of their ids until they have `n_bytes`, the last one
    whole: whatever the order they come in, and the more bytes, the more of the same documents.
    Memory grows with the sample alone.
    """
    taken: list[tuple[int, str, int]] = []  # a heap, the last in the order at its top
    total = 0
    for doc_id, size in documents:
        digest = hashlib.sha256(b"tvq sample\0" + doc_id.encode()).digest()
        heapq.heappush(taken, (-int.from_bytes(digest, "big"), doc_id, size))
        total += size
        while taken and total - taken[0][2] >= n_bytes:
            total -= heapq.heappop(taken)[2]
    return {doc_id for _, doc_id, _ in taken}


def train_sentencepiece(texts: Iterable[bytes], settings: SentencePieceSettings) -> bytes:
    """Train a lossless model; returns the content of its `.model` file.

    The first `sample_bytes` of the texts are used, and the same texts in the same order give the
    same bytes on any number of CPUs. The trainer reads them as sentences: lines, and those of over
    4,096 bytes cut before a space, or at a character border where there is none, because it would
    drop them. Raises `CorpusError` for settings that the texts cannot fill, naming the nearest
    that they can, and for text that is not valid UTF-8.
    """
    from sentencepiece import SentencePieceTrainer

    sentences = list(_sentences(texts, settings.sample_bytes))
    if not sentences:
        raise CorpusError("tokenizer: there is no text to train it on: add documents")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=settings.model_type,
            vocab_size=max(settings.vocab_size - _VOCABULARY_DIFFERENCE, 1),
            character_coverage=settings.character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=_STRETCH,
            shuffle_input_sentence=False,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), settings) from error
    return model.getvalue()


def _sentences(texts: Iterable[bytes], n_bytes: int) -> Iterator[bytes]:
    for text in texts:
        _check_utf8(text)
        last = len(text) >= n_bytes
        if len(text) > n_bytes:
            text = text[: _cut(text, 0, n_bytes)]
        n_bytes -= len(text)
        for line in _SENTENCE_BORDERS.split(text):
            yield from _stretches(line)
        if last:
            return


def _stretches(text: bytes) -> Iterator[bytes]:
    """The text in pieces of at most `_STRETCH` bytes; none if it is empty."""
    start = 0
    while len(text) - start > _STRETCH:
        end = _cut(text, start, start + _STRETCH)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _cut(text: bytes, start: int, end: int) -> int:
    """The best place up to `end` to cut valid UTF-8 that goes on beyond it.

    After the last newline; else before the last space, for a piece has its space in front; else
    at the last character border.
    """
    newline = text.rfind(b"\n", start, end)
    if newline >= 0:
        return newline + 1
    space = text.rfind(b" ", start + 1, end)
    if space >= 0:
        return space
    while text[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _check_utf8(text: bytes) -> None:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"tokenizer: byte {error.start} of the text is not valid UTF-8, which sentencepiece "
            "needs: mend or drop the document, or use the tokenizer bytes"
        ) from error


def _piece_texts(model: bytes) -> list[bytes | None]:
    """What each of a model's pieces writes, `None` for one that no text has.

    Raises `CorpusError` for what is no model, and for one that would lose something.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    kinds = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
    try:
        proto = kinds.FromString(model)
    except DecodeError as error:
        raise _no_model("it does not parse") from error
    if not proto.pieces:
        raise _no_model("it has no pieces")
    normalizer = proto.normalizer_spec
    lossy = []
    if not proto.trainer_spec.byte_fallback:
        lossy.append("byte_fallback=false (needs true)")
    if normalizer.precompiled_charsmap:
        name = normalizer.name or "a rule of its own"
        lossy.append(f"normalization_rule_name={name} (needs identity)")
    for flag in ("add_dummy_prefix", "remove_extra_whitespaces"):
        if getattr(normalizer, flag):
            lossy.append(f"{flag}=true (needs false)")
    if lossy:
        raise _not_lossless(", ".join(lossy))
    kinds = kinds.SentencePiece
    bytes_of = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
    texts: list[bytes | None] = []
    for piece in proto.pieces:
        if piece.type == kinds.BYTE:
            texts.append(bytes_of.get(piece.piece))
        elif piece.type in (kinds.NORMAL, kinds.USER_DEFINED):
            texts.append(piece.piece.encode().replace(_SPACE, b" "))
        else:
            texts.append(None)
    return texts


def _processor(model: bytes) -> "SentencePieceProcessor":
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=model)
    except (RuntimeError, UnicodeDecodeError) as error:
        raise _no_model(str(error)) from error


def _no_model(why: str) -> CorpusError:
    return CorpusError(
        f"tokenizer: the file is no working SentencePiece .model ({why}): give another, or "
        "none and let tvq train one"
    )


def _not_lossless(why: str) -> CorpusError:
    return CorpusError(
        f"tokenizer: the SentencePiece .model would not write every text back exactly, it has {why}"
        ": train it again with other flags, or give none and let tvq train one"
    )


def _training_error(message: str, settings: SentencePieceSettings) -> CorpusError:
    """What the trainer's message means in the settings' own terms."""
    size = settings.vocab_size
    if match := re.search(r"Vocabulary size too high .* value <= (\d+)", message):
        most = int(match[1]) + _VOCABULARY_DIFFERENCE
        return CorpusError(
            f"vocab_size: is {size}, but the text to train the tokenizer on has pieces for at most "
            f"{most}: set vocab_size={most} or less, or give it more text"
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        least = int(match[1]) + _VOCABULARY_DIFFERENCE
        return CorpusError(
            f"vocab_size: is {size}, but the bytes and characters of the text to train the "
            f"tokenizer on need {least}: set vocab_size={least} or more, or lower "
            f"character_coverage (now {settings.character_coverage})"
        )
    return CorpusError(f"tokenizer: SentencePiece cannot train on this text: {message}")
