"""A file that is summed as it is written: its bytes and sums, by direct writes and without."""

import hashlib
import itertools
import os

import numpy as np
import pytest

from pipeline.errors import CorpusError
from pipeline.summed_file import CHUNK_BYTES, SummedFile


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("length", [0, 1, 4096, 4097, 2**20 + 5, CHUNK_BYTES, CHUNK_BYTES + 4095])
def test_what_is_written_is_there(tmp_path, monkeypatch, length, direct):
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT")
    data = np.random.default_rng(length).bytes(length)
    file = SummedFile(tmp_path / "file")
    borders = [0, length // 3, min(length // 3 + 1, length), length]
    for begin, end in itertools.pairwise(borders):
        assert file.tell() == begin
        file.write(data[begin:end])
    file.finish()
    assert (tmp_path / "file").read_bytes() == data
    assert file.length == length
    chunks = [data[at : at + CHUNK_BYTES] for at in range(0, length, CHUNK_BYTES)]
    assert file.sums == [hashlib.sha256(chunk).hexdigest() for chunk in chunks]


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "file").write_bytes(b"other")
    with pytest.raises(CorpusError, match="cannot be written"):
        SummedFile(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"other"
