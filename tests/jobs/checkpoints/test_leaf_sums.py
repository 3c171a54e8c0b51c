"""The sum of a leaf: that of its words in memory, which any flipped bit changes."""

import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.checkpoints.restore import leaf_sums
from tests.jobs.checkpoints.small_checkpoints import small_state

pytestmark = pytest.mark.compiles

MASK = 0xFFFFFFFF


def mixed_sum(array: np.ndarray) -> int:
    """The sum of a leaf, word by word in Python's integers."""
    width = min(array.dtype.itemsize, 4)
    raw = array.tobytes()
    total = 0
    for index in range(len(raw) // width):
        word = int.from_bytes(raw[index * width : (index + 1) * width], "little")
        word ^= (index * 0x9E3779B9) & MASK
        word = ((word ^ (word >> 16)) * 0x85EBCA6B) & MASK
        word = ((word ^ (word >> 13)) * 0xC2B2AE35) & MASK
        total += word ^ (word >> 16)
    return total & MASK


def sum_of(array: Any) -> int:
    return int(leaf_sums({"leaf": array})["['leaf']"])


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (0,)])
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool", "float64"]
)
def test_the_sum_is_that_of_the_words_in_memory(dtype: str, shape: tuple[int, ...]):
    random = np.random.default_rng(3)
    with jax.enable_x64(dtype == "float64"):
        leaf = jnp.asarray(random.normal(size=shape) * 100, dtype)
        assert leaf.dtype == dtype
        assert sum_of(leaf) == mixed_sum(np.asarray(leaf))


def test_the_sum_of_many_words_wraps():
    words = np.random.default_rng(0).integers(0, 2**32, 5000, np.uint32)
    assert sum_of(jnp.asarray(words)) == mixed_sum(words)


def test_bits_that_compare_equal_have_other_sums():
    zeros = np.zeros(3, np.float32)
    negative = np.negative(zeros)
    quiet, other = (
        np.frombuffer(struct.pack("<I", n), np.float32) for n in (0x7FC00000, 0x7FC00001)
    )
    assert sum_of(jnp.asarray(zeros)) != sum_of(jnp.asarray(negative))
    assert sum_of(jnp.asarray(quiet)) != sum_of(jnp.asarray(other))


@given(st.integers(0, 2**32 - 1), st.integers(0, 39), st.integers(0, 31))
@settings(max_examples=50, deadline=None)
def test_any_flipped_bit_changes_the_sum(seed: int, index: int, bit: int):
    words = np.random.default_rng(seed).integers(0, 2**32, 40, np.uint32)
    before = sum_of(jnp.asarray(words))
    words[index] ^= np.uint32(1 << bit)
    assert sum_of(jnp.asarray(words)) != before


def test_exchanged_rows_change_the_sum():
    rows = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    sums = {sum_of(jnp.asarray(np.roll(rows, shift, axis=0))) for shift in range(6)}
    assert len(sums) == 6


def test_each_leaf_is_named_by_its_path():
    assert list(leaf_sums(small_state())) == [
        "['inner']['count']",
        "['inner']['flags']",
        "['inner']['half']",
        "['inner']['key']",
        "['weights']",
    ]
