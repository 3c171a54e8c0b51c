"""Registering, promoting, serving, tracing and repeating a real training, on MLflow's SQLite."""

import dataclasses
import hashlib
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from jobs import recipe as recipes
from jobs.checkpoints.manifest import manifest_of, remove
from jobs.console import Console
from jobs.errors import ExitCode, UserError
from jobs.evaluation.evaluate import evaluate_run
from jobs.lineage.origins import lineage, lineage_command
from jobs.lineage.provenance import noted_starts, provenance
from jobs.lineage.reproduce import reproduce_command
from jobs.lineage.reproduction import open_points
from jobs.metric_names import EVAL_BITS
from jobs.registry import promote as promotions
from jobs.registry import register as registration
from jobs.registry.promote import Promotion, promote
from jobs.registry.promotion import Decision
from jobs.registry.register import Registered, register
from jobs.registry.registered_model import CHAMPION, RECORD, ModelFolder
from jobs.registry.scored_version import scored
from jobs.registry.text_model import WEIGHTS, TextModel
from jobs.runs.run_directory import RunDirectory
from jobs.tracking import registry as mlflow_registry
from jobs.tracking.store import embedded_store
from jobs.training.train import train
from model.sampling import Filters
from tests.jobs.registry.with_the_champion import served
from tests.micro import RECIPE
from tests.pipeline.corpora import write_corpus

pytestmark = [pytest.mark.tracking, pytest.mark.compiles]

EARLY, LATE = 8, 40
"""Updates with a checkpoint: the later one is better, by far more than chance."""
TEXT = "eta sonh rain\nthe rest is noise, é"
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with forty documents to validate on, and a run with all its checkpoints."""
    folder = tmp_path_factory.mktemp("registry")
    letters = random.Random(0)
    words = ["".join(letters.choices("etaoinshr", k=4)).encode() for _ in range(30)]

    def documents(count: int) -> list[list[bytes]]:
        return [[b" ".join(letters.choices(words, k=40)) + b"\n"] for _ in range(count)]

    write_corpus(
        folder / "corpus",
        train=[documents(20) for _ in range(2)],
        validation=[documents(40)],
        test=[documents(4)],
    )
    (folder / "micro.yaml").write_text(RECIPE, encoding="utf-8")
    train_run(folder, "first")
    return folder


def train_run(folder: Path, name: str, *overrides: str) -> RunDirectory:
    stated = (f"data.corpus={folder / 'corpus'}", "checkpoint.keep=9", "checkpoint.every=8")
    recipe = recipes.load(str(folder / "micro.yaml"), (*stated, *overrides))
    return train(recipe, root=folder / "runs", name=name, console=QUIET).run


@pytest.fixture(scope="module")
def run(workplace: Path) -> RunDirectory:
    return RunDirectory.existing(workplace / "runs", "first")


@pytest.fixture(scope="module")
def both(run: RunDirectory) -> list[Registered]:
    """Model `plays`: version 1 is the early checkpoint, version 2 the late one."""
    return [register(run, "plays", update=EARLY), register(run, "plays")]


@pytest.fixture(scope="module")
def uri(run: RunDirectory) -> str:
    return embedded_store(run.root).uri


def try_promote(run: RunDirectory, name: str, version: int, min_delta: float = 0.0) -> Promotion:
    return promote(run.root, name, version=version, min_delta=min_delta, console=QUIET)


def test_a_version_is_a_copy_that_mlflow_points_to(
    run: RunDirectory, both: list[Registered], uri: str
):
    for number, (registered, update) in enumerate(zip(both, (EARLY, LATE), strict=True), 1):
        folder = run.path.parent / "models" / "plays" / str(number)
        version = registered.version
        assert registered.location == str(folder)
        assert (version.version, version.update, registered.reused) == (number, update, False)
        there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert there == {*version.files, RECORD}
        assert {"MLmodel", f"artifacts/model/{WEIGHTS}"} <= there
        for name, sha256 in version.files.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256
        assert version.n_bytes == sum((folder / name).stat().st_size for name in version.files)
        found = mlflow_registry.versions(uri, "plays")[number - 1]
        record = run.record()
        assert record
        assert (found.version, found.source) == (number, str(folder))
        assert found.run_id == record.mlflow_run_id
        assert found.tags["tvq.run_key"] == record.run_key
        assert found.tags["tvq.update"] == str(update)
        sums = version.sums
        assert sums == {k: v for k, v in manifest_of(run, update).sums.items() if k in sums}
        assert any(".codebooks" in name for name in sums)
        for split, fingerprint in record.fingerprints.items():
            assert found.tags[f"tvq.fingerprint.{split}"] == fingerprint


def test_the_same_checkpoint_again_is_the_version_that_is_there(
    run: RunDirectory, both: list[Registered], uri: str
):
    again = register(run, "plays", update=EARLY)
    assert again.reused
    assert again.version == both[0].version
    assert len(mlflow_registry.versions(uri, "plays")) == 2


def test_the_better_one_becomes_champion_and_the_worse_one_does_not(
    run: RunDirectory, both: list[Registered], uri: str
):
    assert mlflow_registry.aliased(uri, "plays", CHAMPION) is None
    assert try_promote(run, "plays", 1)[:4] == ("promoted", "plays", 1, 1)
    early, late = (evaluate_run(run, "validation", update=u, console=QUIET) for u in (EARLY, LATE))
    gain = early.bits_per_byte - late.bits_per_byte
    assert gain > 0.1
    not_enough = try_promote(run, "plays", 2, min_delta=gain)
    assert not_enough[:4] == ("inconclusive", "plays", 2, 1)
    assert mlflow_registry.aliased(uri, "plays", CHAMPION) == 1
    found = try_promote(run, "plays", 2, min_delta=0.02)
    assert found[:4] == ("promoted", "plays", 2, 2)
    assert found.difference == pytest.approx(-gain)
    assert found.low is not None
    assert found.high is not None
    assert found.low < -gain < found.high < -0.02
    assert mlflow_registry.aliased(uri, "plays", CHAMPION) == 2
    assert try_promote(run, "plays", 1)[:4] == ("worse", "plays", 1, 2)
    assert mlflow_registry.aliased(uri, "plays", CHAMPION) == 2
    assert try_promote(run, "plays", 2).why == "is the champion already"
    tags = mlflow_registry.versions(uri, "plays")[0].tags
    assert tags["tvq.promotion"] == "worse"
    assert tags["tvq.compared_with_version"] == "2"


def test_the_test_split_and_odd_arguments_are_refused(run: RunDirectory, both: list[Registered]):
    with pytest.raises(UserError, match="test split never decides"):
        promote(run.root, "plays", metric="test/bits_per_byte", console=QUIET)
    with pytest.raises(UserError, match="expected 0 or more"):
        try_promote(run, "plays", 1, min_delta=-1)
    with pytest.raises(UserError, match="has no version 7"):
        try_promote(run, "plays", 7)
    with pytest.raises(UserError, match="tvq register RUN --as nobody"):
        promote(run.root, "nobody", console=QUIET)
    with pytest.raises(UserError, match="model name 'a/b'"):
        register(run, "a/b")


def test_another_validation_split_is_refused(
    run: RunDirectory, both: list[Registered], monkeypatch: pytest.MonkeyPatch
):
    try_promote(run, "plays", 1)
    folder = ModelFolder(run.root, "plays")
    champion = mlflow_registry.aliased(embedded_store(run.root).uri, "plays", CHAMPION)
    assert champion
    candidate = folder.version(3 - champion)
    other = dataclasses.replace(candidate, fingerprints={"validation": "0" * 64})
    decision = promotions._compared(folder, other, folder.version(champion), EVAL_BITS, 0, QUIET)
    assert decision.outcome == "refused"
    assert "different validation splits" in decision.why


@pytest.mark.slow
def test_a_checkpoint_that_is_gone_is_scored_by_its_registered_weights(
    workplace: Path, both: list[Registered]
):
    passing = train_run(workplace, "passing", "training.steps=8")
    registered = register(passing, "passing")
    expected = evaluate_run(passing, "validation", console=QUIET)
    remove(passing, EARLY)
    found = scored(ModelFolder(passing.root, "passing"), registered.version, QUIET)
    np.testing.assert_allclose(found.nats, expected.blocks.nats, rtol=1e-12)
    assert found.fingerprint == expected.fingerprint
    shutil.rmtree(passing.path)
    with pytest.raises(UserError, match=r"is not in .* any more"):
        lineage(passing.root, "passing")


def killed(*_: object) -> int:
    raise KeyboardInterrupt


def test_killed_registrations_leave_nothing_in_the_way(
    run: RunDirectory, uri: str, monkeypatch: pytest.MonkeyPatch
):
    folder = ModelFolder(run.root, "killed")
    folder.store.write("1/artifacts/half", b"half a copy")
    assert folder.abandoned() == [1]
    with monkeypatch.context() as patch:
        patch.setattr(registration, "announce", killed)
        with pytest.raises(KeyboardInterrupt):
            register(run, "killed", update=EARLY)
    assert mlflow_registry.versions(uri, "killed") == []
    # Complete but unknown to MLflow: the next command, of whatever checkpoint, tells it.
    late = register(run, "killed")
    assert late.version.version == 2
    found = mlflow_registry.versions(uri, "killed")
    assert [(v.version, v.tags["tvq.update"]) for v in found] == [(1, "8"), (2, "40")]
    assert not folder.store.exists("1/artifacts/half")
    # Of a version deleted in MLflow the number is used up, there and in our folder.
    mlflow_registry.delete_version(uri, "killed", 2)
    folder.store.remove_tree("2")
    again = register(run, "killed")
    assert [one.version for one in mlflow_registry.versions(uri, "killed")] == [
        1,
        again.version.version,
    ]
    assert again.version.version > 2
    assert again.location.endswith(f"/{again.version.version}")
    assert [one.version for one in folder.versions()] == [1, again.version.version]
    assert folder.abandoned() == []


def test_one_process_registers_or_promotes_at_a_time(run: RunDirectory, both: list[Registered]):
    with (
        ModelFolder(run.root, "plays").lease(),
        pytest.raises(UserError, match=r"model plays: process .* wait for it") as busy,
    ):
        register(run, "plays", update=EARLY)
    assert busy.value.code is ExitCode.BUSY


def test_a_champion_who_changed_meanwhile_is_not_replaced(
    run: RunDirectory, both: list[Registered], uri: str, monkeypatch: pytest.MonkeyPatch
):
    mlflow_registry.move_alias(uri, "plays", CHAMPION, 1)

    def compare_while_another_promotes(*_: object) -> Decision:
        mlflow_registry.move_alias(uri, "plays", CHAMPION, theirs)
        return Decision("promoted", "better than version 1")

    theirs = mlflow_registry.create_version(uri, "plays", both[0].location, None, {})
    monkeypatch.setattr(promotions, "_compared", compare_while_another_promotes)
    found = try_promote(run, "plays", 2)
    assert found.outcome == "refused"
    assert f"became version {theirs} meanwhile" in found.why
    assert mlflow_registry.aliased(uri, "plays", CHAMPION) == theirs
    mlflow_registry.delete_version(uri, "plays", theirs)


def test_a_fresh_process_scores_and_writes_with_the_champion(
    run: RunDirectory, both: list[Registered], uri: str, tmp_path: Path
):
    import jax

    from model.transformer import bind, initial_cache
    from pipeline.tokenizers import EOS, TOKEN_OFFSET

    mlflow_registry.move_alias(uri, "plays", CHAMPION, 2)
    ended = served(uri, [TEXT, "", "eta"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    model = TextModel.load(Path(both[1].location, "artifacts", "model"))

    # Independent of pieces and caches: the whole text in one call, and log-softmax.
    trained, text = model.trained, TEXT.encode()
    ids = np.frombuffer(text, np.uint8).astype(np.int32) + TOKEN_OFFSET
    network = bind(trained.recipe.model, trained.params, trained.codebooks)
    inputs = jax.numpy.asarray(np.concatenate([[EOS], ids[:-1]])[None], np.int32)
    features = network(inputs, initial_cache(trained.recipe.model, 1, len(ids))).features
    log_p = jax.nn.log_softmax(network.logits(features)[0])
    nats = -float(log_p[np.arange(len(ids)), ids].sum())
    assert found["nats"][0] == pytest.approx(nats, rel=1e-5)
    assert found["tokens"] == [len(ids), 0, 3]
    assert found["bits_per_byte"][0] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)
    assert math.isnan(found["bits_per_byte"][1])

    filters = Filters(1.0, 0, 0.95, 0.0)
    expected = model.generate([TEXT.encode(), b"", b"eta"], 20, 5, filters)
    assert found["text"] == [text.decode(errors="replace") for text in expected]


def test_a_long_text_is_read_with_all_its_past(both: list[Registered]):
    """Pieces with the cache carried give what one call over the whole text gives."""
    from jobs.registry import text_model

    model = TextModel.load(Path(both[1].location, "artifacts", "model"))
    text = (TEXT * 9).encode()
    assert len(text) > 8 * model.trained.recipe.training.update_length
    whole = dataclasses.replace(
        model.trained.recipe,
        training=dataclasses.replace(model.trained.recipe.training, update_length=320),
    )
    at_once = TextModel(model.trained._replace(recipe=whole), model.tokenizer)
    text_model._scorer.cache_clear()
    assert model.score(text).nats == pytest.approx(at_once.score(text).nats, rel=1e-5)
    later = model.score(text).nats - model.score(text[: len(text) // 2]).nats
    assert later != pytest.approx(model.score(text[len(text) // 2 :]).nats, rel=1e-3)


def test_a_byte_that_flipped_in_the_weights_is_named(both: list[Registered], tmp_path: Path):
    shutil.copytree(Path(both[1].location, "artifacts", "model"), tmp_path / "model")
    file = tmp_path / "model" / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="does not have the sum"):
        TextModel.load(tmp_path / "model")


def test_lineage_names_what_a_model_was_made_of(
    run: RunDirectory, both: list[Registered], uri: str, capsys: pytest.CaptureFixture[str]
):
    mlflow_registry.move_alias(uri, "plays", CHAMPION, 1)
    found = lineage(run.root, "plays@champion")
    assert found.model
    assert found.model["version"] == 1
    assert found.run["update"] == EARLY
    [start] = found.starts
    assert [start] == noted_starts(run)
    assert start.versions == provenance().versions
    [corpus] = found.corpora
    assert corpus["splits"]["train"]["shards"] == [
        f"shards/test/train-0000{index}.arrow" for index in (0, 1)
    ]
    assert corpus["tokenizer"]["kind"] == "bytes"
    assert found.recipe["model.n_layers"] == 2
    assert found.problems == []
    assert lineage(run.root, "first").model is None
    assert lineage(run.root, "models:/plays/2").run["update"] == LATE
    lineage_command(run.root, "plays/2", console=Console(), as_json=False)
    said = capsys.readouterr().out
    commit = start.commit or "none: an installed tvq"
    for what in ("plays/2", commit, "model.n_layers=2", "train-00001.arrow", "bytes, 259 ids"):
        assert what in said
    with pytest.raises(UserError, match="neither a run nor a registered model"):
        lineage(run.root, "nobody")
    with pytest.raises(UserError, match="has no alias 'best'"):
        lineage(run.root, "plays@best")


def test_a_reproduction_is_the_same_to_the_last_bit_and_says_so(
    run: RunDirectory, uri: str, capsys: pytest.CaptureFixture[str]
):
    reproduce_command(run.root, "first", new_name="again", console=Console())
    printed = capsys.readouterr().out
    again = RunDirectory.existing(run.root, "again")
    assert manifest_of(again).sums == manifest_of(run).sums
    assert f"the same to the last bit after update {LATE}" in printed
    [parent] = lineage(run.root, "again").parents
    assert parent["name"] == "first"
    record = run.record()
    assert record
    assert parent["run_key"] == record.run_key

    # As a sweep or a flow marks its trainings.
    from mlflow import MlflowClient

    client, known = MlflowClient(uri), again.record()
    assert known
    assert known.mlflow_run_id
    whole = client.create_run("0", run_name="a sweep").info.run_id
    client.set_tag(known.mlflow_run_id, "mlflow.parentRunId", whole)
    lineage_command(run.root, "again", console=Console(), as_json=False)
    printed = capsys.readouterr().out
    assert "it reproduces first, " in printed
    assert f"it is part of a sweep, MLflow run {whole}" in printed


def test_what_cannot_be_reproduced_is_said_or_refused(workplace: Path, run: RunDirectory):
    with pytest.raises(UserError, match="another training") as refused:
        reproduce_command(run.root, "first", ("training.seed=3",), console=QUIET)
    assert "training.seed: 3 (0)" in str(refused.value)
    with pytest.raises(UserError, match="is the run itself"):
        reproduce_command(run.root, "first", new_name="first", console=QUIET)
    other = workplace / "other corpus"
    write_corpus(other, train=[[[b"something else"]]], validation=[[[b"x y"]]], test=[[[b"z"]]])
    with pytest.raises(UserError, match="cannot be reproduced, it was begun"):
        reproduce_command(run.root, "first", (f"data.corpus={other}",), console=QUIET)
    assert not (run.path.parent / "first-again").exists()

    stored = recipes.from_yaml(run.recipe_text(), "stored")
    # Of this checkout only; somebody may be working in it.
    points = open_points(run, stored, stored)
    assert all("changed since" in point or "commit" in point for point in points)
    workers = dataclasses.replace(stored.cluster, workers=2)
    points = open_points(run, dataclasses.replace(stored, cluster=workers), stored)
    assert any("cluster.workers: 2 (0)" in point for point in points)
