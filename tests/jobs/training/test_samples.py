"""What a model writes while it is trained, and that a kill changes none of it."""

import contextlib
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jobs.checkpoints.manifest import complete_checkpoints
from jobs.checkpoints.restore import restore_by_recipe
from jobs.recipe import Recipe
from jobs.runs.run_directory import RunDirectory
from jobs.runs.sample_files import sample_files
from jobs.training.samples import PROMPT_TOKENS, TOKENS, Samples
from model.config import EOS_ID, N_SPECIAL
from model.sampling import Filters, filter_logits
from model.sharding import make_mesh
from model.transformer import bind, initial_cache
from pipeline.mixture import Mixture
from pipeline.windows import Windows
from tests.jobs.trained_micro import micro_recipe, train_micro
from tests.micro import write_micro
from tests.pipeline.corpora import write_pictures
from tests.runs import final_sums

pytestmark = pytest.mark.compiles

SHORT = ("training.steps=16", "training.evaluate_every=16", "checkpoint.every=8")
WRITING = (*SHORT, "training.samples=2", "training.sample_every=8", "checkpoint.keep=9")
AGAIN = 40
"""Tokens of a text that are drawn again."""
PAGE = re.compile(
    r"===== passage \d =====\n(.*?)\n\n"
    r"===== the model's (\d+) tokens(.*?) =====\n(.*?)\n\n(?==|\Z)",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    write_micro(folder)
    return folder


@pytest.fixture(scope="module")
def written(folder: Path) -> RunDirectory:
    return train_micro(folder, "written", *WRITING)


def pages(run: RunDirectory) -> dict[str, str]:
    read = run.store.child("samples").read
    return {name: read(name).decode() for name in sample_files(run.store)}


def test_the_text_of_an_update_is_what_its_checkpoint_draws_token_for_token(
    folder: Path, written: RunDirectory
):
    """Its first tokens again, each by a pass over all before it, with the key of its place."""
    assert list(pages(written)) == ["00000008.txt", "00000016.txt"]
    manifest, text = complete_checkpoints(written)[-1], pages(written)["00000016.txt"]
    assert text.startswith("written, update 16: 2 texts")
    state = restore_by_recipe(written, manifest)
    model = micro_recipe(folder).model
    network = bind(model, state.params, state.codebooks)
    key = jax.random.fold_in(jax.random.key(0), 3)  # the recipe's seed, the samples' stream

    @jax.jit
    def behind(ids, row, position):
        """The token that is drawn behind so many of them."""
        features = network(ids[None], initial_cache(model, 1)).features
        logits = filter_logits(
            network.logits(features)[:, position - 1], Filters(temperature=0.8, top_p=0.95)
        )
        own = jax.random.fold_in(jax.random.fold_in(key, row), position)
        return jax.random.categorical(own, logits[0])

    stream = Windows(folder / "corpus", "validation", sequence_length=10**6).read(0)
    found = PAGE.findall(text + "\n")
    assert len({passage for passage, *_ in found}) == 2
    for row, (passage, n_tokens, ended, continuation) in enumerate(found):
        ids = np.zeros(PROMPT_TOKENS + AGAIN, np.int32)
        ids[:PROMPT_TOKENS] = window_of(passage, stream)
        end = PROMPT_TOKENS
        while end < len(ids) and (token := int(behind(ids, row, end))) != EOS_ID:
            ids[end], end = token, end + 1
        if end < len(ids):
            assert (int(n_tokens), bool(ended)) == (end - PROMPT_TOKENS, True)
        # The last bytes may be those of a character that goes on.
        assert continuation.startswith(text_of(ids[PROMPT_TOKENS:end]).rstrip("\ufffd"))
        assert ended or int(n_tokens) == TOKENS


def text_of(ids: np.ndarray) -> str:
    stored = ids[ids >= N_SPECIAL] - N_SPECIAL
    return bytes(stored.astype(np.uint8)).decode(errors="replace")


def window_of(passage: str, stream: np.ndarray) -> np.ndarray:
    """What the model reads of the window of that text: eos, and all but its last target."""
    for begin in range(0, len(stream) - PROMPT_TOKENS + 1, PROMPT_TOKENS):
        ids = np.concatenate([[EOS_ID], stream[begin : begin + PROMPT_TOKENS - 1]])
        if text_of(ids) == passage:
            return ids
    raise AssertionError(f"no window of the split is {passage!r}")


def test_a_training_that_writes_is_the_one_that_does_not(folder: Path, written: RunDirectory):
    silent = train_micro(folder, "silent", *SHORT)
    assert sample_files(silent.store) == []
    assert final_sums(written, 16) == final_sums(silent, 16)


def test_a_resumed_training_writes_the_same_text(folder: Path, written: RunDirectory):
    """As if killed behind update 8: the checkpoint and the text of update 16 are not there yet."""
    run = RunDirectory(folder / "runs" / "resumed")
    shutil.copytree(written.path, run.path)
    shutil.rmtree(run.path / "checkpoints" / "00000016")
    (run.path / "samples" / "00000016.txt").unlink()
    train_micro(folder, "resumed", *WRITING)
    before, after = pages(written), pages(run)
    assert after.pop("00000016.txt") == before.pop("00000016.txt").replace("written,", "resumed,")
    assert after == before  # what was there was not made again


def test_the_first_text_of_an_update_stays(folder: Path):
    """As where a killed training had sent it to MLflow, and another mesh rounds otherwise."""
    run, recipe = RunDirectory(folder / "twice"), micro_recipe(folder, *WRITING)
    for letter in "xy":
        write_once(run, recipe, np.full((2, 4), N_SPECIAL + ord(letter), np.int32))
    [text] = pages(run).values()
    assert [continuation for *_, continuation in PAGE.findall(text + "\n")] == ["xxxx", "xxxx"]


def test_a_folder_that_cannot_be_written_to_ends_no_training(
    folder: Path, caplog: pytest.LogCaptureFixture
):
    run = RunDirectory(folder / "hindered")
    run.path.mkdir()
    (run.path / "samples").write_text("a file where the folder should be")
    written = np.full((2, 4), N_SPECIAL + ord("x"), np.int32)
    write_once(run, micro_recipe(folder, *WRITING), written)
    assert "the samples of update 8 are not kept: " in caplog.text


def test_a_model_of_pictures_draws_them_side_by_side(folder: Path):
    corpus = folder / "pictures"
    write_pictures(folder / "photos", corpus)
    recipe = micro_recipe(folder, *WRITING, f"data.corpus={corpus}")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.int32)
    run = RunDirectory(folder / "painter")
    asked = write_once(run, recipe, pixels.reshape(2, -1) + N_SPECIAL)
    assert asked == {"prompts": [[EOS_ID], [EOS_ID]], "n_tokens": 64 * 64 * 3, "ignore_eos": True}
    [name] = sample_files(run.store)
    assert name == "00000008.png"
    drawn = np.asarray(Image.open(run.path / "samples" / name))
    row = np.concatenate(list(pixels), axis=1)
    np.testing.assert_array_equal(drawn, np.kron(row, np.ones((3, 3, 1), np.int32)))


def write_once(run: RunDirectory, recipe: Recipe, written: np.ndarray) -> dict[str, Any]:
    """Keeps those ids as the text of update 8; what was asked of the model."""
    asked = {}

    def compute(state: None, prompts: jax.Array, filters: Filters, n_tokens: int) -> jax.Array:
        asked.update(prompts=prompts.tolist(), n_tokens=n_tokens, ignore_eos=filters.ignore_eos)
        return jnp.asarray(written)

    mixture = Mixture.load(recipe.data.corpora)
    with contextlib.closing(
        Samples(run, recipe, mixture, make_mesh(jax.devices()), compute)
    ) as all_:
        all_.write(None, 8)
    return asked
