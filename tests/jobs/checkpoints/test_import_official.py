"""`tvq import`: an official checkpoint becomes a run that the other commands read."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jobs import recipe as recipes
from jobs.checkpoints.manifest import complete_checkpoints
from jobs.cli.main import run_cli
from jobs.errors import ExitCode
from jobs.evaluation.trained_model import load_trained_model
from jobs.runs.run_directory import RunDirectory
from model.official import read_checkpoint
from model.transformer import bind, initial_cache
from pipeline.loader import evaluation_batches
from pipeline.manifest import Manifest
from pipeline.tokenizers import ImageTokenizer
from tests.micro import write_micro
from tests.model.test_official import FLAGS, OPTIMIZER_FLAGS, file_of, official_leaves

BYTES = FLAGS | {"n_vocab": 259, "dtype": "float32"}
FILE = BYTES | OPTIMIZER_FLAGS | {"sequence_len": 64, "update_len": 16, "global_batch_size": 8}
LEAVES = official_leaves(BYTES)
UPDATES = 125_000


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_micro(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TVQ_ROOT", raising=False)
    (tmp_path / "flags.json").write_text(json.dumps(FILE))
    (tmp_path / "checkpoint").write_bytes(file_of(LEAVES))
    return tmp_path


def command(*more: str, run: str = "official", corpus: str = "corpus") -> list[str]:
    files = ("checkpoint", "--flags", "flags.json")
    return ["import", *files, "--run", run, "--corpus", corpus, *more]


def set_tokenizer(workplace: Path, **changes) -> None:
    """Makes the corpus say that it has another tokenizer."""
    manifest = Manifest.load(workplace / "corpus")
    tokenizer = replace(manifest.tokenizer, **changes)
    replace(manifest, tokenizer=tokenizer).save(workplace / "corpus")


def mistake(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert run_cli(arguments) == ExitCode.USER
    output = capsys.readouterr()
    assert output.out == ""
    [line] = output.err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.compiles
def test_the_run_has_every_number_and_can_be_used(workplace: Path, capsys):
    assert run_cli(command("--json")) == ExitCode.OK
    printed = json.loads(capsys.readouterr().out)
    assert (printed["run"], printed["update"]) == ("official", UPDATES)
    shutil.move(workplace / "checkpoint", workplace / "moved")  # the run stands by itself

    run = RunDirectory(workplace / "runs" / "official")
    trained = load_trained_model(run)
    model, optimizer, network, _ = read_checkpoint((workplace / "moved").read_bytes(), FILE)
    for ours, theirs in zip(
        jax.tree.leaves((trained.params, trained.codebooks)), jax.tree.leaves(network), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    recipe = trained.recipe
    assert recipe == recipes.from_yaml(run.recipe_text(), "stored")
    assert (trained.update, recipe.model, recipe.optimizer) == (UPDATES, model, optimizer)
    assert (recipe.data.sequence_length, recipe.training.update_length) == (64, 16)
    assert (recipe.training.batch_size, recipe.training.steps) == (8, UPDATES)
    assert recipe.data.corpus == str(workplace / "corpus")
    [checkpoint] = complete_checkpoints(run)
    assert (checkpoint.next_batch, checkpoint.tokens) == (UPDATES // 4, UPDATES * 8 * 16)

    # What `tvq evaluate` prints is what the imported network says of the validation split.
    assert run_cli(["evaluate", "official", "--json"]) == ExitCode.OK
    figures = json.loads(capsys.readouterr().out)
    bound = bind(model, *network)
    nats, targets = 0.0, 0
    for batch in evaluation_batches(
        workplace / "corpus", "validation", sequence_length=64, batch_size=16, window="stream"
    ):
        logits = bound.logits(bound(jnp.array(batch.inputs), initial_cache(model, 16)).features)
        chosen = np.take_along_axis(
            np.asarray(jax.nn.log_softmax(logits)), batch.targets[..., None], axis=-1
        )[..., 0]
        nats -= chosen[batch.loss_mask].sum(dtype=np.float64)
        targets += int(batch.loss_mask.sum())
    assert math.isclose(figures["nats_per_token"], nats / targets, rel_tol=1e-5)

    assert run_cli(["sample", "official", "--tokens", "5", "--ignore-eos", "--json"]) == ExitCode.OK
    [sample] = json.loads(capsys.readouterr().out)["samples"]
    assert sample["tokens"] == 5

    assert "run official: exists already" in mistake(capsys, command())
    assert len(complete_checkpoints(run)) == 1


@pytest.mark.compiles
def test_an_import_that_was_cut_off_is_completed(workplace: Path, capsys):
    """Flags without an optimizer, pictures: the windows are documents."""
    set_tokenizer(workplace, kind=ImageTokenizer.kind)
    flags = {name: value for name, value in FILE.items() if name not in OPTIMIZER_FLAGS}
    (workplace / "flags.json").write_text(json.dumps(flags | {"dataset": "imagenet64"}))
    assert run_cli(command()) == ExitCode.OK
    assert "imported update 125,000 as run " in capsys.readouterr().out
    run = RunDirectory(workplace / "runs" / "official")
    first = complete_checkpoints(run)
    shutil.rmtree(run.path / "checkpoints" / f"{UPDATES:08d}")
    assert run_cli(command()) == ExitCode.OK
    assert [one.sums for one in complete_checkpoints(run)] == [one.sums for one in first]
    recipe = recipes.from_yaml(first[0].recipe, "stored")
    assert (recipe.data.window, recipe.optimizer.schedule) == ("document", "constant")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"dataset": "imagenet64"}, "its tokenizer is bytes, and imagenet64 needs image-64x64x3"),
        ({"sequence_len": None}, "flag sequence_len: must be a whole number from 1, got None"),
        ({"global_batch_size": 0}, "flag global_batch_size: must be a whole number from 1, got 0"),
        ({"update_len": 60}, "sequence_len / update_len updates of a batch, got 125000 and 64 /"),
        ({"update_len": 64 // 64, "sequence_len": 7}, "updates of a batch, got 125000 and 7 / 1"),
        ({"n_layer": 3}, "flag n_layer: must be the checkpoint's 1 pairs of layers, got 3"),
        ({"n_warmup_step": 200_000}, "flag n_max_step"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_leave_nothing(workplace: Path, capsys, flags, expected):
    (workplace / "flags.json").write_text(json.dumps(FILE | flags))
    assert expected in mistake(capsys, command())
    assert not (workplace / "runs").exists()


def test_what_cannot_be_imported_leaves_nothing(workplace: Path, capsys):
    assert "no such folder" in mistake(capsys, command(corpus="nowhere"))
    set_tokenizer(workplace, vocab_size=300)
    assert "(bytes) has 300 ids, the checkpoint 259;" in mistake(capsys, command())
    set_tokenizer(workplace, vocab_size=259)
    assert "run name '../x'" in mistake(capsys, command(run="../x"))
    good = (workplace / "checkpoint").read_bytes()
    (workplace / "checkpoint").write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")
    assert "must be a flax msgpack file" in mistake(capsys, command())
    (workplace / "checkpoint").write_bytes(good)
    (workplace / "flags.json").write_bytes(b"\xff{")
    assert "official flags: must be JSON" in mistake(capsys, command())
    (workplace / "flags.json").unlink()
    assert "--flags flags.json: cannot be read: No such file" in mistake(capsys, command())
    assert not (workplace / "runs").exists()
    assert not (workplace / "owned").exists()
