"""Text to tokens and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CorpusError
from pipeline.tokenizers import ByteTokenizer, make_tokenizer, model_ids, text_of

# sha256sum of the tokenizer's name and version. A change makes every corpus of bytes unreadable.
GOLDEN = "fb72f838d699364aea7bd1d6dcd45d952aaad5c1daa3709ef9f16f103eebdfd6"


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
    with pytest.raises(CorpusError, match="no tokenizer 'byte'; there is: bytes"):
        make_tokenizer("byte")
    assert ByteTokenizer.fingerprint == GOLDEN
