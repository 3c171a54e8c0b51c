"""Checkpoints: what was saved is what is restored, or it is named as damaged."""

import contextlib
import dataclasses
import gc
import logging
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding

from jobs.checkpoints import manifest as checkpoint_manifest
from jobs.checkpoints.manifest import (
    CheckpointManifest,
    DamagedCheckpointError,
    arrays_store,
    commit,
    complete_checkpoints,
    remove,
)
from jobs.checkpoints.restore import leaf_sums, restore, restore_newest
from jobs.checkpoints.writer import CheckpointWriter
from jobs.errors import UserError
from jobs.recipe import CheckpointConfig
from jobs.runs.lease import Fence, Lease, LeaseLostError
from jobs.runs.run_directory import RunDirectory
from model.config import PRESETS, OptimizerConfig
from model.training import TrainState, initial_state, train_step
from pipeline.loader import Batch
from pipeline.storage import Store

pytestmark = pytest.mark.compiles

MASK = 0xFFFFFFFF


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.at(tmp_path / "my runs", "first")
    run.claim("identity", {}, "")
    return run


def checkpoint_folder(run: RunDirectory, update: int) -> Path:
    return run.path / "checkpoints" / f"{update:08d}"


def arrays_folder(run: RunDirectory, update: int) -> Path:
    """Where the arrays of the complete checkpoint lie."""
    [manifest] = [found for found in complete_checkpoints(run) if found.update == update]
    return Path(arrays_store(run, manifest).location)


@contextlib.contextmanager
def writing(run: RunDirectory, keep: int = 2, fence: Fence | None = None):
    """A writer of a driver that holds the lease."""
    with Lease(run).held() as lease:
        fence = fence or Fence(run, lease.owner)
        fence._owner = lease.owner
        fence.raise_over_others()
        fingerprints = {"train": "a" * 64}
        writer = CheckpointWriter(
            run, fence, keep=CheckpointConfig(keep=keep), recipe="# it\n", fingerprints=fingerprints
        )
        with contextlib.closing(writer):
            yield writer


def save(run: RunDirectory, state: Any, *updates: int, keep: int = 2) -> None:
    with writing(run, keep) as writer:
        for update in updates:
            writer.save(
                state, update=update, next_batch=update // 2, tokens=update * 100, last=True
            )


def abstract(state: Any) -> Any:
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )


def copied(state: Any) -> Any:
    """Host copies that no donation can reach."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)


def assert_same(found: Any, expected: Any) -> None:
    """Bitwise, dtypes and structure included."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        other = dict(jax.tree_util.tree_leaves_with_path(found))[path]
        assert (other.dtype, other.shape) == (leaf.dtype, leaf.shape), path
        assert np.asarray(other).tobytes() == np.asarray(leaf).tobytes(), path


def small_state(seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "weights": jnp.asarray(random.normal(size=(40, 50)), jnp.float32),
        "inner": {
            "half": jnp.asarray(random.normal(size=(30, 7)), jnp.bfloat16),
            "count": jnp.int32(7),
            "key": jnp.asarray([1, 2**31 + 5], jnp.uint32),
            "flags": jnp.asarray([True, False, True]),
        },
    }


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path, offset: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


# ---- Sums ----------------------------------------------------------------------------------------


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


# ---- Save and restore ----------------------------------------------------------------------------


class Training(NamedTuple):
    """The tiny model, and a step that donates its state."""

    initial: TrainState
    step: Any

    def batch(self, number: int) -> Batch:
        tokens = np.random.default_rng(number).integers(3, 259, (2, 33), np.int32)
        return Batch(
            inputs=tokens[:, :-1],
            targets=tokens[:, 1:],
            documents=np.ones((2, 32), np.int32),
            loss_mask=np.ones((2, 32), bool),
            rows=np.arange(2, dtype=np.uint32),  # pyright: ignore[reportArgumentType]
        )

    def trained(self, *batches: int) -> TrainState:
        state = jax.tree.map(jnp.array, self.initial)
        for number in batches:
            state, _ = self.step(state, self.batch(number))
        return state


@pytest.fixture(scope="module")
def tiny() -> Training:
    model, optimizer = PRESETS["tiny"], OptimizerConfig(schedule_steps=100)
    # Compiles in half the time; how fast a step is does not matter here.
    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return Training(
        jax.jit(lambda: initial_state(model, optimizer, 3), compiler_options=fast)(),
        jax.jit(
            lambda state, batch: train_step(model, optimizer, 16, state, batch),
            donate_argnums=0,
            compiler_options=fast,
        ),
    )


def test_a_trained_state_comes_back_to_the_bit_and_goes_on_alike(tiny: Training, run: RunDirectory):
    state = tiny.trained(0, 1, 2)
    expected = copied(state)
    with writing(run) as writer:
        writer.save(state, update=6, next_batch=3, tokens=192)
        # The next steps donate the very buffers that are being saved.
        for number in range(3, 9):
            state, _ = tiny.step(state, tiny.batch(number))
        jax.block_until_ready(state)
    restored = restore_newest(run, abstract(tiny.initial))
    assert restored is not None
    state_again, manifest = restored
    assert_same(state_again, expected)
    assert int(state_again.updates) == manifest.update == 6
    assert int(state_again.batches) == manifest.next_batch == 3
    assert manifest.tokens == 192
    assert manifest.recipe == "# it\n"
    assert manifest.fingerprints == {"train": "a" * 64}
    assert manifest.leaves[".params['embedding']['table']"] == "float32[259,128]"
    assert manifest.leaves[".updates"] == "int32[]"
    assert len(manifest.leaves) == len(jax.tree.leaves(tiny.initial))
    for number in range(3, 9):
        state_again, _ = tiny.step(state_again, tiny.batch(number))
    assert_same(copied(state_again), copied(state))


def test_a_large_state_may_be_donated_while_it_is_written(run: RunDirectory):
    # 64 MB take longer to write than many steps.
    state = {"large": jnp.arange(2**24, dtype=jnp.float32)}
    expected = copied(state)
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0, state), donate_argnums=0)
    with writing(run) as writer:
        writer.save(state, update=2, next_batch=1, tokens=1)
        for _ in range(10):
            state = step(state)
        jax.block_until_ready(state)
    restored = restore_newest(run, abstract(state))
    assert restored is not None
    assert_same(restored[0], expected)


def test_nothing_saved_is_nothing_restored(run: RunDirectory):
    assert complete_checkpoints(run) == []
    assert restore_newest(run, abstract(small_state())) is None


def test_the_newest_are_kept_and_the_newest_is_restored(run: RunDirectory):
    with writing(run, keep=2) as writer:
        for update in (2, 4, 6, 100):
            writer.save(
                small_state(update), update=update, next_batch=update // 2, tokens=0, last=True
            )
    assert [manifest.update for manifest in complete_checkpoints(run)] == [6, 100]
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == [
        "00000006",
        "00000100",
    ]
    restored = restore_newest(run, abstract(small_state()))
    assert restored is not None
    assert_same(restored[0], small_state(100))


def test_a_checkpoint_saved_anew_replaces_the_one_before(run: RunDirectory):
    save(run, small_state(1), 2)
    first = arrays_folder(run, 2)
    killed = checkpoint_folder(run, 2) / "state-0-1.orbax-checkpoint-tmp"
    killed.mkdir()
    (killed / "half").write_text("as a killed attempt leaves it")
    save(run, small_state(2), 2)
    restored = restore_newest(run, abstract(small_state()))
    assert restored is not None
    assert_same(restored[0], small_state(2))
    second = arrays_folder(run, 2)
    assert second != first
    names = {path.name for path in checkpoint_folder(run, 2).iterdir()}
    assert names == {second.name, "manifest.json"}


class FenceThatFalls(Fence):
    """A fence that is raised over by another group right before its check: the commit."""

    checks = 0

    def check(self, *, group: bool = True) -> None:
        self.checks += group
        if group and self.checks == 1:
            other = Fence(self._run, self._owner)
            other.raise_over_others()
        super().check(group=group)


def test_who_lost_the_run_while_saving_does_not_commit(run: RunDirectory):
    save(run, small_state(1), 2)
    fence = FenceThatFalls(run, "")
    with (
        pytest.raises(LeaseLostError, match="newer worker group"),
        writing(run, fence=fence) as writer,
    ):
        writer.save(small_state(2), update=4, next_batch=2, tokens=0)
    assert fence.checks == 1
    assert [manifest.update for manifest in complete_checkpoints(run)] == [2]
    assert arrays_folder(run, 2).is_dir()


def test_new_arrays_never_meet_an_old_manifest(run: RunDirectory):
    save(run, small_state(1), 2)
    fence = FenceThatFalls(run, "")
    with contextlib.suppress(LeaseLostError), writing(run, fence=fence) as writer:
        writer.save(small_state(2), update=2, next_batch=1, tokens=0)
    restored = restore_newest(run, abstract(small_state()))
    assert restored is not None
    assert_same(restored[0], small_state(1))
    assert len([*checkpoint_folder(run, 2).glob("state-*")]) == 2


def test_who_lost_the_run_before_saving_changes_nothing(run: RunDirectory):
    save(run, small_state(1), 2)
    with writing(run) as writer:
        (run.path / "lease.json").write_text('{"owner": "another"}')
        with pytest.raises(LeaseLostError, match="another driver"):
            writer.save(small_state(2), update=2, next_batch=1, tokens=0, last=True)
    restored = restore_newest(run, abstract(small_state()))
    assert restored is not None
    assert_same(restored[0], small_state(1))


def test_a_failure_in_the_background_is_raised_by_the_next_save(run: RunDirectory):
    with contextlib.suppress(LeaseLostError), writing(run, fence=FenceThatFalls(run, "")) as writer:
        writer.save(small_state(), update=2, next_batch=1, tokens=0)
        while writer._lost is None:
            time.sleep(0.01)
        with pytest.raises(LeaseLostError):
            writer.save(small_state(), update=4, next_batch=2, tokens=0)
    assert not checkpoint_folder(run, 4).exists()
    assert complete_checkpoints(run) == []


# ---- Damage --------------------------------------------------------------------------------------


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
    """What is logged as an error; caplog misses it where `open_log` has ended the propagation."""
    messages: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("tvq.checkpoints")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


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
