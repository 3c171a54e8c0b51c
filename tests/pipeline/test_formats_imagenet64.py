"""ImageNet64 as it is published: pixels, splits, memory; nothing is ever unpickled."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.contents import Content
from pipeline.errors import CorpusError
from pipeline.formats import FormatSettings, make_format, survey
from tests.pipeline.format_reading import (
    CountingFile,
    contents,
    damage,
    open_bytes,
    peak_memory,
    read,
    texts,
    zipped,
)

MB = 1_000_000


def batch(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 12288), np.uint8)


def npz(data: np.ndarray, *, compressed: bool = False) -> bytes:
    out = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(out, data=data, labels=np.arange(len(data)), mean=np.zeros(12288))
    return out.getvalue()


def raster(row: np.ndarray) -> bytes:
    """Pixel by pixel, from the three planes."""
    red, green, blue = row[:4096], row[4096:8192], row[8192:]
    return b"".join(bytes(pixel) for pixel in zip(red, green, blue, strict=True))


@pytest.mark.parametrize("compressed", [False, True])
def test_imagenet64_pixels(compressed):
    data = batch(3)
    found = texts(npz(data, compressed=compressed), "a/val_data.npz", kind="imagenet64")
    assert found == [raster(row) for row in data]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_imagenet64_splits_by_rows_counted_through_all_batches(compressed, rows):
    sizes = {f"part/train_data_batch_{i}.npz": 3 + i for i in range(1, 11)}
    arrays = {name: batch(n, seed) for seed, (name, n) in enumerate(sizes.items())}
    files = {name: npz(array, compressed=compressed) for name, array in arrays.items()}
    settings = FormatSettings("imagenet64", train_rows=40)
    # Sorted as ids are: 10 before 2.
    settings = survey(settings, [(name, open_bytes(files[name])) for name in sorted(files)])
    assert dict(settings.first_rows)["part/train_data_batch_10.npz"] == sum(range(4, 13))
    found = []
    for name, n in sizes.items():
        form, file = make_format(settings, name), io.BytesIO(files[name])
        pieces = form.pieces(file, name, len(files[name]), rows * 12288)
        assert len(pieces) == (1 if compressed else -(-n // rows))
        for piece in pieces:
            for item in form.documents(file, name, piece):
                assert isinstance(item, Content)
                found.append((item.split, b"".join(item.blocks)))
    splits = ["train"] * 40 + ["validation"] * (sum(sizes.values()) - 40)
    pixels = [raster(row) for array in arrays.values() for row in array]
    assert found == list(zip(splits, pixels, strict=True))


def test_val_data_is_test():
    [found] = read(npz(batch(2)), "val_data.npz", kind="imagenet64")
    assert [item.split for item in found] == ["test", "test"]


@given(st.integers(1, 300), st.integers(1, 40))
def test_imagenet64_does_not_depend_on_the_cut(n, rows):
    data = batch(n)
    found = texts(npz(data), "val_data.npz", rows * 12288, kind="imagenet64")
    planes = data.reshape(n, 3, 4096)
    pixels = np.stack([planes[:, channel] for channel in range(3)], axis=-1)
    assert found == [row.tobytes() for row in pixels]


def test_survey_reads_headers_alone():
    data = npz(batch(2000))
    file = CountingFile(data)
    settings = survey(FormatSettings("imagenet64"), [("train_data_batch_1.npz", lambda: file)])
    assert settings.first_rows == (("train_data_batch_1.npz", 0),)
    assert file.n_read < 50_000
    assert file.closed


def test_survey_refuses_files_that_do_not_go_together():
    one = open_bytes(npz(batch(1)))

    def of(*names: str) -> None:
        survey(FormatSettings("imagenet64"), [(name, one) for name in names])

    of("train_data_batch_1.npz", "train_data_batch_2.npz")
    of("val_data.npz")
    with pytest.raises(CorpusError, match=r"^train_data_batch_2\.npz is missing before train_data"):
        of("train_data_batch_1.npz", "train_data_batch_3.npz")
    with pytest.raises(CorpusError, match=r"are both train batch 1: leave one out$"):
        of("a/train_data_batch_1.npz", "b/train_data_batch_1.npz")
    for name in ("train_data_batch_01.npz", "labels.npz", "x_val_data.npz"):
        with pytest.raises(CorpusError, match=rf"^{name}: expected train_data_batch_1\.npz"):
            of(name)
    with pytest.raises(ValueError, match=r"call formats\.survey"):
        texts(npz(batch(1)), "train_data_batch_1.npz", kind="imagenet64")


class Trap:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_arrays_are_refused_and_never_loaded(tmp_path):
    trap = tmp_path / "sprung"
    out = io.BytesIO()
    np.savez(out, data=np.array([Trap(trap)], object))
    with pytest.raises(CorpusError, match=r"^val_data\.npz: data is object of shape \(1,\): expec"):
        texts(out.getvalue(), "val_data.npz", kind="imagenet64")
    data = zipped({"data.npy": pickle.dumps(Trap(trap))})
    with pytest.raises(CorpusError, match=r"^val_data\.npz: data\.npy is no array"):
        texts(data, "val_data.npz", kind="imagenet64")
    assert not trap.exists()


@pytest.mark.parametrize(
    "data",
    [batch(2).astype(np.int64), batch(2)[:, :3072], batch(1)[0], np.asfortranarray(batch(2))],
)
def test_arrays_of_another_kind_are_refused(data):
    with pytest.raises(CorpusError, match=r"expected uint8 of shape \[n, 12288\]$"):
        texts(npz(data), "val_data.npz", kind="imagenet64")


def npy(claim: int, rows: int) -> bytes:
    out = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (claim, 12288)}
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue() + bytes(rows * 12288)


def test_numbers_as_python_2_wrote_them_are_read():
    data = npy(2, 2).replace(b"'shape': (2, 12288), }  ", b"'shape': (2L, 12288L), }")
    assert (
        texts(zipped({"data.npy": data}), "val_data.npz", kind="imagenet64") == [bytes(12288)] * 2
    )


def test_damaged_batches_are_refused():
    def of(data: bytes) -> None:
        texts(data, "val_data.npz", kind="imagenet64")

    of(zipped({"data.npy": npy(2, 2)}))
    with pytest.raises(CorpusError, match="not the 5 rows that it claims"):
        of(zipped({"data.npy": npy(5, 2)}))
    with pytest.raises(CorpusError, match=r"expected one array 'data', found 'x\.npy'$"):
        of(zipped({"x.npy": npy(2, 2)}))
    with pytest.raises(CorpusError, match="names a path outside itself"):
        of(zipped({"data.npy": npy(2, 2), "../x.npy": b""}))
    for data in (b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{", b"\x93NUMPY\x01\x00\x02\x00{("):
        with pytest.raises(CorpusError, match=r"^val_data\.npz: data\.npy is no array"):
            of(zipped({"data.npy": data}))
    whole = npz(batch(50), compressed=True)
    for damaged in damage(whole):
        with pytest.raises(CorpusError, match=r"^val_data\.npz: "):
            of(damaged)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_batch_is_read_in_bounded_memory(compressed):
    data = npz(np.repeat(batch(64), 100, axis=0), compressed=compressed)

    def measure():
        for item in contents(io.BytesIO(data), "val_data.npz", kind="imagenet64"):
            assert sum(map(len, item.blocks)) == 12288

    assert peak_memory(measure) < 8 * MB
