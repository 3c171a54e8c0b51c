"""A damaged checkpoint is named, and the one before it is taken."""

import dataclasses
import gc
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jobs.checkpoints import manifest as checkpoint_manifest
from jobs.checkpoints.manifest import (
    CheckpointManifest,
    DamagedCheckpointError,
    commit,
    complete_checkpoints,
    remove,
)
from jobs.checkpoints.restore import restore, restore_newest
from jobs.errors import UserError
from jobs.runs.run_directory import RunDirectory
from pipeline.storage import Store
from tests.jobs.checkpoints.small_checkpoints import (
    abstract,
    arrays_folder,
    assert_same,
    checkpoint_folder,
    copied,
    save,
    small_state,
    writing,
)
from tests.logged import logged

pytestmark = pytest.mark.compiles


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path, offset: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with checkpoints of `small_state(2)` and `small_state(4)`; to be copied."""
    run = RunDirectory.at(tmp_path_factory.mktemp("saved"), "first")
    run.claim("identity", {}, "")
    with writing(run) as writer:
        for update in (2, 4):
            writer.save(
                small_state(update), update=update, next_batch=update // 2, tokens=0, last=True
            )
    return run


@pytest.fixture
def two(saved: RunDirectory, tmp_path: Path) -> RunDirectory:
    shutil.copytree(saved.path, tmp_path / "first")
    return RunDirectory(tmp_path / "first")


@pytest.fixture
def errors() -> Iterator[list[str]]:
    with logged("tvq.checkpoints", logging.ERROR) as messages:
        yield messages


def restored_of(run: RunDirectory) -> tuple[Any, CheckpointManifest]:
    restored = restore_newest(run, abstract(small_state()))
    assert restored is not None
    return restored


def test_a_flipped_bit_in_any_file_is_detected(two: RunDirectory):
    random = np.random.default_rng(20260101)
    manifest = complete_checkpoints(two)[-1]
    folder = arrays_folder(two, 4)
    assert {"_METADATA", "manifest.ocdbt"} < manifest.files.keys()
    assert {path for path in folder.rglob("*") if path.is_file()} == {
        folder / name for name in manifest.files
    }
    for name in manifest.files:
        path = folder / name
        content = path.read_bytes()
        for _ in range(4):
            flipped(path, int(random.integers(len(content))), int(random.integers(8)))
            with pytest.raises(DamagedCheckpointError) as caught:
                restore(two, manifest, abstract(small_state()))
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)
            path.write_bytes(content)
    assert_same(copied(restore(two, manifest, abstract(small_state()))), copied(small_state(4)))


# Orbax leaves coroutines unawaited where a read fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_a_flipped_bit_that_no_file_shows_is_detected_or_harmless(two: RunDirectory):
    """As on the way from the store: the sums of the leaves stand alone."""
    random = np.random.default_rng(20260102)
    manifest = dataclasses.replace(complete_checkpoints(two)[-1], digests={})
    folder = arrays_folder(two, 4)
    expected = copied(small_state(4))
    detected = set()
    for name in manifest.files:
        path = folder / name
        content = path.read_bytes()
        for _ in range(4):
            flipped(path, int(random.integers(len(content))), int(random.integers(8)))
            try:
                found = restore(two, manifest, abstract(small_state()))
            except DamagedCheckpointError as damage:
                detected.add(name)
                assert "leaf [" in str(damage) or str(folder) in str(damage)  # noqa: PT017
            else:
                assert_same(copied(found), expected)
            path.write_bytes(content)
    gc.collect()
    assert len(detected) >= 4, detected


def test_other_arrays_in_sound_files_are_told_by_the_leaf_sum(two: RunDirectory):
    state = {"weights": jnp.zeros((64, 64), jnp.float32)}
    save(two, state, 6, keep=3)
    manifest = complete_checkpoints(two)[-1]
    other = {"weights": state["weights"].at[63, 63].set(1e-30)}
    save(two, other, 8, keep=4)
    target = arrays_folder(two, 6)
    shutil.rmtree(target)
    shutil.copytree(arrays_folder(two, 8), target)
    newer = complete_checkpoints(two)[-1]
    exchanged = dataclasses.replace(manifest, files=newer.files, digests=newer.digests)
    with pytest.raises(DamagedCheckpointError, match=r"leaf \['weights'\] does not have the sum"):
        restore(two, exchanged, abstract(state))


@pytest.mark.parametrize("harm", [truncated, Path.unlink], ids=["truncated", "missing"])
def test_a_file_with_another_length_is_named_and_the_one_before_taken(
    two: RunDirectory, harm: Any, errors: list[str]
):
    manifest = complete_checkpoints(two)[-1]
    state_folder = arrays_folder(two, 4)
    for name in manifest.files:
        content = (state_folder / name).read_bytes()
        harm(state_folder / name)
        with pytest.raises(DamagedCheckpointError) as caught:
            restore(two, manifest, abstract(small_state()))
        assert str(state_folder / name) in str(caught.value)
        assert f"expected {len(content)} bytes" in str(caught.value)
        (state_folder / name).write_bytes(content)
    harm(state_folder / "manifest.ocdbt")
    state, taken = restored_of(two)
    assert taken.update == 2
    assert_same(copied(state), copied(small_state(2)))
    assert len(errors) == 1
    assert str(state_folder / "manifest.ocdbt") in errors[0]


def test_a_checkpoint_without_its_manifest_does_not_exist(two: RunDirectory, errors: list[str]):
    (checkpoint_folder(two, 4) / "manifest.json").unlink()
    assert [manifest.update for manifest in complete_checkpoints(two)] == [2]
    state, taken = restored_of(two)
    assert taken.update == 2
    assert_same(copied(state), copied(small_state(2)))
    assert errors == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"format_version": 1}'])
def test_a_damaged_manifest_is_named_and_the_one_before_taken(
    two: RunDirectory, text: str, errors: list[str]
):
    path = checkpoint_folder(two, 4) / "manifest.json"
    path.write_text(text)
    state, taken = restored_of(two)
    assert taken.update == 2
    assert_same(copied(state), copied(small_state(2)))
    assert len(errors) == 1
    assert str(path) in errors[0]


def test_a_checkpoint_that_is_retired_after_it_was_listed_does_not_exist(
    two: RunDirectory, errors: list[str], monkeypatch: pytest.MonkeyPatch
):
    read = checkpoint_manifest._read

    def read_late(store: Store, name: str) -> CheckpointManifest:
        remove(two, 2)
        return read(store, name)

    monkeypatch.setattr(checkpoint_manifest, "_read", read_late)
    assert [manifest.update for manifest in complete_checkpoints(two)] == [4]
    assert errors == []


def test_a_flipped_bit_anywhere_in_the_manifest_is_detected_or_harmless(two: RunDirectory):
    random = np.random.default_rng(5)
    path = checkpoint_folder(two, 4) / "manifest.json"
    content = path.read_bytes()
    [_, expected] = complete_checkpoints(two)
    for offset in random.integers(len(content), size=100):
        flipped(path, offset, int(random.integers(8)))
        found = complete_checkpoints(two)
        assert [manifest.update for manifest in found] in ([2], [2, 4])
        assert found[-1] == expected or len(found) == 1
        path.write_bytes(content)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("what", ["manifest.json", "manifest.ocdbt"])
def test_where_every_checkpoint_is_damaged_training_does_not_begin_anew(
    two: RunDirectory, what: str
):
    manifests = what == "manifest.json"
    folders = [(checkpoint_folder if manifests else arrays_folder)(two, n) for n in (2, 4)]
    for folder in folders:
        truncated(folder / what)
        flipped(folder / what, 30, 3)
    with pytest.raises(UserError, match="no checkpoint of run first is intact") as caught:
        restore_newest(two, abstract(small_state()))
    assert "\n" not in str(caught.value)
    gc.collect()


def test_a_newer_format_asks_for_an_upgrade(two: RunDirectory):
    manifest = complete_checkpoints(two)[-1]
    commit(two, dataclasses.replace(manifest, format_version=3), lambda: None)
    with pytest.raises(UserError, match=r"format 3 is newer than 2.*upgrade") as caught:
        restore_newest(two, abstract(small_state()))
    assert "manifest.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"weights": jnp.zeros((39, 50))}, "float32[40,50], expected float32[39,50]"),
        ({"weights": jnp.zeros((50, 40))}, "float32[40,50], expected float32[50,40]"),
        ({"weights": jnp.zeros((40, 50), jnp.int32)}, "expected int32[40,50]"),
        ({"more": jnp.zeros(2)}, "['more'] is absent, expected float32[2]"),
        ({"inner": {}}, "['inner']['count'] is int32[], expected absent"),
    ],
)
def test_a_checkpoint_of_another_model_is_one_clear_line(
    two: RunDirectory, change: dict[str, Any], expected: str
):
    with pytest.raises(UserError) as caught:
        restore_newest(two, abstract(small_state() | change))
    assert expected in str(caught.value)
    assert "holds another model" in str(caught.value)
    assert "\n" not in str(caught.value)
