"""SentencePiece: text and back, models that would lose something, samples and training."""

import ast
import hashlib
import io
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CorpusError
from pipeline.sentencepiece_tokenizer import (
    SentencePieceSettings,
    SentencePieceTokenizer,
    load_sentencepiece,
    reproducible_sample,
    train_sentencepiece,
)
from pipeline.tokenizers import make_tokenizer

TEXTS = [Path(str(module.__file__)).read_bytes() for module in (ast, io, hashlib)]
KINDS = pytest.mark.parametrize("model_type", ["unigram", "bpe"])

# Any text, with what SentencePiece treats in ways of its own far more often than chance has it.
troublesome = st.sampled_from(
    ["\u2581", " ", "  ", "\n", "\r\n", "\t", "\0", "\u2585", "<0x0A>", "<s>", "<unk>", "\ufffe"]
)
any_text = st.lists(st.text(max_size=8) | troublesome, max_size=30).map("".join)


@cache
def model_of(model_type: str) -> bytes:
    return train_sentencepiece(TEXTS, SentencePieceSettings(model_type, vocab_size=700))


def theirs(model: bytes):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=model)


def trained_by_hand(**flags) -> bytes:
    """A model of a user's, lossless but for the flags."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    lossless = {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
    }
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].split(b"\n")),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        **{"vocab_size": 400, **lossless, **flags},
    )
    return model.getvalue()


@KINDS
@given(text=any_text)
def test_any_text_comes_back(model_type, text):
    tokenizer = load_sentencepiece(model_of(model_type))
    tokens = tokenizer.encode(text.encode())
    assert tokens.dtype == tokenizer.dtype == np.uint16
    assert all(0 <= i < tokenizer.vocab_size - 3 for i in tokens)
    assert tokenizer.decode(tokens) == text.encode()


@KINDS
def test_every_character_comes_back(model_type):
    tokenizer = load_sentencepiece(model_of(model_type))
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)])).encode()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@KINDS
@given(text=st.lists(st.sampled_from(["def ", "self.", "\n", "é", "    "]), max_size=40))
def test_the_ids_are_those_of_sentencepiece(model_type, text):
    model = model_of(model_type)
    tokenizer, plain = load_sentencepiece(model), "".join(text)
    # Piece 0 is `<unk>`, which is not stored.
    assert tokenizer.encode(plain.encode()).tolist() == [
        i - 1 for i in theirs(model).encode(plain, out_type=int)
    ]
    assert tokenizer.vocab_size == len(theirs(model)) - 1 + 3 == 700


@KINDS
@given(ids=st.lists(st.integers(0, 696), max_size=60))
def test_any_ids_have_bytes(model_type, ids):
    pieces = theirs(model_of(model_type))
    expected = b""
    for i in ids:
        piece = pieces.id_to_piece(i + 1)
        whole = piece.replace("\u2581", " ").encode()
        expected += bytes([int(piece[3:5], 16)]) if pieces.is_byte(i + 1) else whole
    assert load_sentencepiece(model_of(model_type)).decode(np.array(ids, np.uint16)) == expected


@pytest.mark.parametrize("wrong", [-1, 697])
def test_ids_that_are_none(wrong):
    with pytest.raises(ValueError, match=rf"of sentencepiece lie in 0\.\.696, got {wrong}$"):
        load_sentencepiece(model_of("bpe")).decode(np.array([5, wrong]))


def test_text_that_is_not_utf8():
    with pytest.raises(CorpusError, match=r"byte 2 of the text is not valid UTF-8"):
        load_sentencepiece(model_of("bpe")).encode(b"ab\xff")
    with pytest.raises(CorpusError, match=r"byte 0 of the text is not valid UTF-8"):
        train_sentencepiece([b"\xed\xa0\x80"], SentencePieceSettings())  # a surrogate


@KINDS
@pytest.mark.parametrize(
    "text", ["a\n" * 5000, " " * 9000, "é" * 5000, "\u2581" * 9000, "x" * 9000]
)
def test_long_texts_come_back(model_type, text):
    tokenizer = load_sentencepiece(model_of(model_type))
    assert tokenizer.decode(tokenizer.encode(text.encode())) == text.encode()


def test_a_text_far_along_is_written_as_alone():
    tokenizer = load_sentencepiece(model_of("unigram"))
    alone = tokenizer.encode(TEXTS[0])
    before = b"x = 1\n" * 2048  # three whole stretches and what is left after them
    together = tokenizer.encode(before[: 682 * 6 * 3] + TEXTS[0])
    assert together[-len(alone) :].tolist() == alone.tolist()


def test_fingerprint_and_pickle():
    model = model_of("bpe")
    tokenizer = SentencePieceTokenizer(model)
    expected = hashlib.sha256(b"tvq tokenizer: sentencepiece, version 1\0" + model).hexdigest()
    assert make_tokenizer("sentencepiece", expected, model) is load_sentencepiece(model)
    assert pickle.loads(pickle.dumps(tokenizer)) is load_sentencepiece(model)
    assert tokenizer.model == model
    with pytest.raises(CorpusError, match="not the one that was used"):
        make_tokenizer("sentencepiece", expected, model_of("unigram"))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"byte_fallback": False}, r"byte_fallback=false \(needs true\)"),
        ({"normalization_rule_name": "nfkc"}, r"normalization_rule_name=nfkc \(needs identity\)"),
        ({"add_dummy_prefix": True}, r"add_dummy_prefix=true \(needs false\)"),
        ({"remove_extra_whitespaces": True}, r"remove_extra_whitespaces=true \(needs false\)"),
        ({"add_dummy_prefix": True, "byte_fallback": False}, "byte_fallback=.*, add_dummy_prefix="),
    ],
)
def test_a_model_that_would_lose_something(flags, named):
    with pytest.raises(CorpusError, match=f"^tokenizer: .* not write every text back .*{named}"):
        make_tokenizer("sentencepiece", model=trained_by_hand(**flags))


@pytest.mark.parametrize(
    "flags",
    [
        {"pad_id": 3, "control_symbols": ["<sep>"]},
        {"model_type": "bpe", "user_defined_symbols": ["<|end|>", "\n\n", "\u2581\u2581"]},
        {"model_type": "char", "vocab_size": 320, "hard_vocab_limit": False},
        {"treat_whitespace_as_suffix": True, "split_by_whitespace": False},
    ],
)
def test_a_lossless_model_of_a_user(flags):
    model = trained_by_hand(**flags)
    tokenizer = make_tokenizer("sentencepiece", model=model)
    pieces = theirs(model)
    specials = [i for i in range(len(pieces)) if pieces.is_control(i) or pieces.is_unknown(i)]
    assert tokenizer.vocab_size == len(pieces) - len(specials) + 3

    @given(any_text | st.just("a <|end|>\n\n \u2581\u2581  <sep></s> b"))
    def comes_back(text):
        assert tokenizer.decode(tokenizer.encode(text.encode())) == text.encode()

    comes_back()


@pytest.mark.parametrize("model", [b"", b"not a model", b"\0" * 100])
def test_no_model(model):
    with pytest.raises(CorpusError, match=r"no working SentencePiece \.model"):
        make_tokenizer("sentencepiece", model=model)


def test_a_torn_model():
    for size in range(0, len(model_of("bpe")), 501):
        with pytest.raises(CorpusError, match=r"^tokenizer: "):
            make_tokenizer("sentencepiece", model=model_of("bpe")[:size])


@KINDS
def test_training_repeats_in_another_process_on_one_cpu(model_type, capfd):
    program = (
        "import sys, pickle, hashlib; from pipeline.sentencepiece_tokenizer import *;"
        "texts, kind = pickle.loads(sys.stdin.buffer.read());"
        "model = train_sentencepiece(texts, SentencePieceSettings(kind, vocab_size=700));"
        "print(hashlib.sha256(model).hexdigest())"
    )
    cpu = min(os.sched_getaffinity(0))
    ran = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, [{cpu}]); {program}"],
        input=pickle.dumps((TEXTS, model_type)),
        capture_output=True,
        check=True,
    )
    assert ran.stdout.decode().strip() == hashlib.sha256(model_of(model_type)).hexdigest()
    assert ran.stderr == b""  # not a word of the trainer's log


def test_a_model_tells_nothing_of_where_it_was_trained():
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
    spec = model.FromString(model_of("bpe")).trainer_spec
    assert (list(spec.input), spec.model_prefix, spec.input_format) == ([], "", "")
    assert (spec.num_threads, list(spec.user_defined_symbols)) == (16, ["\n"])


@KINDS
def test_the_trainer_drops_nothing(model_type):
    # The trainer would drop these lines, for their length and their characters, were they not cut.
    long, barred = b"zebra quagga " * 900, "\u2585bongo\0okapi".encode() * 200
    settings = SentencePieceSettings(model_type, vocab_size=500)
    model = train_sentencepiece([TEXTS[0] + b"\n", long, barred], settings)
    for word in (b" quagga", b"bongo", b"okapi"):
        assert len(load_sentencepiece(model).encode(word)) <= 3


@KINDS
def test_a_vocabulary_that_does_not_fit(model_type):
    text = b"the quick brown fox jumps over the lazy dog\n" * 20
    with pytest.raises(CorpusError, match=r"^vocab_size: is 5000, .* for at most") as most:
        train_sentencepiece([text], SentencePieceSettings(model_type, 5000))
    with pytest.raises(CorpusError, match=r"^vocab_size: is 259, .* need") as least:
        train_sentencepiece([text], SentencePieceSettings(model_type, 259))
    for error in (most, least):
        named = int(str(error.value).split("set vocab_size=")[1].split()[0])
        model = train_sentencepiece([text], SentencePieceSettings(model_type, named))
        assert load_sentencepiece(model).vocab_size == named
    with pytest.raises(CorpusError, match="no text to train it on"):
        train_sentencepiece([b"", b"\n\n"], SentencePieceSettings(model_type))


def test_only_the_sample_is_read():
    def texts():
        yield TEXTS[0]
        yield TEXTS[1]
        raise AssertionError("read beyond the sample")

    size = len(TEXTS[0]) + 1000
    settings = SentencePieceSettings("bpe", 600, sample_bytes=size)
    cut = TEXTS[1][: TEXTS[1].rindex(b"\n", 0, 1000) + 1]
    assert train_sentencepiece(texts(), settings) == train_sentencepiece([TEXTS[0], cut], settings)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model_type": "word"}, "model_type: is 'word', must be unigram or bpe"),
        ({"character_coverage": 0.5}, "character_coverage: is 0.5, must be from 0.98 to 1"),
        ({"vocab_size": 0}, "vocab_size: is 0, must be at least 1"),
        ({"sample_bytes": 0}, "sample_bytes: is 0, must be at least 1"),
    ],
)
def test_wrong_settings(setting, message):
    with pytest.raises(CorpusError, match=f"^{message}$"):
        SentencePieceSettings(**setting)


documents = st.dictionaries(st.text(max_size=5), st.integers(0, 50), max_size=30)


@given(documents, st.integers(0, 400), st.randoms())
def test_a_sample_is_the_first_of_the_order_of_hashes(sizes, n_bytes, random):
    expected, total = set(), 0
    for doc_id in sorted(
        sizes, key=lambda i: hashlib.sha256(b"tvq sample\0" + i.encode()).digest()
    ):
        if total >= n_bytes:
            break
        expected.add(doc_id)
        total += sizes[doc_id]
    shuffled = list(sizes.items())
    random.shuffle(shuffled)
    assert reproducible_sample(shuffled, n_bytes) == expected
