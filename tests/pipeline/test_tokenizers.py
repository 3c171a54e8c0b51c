"""Text to tokens and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CorpusError
from pipeline.tokenizers import ByteTokenizer, ImageTokenizer, make_tokenizer, model_ids, text_of

# printf 'tvq tokenizer: bytes, version 1' | sha256sum, and so on. A change makes every corpus of
# that kind unreadable.
GOLDEN = "fb72f838d699364aea7bd1d6dcd45d952aaad5c1daa3709ef9f16f103eebdfd6"
GOLDEN_IMAGE = "2bb5aced94a474c1ebbb8b59c5b92ea063cda3b2adc1ef1e9deec756ea84f73a"


@given(st.binary(max_size=300))
def test_any_bytes_come_back(text):
    tokenizer = make_tokenizer("bytes")
    tokens = tokenizer.encode(text)
    assert tokens.dtype == tokenizer.dtype
    assert tokens.tolist() == list(text)
    assert tokenizer.decode(tokens) == text


@given(st.binary(max_size=50))
def test_ids_of_a_model(text):
    tokenizer = make_tokenizer("bytes")
    ids = model_ids(tokenizer, text)
    assert ids.tolist() == [byte + 3 for byte in text]
    assert text_of(tokenizer, np.concatenate([[1], ids, [1, 0, 0]])) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_only_the_tokenizer_that_was_used():
    assert make_tokenizer("bytes", ByteTokenizer.fingerprint).vocab_size == 259
    with pytest.raises(CorpusError, match="not the one that was used"):
        make_tokenizer("bytes", "0" * 64)
    with pytest.raises(
        CorpusError, match="no tokenizer 'byte'; there is: bytes, image-64x64x3, sent"
    ):
        make_tokenizer("byte")
    assert ByteTokenizer.fingerprint == GOLDEN
    with pytest.raises(CorpusError, match=r"^tokenizer: sentencepiece needs its \.model file"):
        make_tokenizer("sentencepiece")


@given(st.binary(min_size=64, max_size=64), st.integers(0, 191))
def test_a_picture_comes_back(pattern, turn):
    tokenizer = make_tokenizer("image-64x64x3", GOLDEN_IMAGE)
    assert isinstance(tokenizer, ImageTokenizer)
    assert (tokenizer.vocab_size, tokenizer.dtype) == (259, np.uint8)
    raster = pattern * 192
    raster = raster[turn:] + raster[:turn]
    tokens = tokenizer.encode(raster)
    assert tokenizer.decode(tokens) == raster
    assert tokenizer.decode(tokens[:turn]) == raster[:turn]
    picture = tokenizer.picture(tokens)
    assert (picture.shape, picture.dtype) == ((64, 64, 3), np.uint8)
    # Row 5, pixel 7, blue: 5 rows of 192 bytes, 7 pixels of 3, the third colour.
    assert picture[5, 7, 2] == raster[5 * 192 + 7 * 3 + 2]


@pytest.mark.parametrize("size", [0, 12287, 12289])
def test_a_picture_of_another_size(size):
    with pytest.raises(CorpusError, match=f"has 12288 bytes, this has {size}: prepare pictures"):
        make_tokenizer("image-64x64x3").encode(bytes(size))


@pytest.mark.parametrize("kind", ["bytes", "image-64x64x3"])
@pytest.mark.parametrize("wrong", [-1, 256])
def test_ids_that_are_none(kind, wrong):
    with pytest.raises(ValueError, match=rf"of {kind} lie in 0\.\.255, got {wrong}$"):
        make_tokenizer(kind).decode(np.array([3, wrong, 7]))
