"""Runs in a real MLflow store (SQLite): which one a training is, and what it holds."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.errors import UserError
from jobs.lineage.code_diff import CodeDiff
from jobs.lineage.provenance import Provenance
from jobs.tracking import reading
from jobs.tracking.adding import add_artifact, add_to_run
from jobs.tracking.checkpoint_models import mark_deleted_in, models_of_run
from jobs.tracking.reading import history
from jobs.tracking.store import Store, embedded_store
from jobs.tracking.tracker import Tracker
from tests.jobs.tracking.tracked_training import (
    LOSS,
    REPOSITORY,
    artifact,
    client,
    complete,
    experiment_of,
    loss,
    run_id_of,
    statuses,
    write,
)

pytestmark = pytest.mark.tracking


# Which run it is.


def test_one_training_is_one_run_whatever_restarts(store: Store, start):
    first = start()
    run_id = run_id_of(first)
    assert first.finish("FAILED")
    by_key, by_id, with_lost_id = start(), start(run_id), start("0" * 32)
    assert {run_id_of(t) for t in (by_key, by_id, with_lost_id)} == {run_id}
    assert statuses(store, experiment_of(store, run_id)) == ["RUNNING"]
    for tracker in (by_key, by_id, with_lost_id):
        tracker.finish("FINISHED")
    other = start(key="another training")
    assert run_id_of(other) != run_id
    other.finish("KILLED")
    assert statuses(store, experiment_of(store, run_id)) == ["FINISHED", "KILLED"]


def test_a_run_or_experiment_deleted_in_the_ui_comes_back_with_its_history(
    store: Store, start, tmp_path: Path
):
    write(tmp_path / "m", range(1, 11))
    tracker = start()
    tracker.attach_spool(tmp_path / "m", lambda points: None)
    run_id = run_id_of(tracker)
    assert tracker.finish("KILLED")
    client(store).delete_run(run_id)
    again = start()
    assert run_id_of(again) == run_id
    again.finish("FINISHED")
    assert client(store).get_run(run_id).info.lifecycle_stage == "active"
    experiment = experiment_of(store, run_id)
    client(store).delete_experiment(experiment)
    again = start()
    assert run_id_of(again) == run_id
    again.finish("FINISHED")
    assert client(store).get_experiment(experiment).lifecycle_stage == "active"
    assert history(store.uri, run_id, LOSS) == complete(10)


def test_two_processes_make_one_new_store_together_in_silence(tmp_path: Path):
    root = tmp_path / "new root"
    program = f"""
from pathlib import Path
from jobs.tracking.store import embedded_store
from jobs.tracking.tracker import Tracker
store = embedded_store(Path({str(root)!r}))
tracker = Tracker.start(store.uri, "e", "r", "key", artifact_location=store.artifact_location)
assert tracker.finish("FINISHED")
from mlflow.telemetry.utils import is_telemetry_disabled
assert is_telemetry_disabled()
"""
    # MLflow turns its reporting off by itself in CI and under pytest: not to pass for our doing.
    hidden = ("CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST", "PYTEST_VERSION", "DO_NOT_TRACK")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["PYTHONPATH"] = str(REPOSITORY)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    # No chatter of MLflow's (tables created, migrations), no usage reporting.
    assert said == ["", ""]
    made = embedded_store(root)
    experiment = client(made).get_experiment_by_name("e")
    assert experiment
    assert statuses(made, experiment.experiment_id) == ["FINISHED"]


# What a run holds.


def test_the_recipe_is_stored_flat_and_whole_and_again_on_resume(store: Store, start):
    recipe = {
        "model": {"d_model": 64, "dropout": None, "tied": True},
        "optimizer.learning_rate": 1e-4,
        "data": {"corpus": "ä" * 10_000, "mixture": [1, 2]},
        **{f"many.p{i}": i for i in range(300)},
    }
    tracker = start()
    tracker.log_recipe(recipe, "model: ...\n", "d_model: 64 (32)\n")
    run_id = run_id_of(tracker)
    assert tracker.finish("FINISHED")
    stored = client(store).get_run(run_id).data.params
    assert stored["model.d_model"] == "64"
    assert stored["model.dropout"] == "null"
    assert stored["model.tied"] == "true"
    assert stored["optimizer.learning_rate"] == "0.0001"
    assert stored["data.mixture"] == "[1, 2]"
    assert stored["data.corpus"] == "ä" * 497 + "..."
    assert stored["many.p299"] == "299"
    assert artifact(store, run_id, "recipe/recipe.yaml") == b"model: ...\n"
    assert artifact(store, run_id, "recipe/difference_from_defaults.yaml") == b"d_model: 64 (32)\n"
    assert b"\\u00e4" * 10_000 in artifact(store, run_id, "recipe/long_parameters.json")

    resumed = start()
    resumed.log_recipe({**recipe, "many.p1": 5, "new": 1}, "model: other\n", "")
    assert resumed.finish("FINISHED")
    data = client(store).get_run(run_id).data
    assert data.params["many.p1"] == "1"
    assert data.params["new"] == "1"
    assert data.tags["tvq.changed_on_resume"] == "many.p1=5 (was 1)"
    assert artifact(store, run_id, "recipe/recipe.yaml") == b"model: other\n"


def test_what_it_ran_on_are_tags_and_the_patch_of_each_start_is_kept(store: Store, start):
    versions, hardware = {"jax": "0.10.2"}, {"cores": "2"}
    first = Provenance("a" * 40, True, "3.11.9", versions, hardware)
    tracker = start()
    tracker.log_provenance(first, CodeDiff(b"diff \xff\n", None))
    run_id = run_id_of(tracker)
    assert tracker.finish("KILLED")
    tags = client(store).get_run(run_id).data.tags
    assert tags["mlflow.source.git.commit"] == "a" * 40
    assert tags["tvq.git.dirty"] == "true"
    assert tags["tvq.version.jax"] == "0.10.2"
    assert tags["tvq.hardware.cores"] == "2"
    patch = tags["tvq.git.diff"]
    assert artifact(store, run_id, patch) == b"diff \xff\n"
    again = start()
    again.log_provenance(
        dataclasses.replace(first, commit="b" * 40), CodeDiff(None, "line 7 of it looks like x")
    )
    assert again.finish("FINISHED")
    tags = client(store).get_run(run_id).data.tags
    assert tags["mlflow.source.git.commit"] == "b" * 40
    assert tags["tvq.git.diff"] == "left out: line 7 of it looks like x"
    assert artifact(store, run_id, patch) == b"diff \xff\n"


def test_the_corpus_is_one_dataset_input_however_often_it_is_logged(store: Store, start):
    fingerprint, run_id = "ab12" * 16, ""
    for _ in range(2):
        tracker = start()
        for _ in range(2):
            tracker.log_corpus(
                "stdlib", fingerprint, "/a path/corpus", {"tokens": 12}, {"tokens": "integer"}
            )
        run_id = run_id_of(tracker)
        assert tracker.finish("FINISHED")
    inputs = client(store).get_run(run_id).inputs
    assert inputs
    [found] = inputs.dataset_inputs
    assert found.dataset.name == "stdlib"
    assert found.dataset.digest == fingerprint[:36]
    assert fingerprint in str(found.dataset.profile)
    assert "/a path/corpus" in found.dataset.source
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "training")]


def test_a_checkpoint_is_a_model_by_reference_and_its_metrics_stay_single(
    store: Store, start, tmp_path: Path
):
    tracker = start()
    tracker.attach_spool(tmp_path / "m", lambda points: None)
    write(tmp_path / "m", range(1, 21))
    # Queued at once, though the spool's points of update 20 may not have been sent yet.
    metrics = {"eval/bits_per_byte": loss(20) * 2, "eval/extra": math.nan}
    for _ in range(2):
        tracker.log_checkpoint(20, "file:///a%20path/20", metrics)
    run_id = run_id_of(tracker)
    assert tracker.finish("FINISHED")
    again = start()
    again.log_checkpoint(20, "file:///a%20path/20", metrics)
    assert again.finish("FINISHED")

    run = client(store).get_run(run_id)
    assert run.outputs
    [output] = run.outputs.model_outputs
    [model] = client(store).search_logged_models([run.info.experiment_id])
    assert (output.model_id, output.step) == (model.model_id, 20)
    assert model.source_run_id == run_id
    assert model.status == "READY"
    assert model.tags["tvq.checkpoint_uri"] == "file:///a%20path/20"
    assert {(m.key, m.step) for m in model.metrics or []} == {
        ("eval/bits_per_byte", 20),
        ("eval/extra", 20),
    }
    evaluations = [(10, loss(10) * 2), (20, loss(20) * 2)]
    assert history(store.uri, run_id, "eval/bits_per_byte") == evaluations
    assert len(history(store.uri, run_id, "eval/extra")) == 1


def test_a_deleted_checkpoint_is_marked_and_an_evaluation_is_linked_to_its_own(store: Store, start):
    tracker = start()
    corpora = {"training": ("c-train", "a" * 64), "evaluation": ("c-validation", "b" * 64)}
    for context, (name, fingerprint) in corpora.items():
        tracker.log_corpus(name, fingerprint, "/c", {}, {"tokens": "integer"}, context)
    for update in (10, 20, 30):
        tracker.log_checkpoint(update, f"file:///{update}", {"eval/bits_per_byte": 1.0})
    tracker.log_present({20, 30})
    run_id = run_id_of(tracker)
    assert tracker.finish("FINISHED")

    def models():
        return models_of_run(client(store), experiment_of(store, run_id), run_id)

    def deleted() -> set[int]:
        return {update for update, one in models().items() if "tvq.deleted" in one.tags}

    assert deleted() == {10}
    assert [one.key for one in models()[10].metrics or []] == ["eval/bits_per_byte"]
    mark_deleted_in(store.uri, run_id, {10, 30})
    assert deleted() == {20}
    values = {"test/bits_per_byte": 2.0, "eval/bits_per_byte": 9.0}
    for _ in range(2):
        add_to_run(store.uri, run_id, values, 30, ("c-test", "c" * 64))
    found = models()[30]
    values = {one.key: (one.value, one.step) for one in found.metrics or []}
    assert values == {"eval/bits_per_byte": (1.0, 30), "test/bits_per_byte": (2.0, 30)}
    measured_on = {one.key: (one.dataset_name, one.dataset_digest) for one in found.metrics or []}
    assert measured_on == {
        "eval/bits_per_byte": ("c-validation", "b" * 36),
        "test/bits_per_byte": ("c-test", "c" * 36),
    }
    assert found.tags["tvq.corpus.training"] == f"c-train {'a' * 36}"
    assert found.tags["tvq.corpus.evaluation"] == f"c-validation {'b' * 36}"
    assert "test/bits_per_byte" not in {one.key for one in models()[20].metrics or []}
    assert history(store.uri, run_id, "test/bits_per_byte") == [(30, 2.0)]
    add_artifact(store.uri, run_id, "plots/x.png", b"picture")
    assert artifact(store, run_id, "plots/x.png") == b"picture"


def test_texts_of_the_driver_and_metrics_added_after_the_end(store: Store, start):
    tracker = start()
    tracker.log_text("samples/100.txt", "Once upon a tïme")
    run_id = run_id_of(tracker)
    assert tracker.finish("FINISHED")
    for value, step in ((2.0, 100), (2.5, 50), (2.0, 100)):
        add_to_run(store.uri, run_id, {"test/bits_per_byte": value}, step)
    assert history(store.uri, run_id, "test/bits_per_byte") == [(50, 2.5), (100, 2.0)]
    assert artifact(store, run_id, "samples/100.txt").decode() == "Once upon a tïme"


def test_files_of_a_folder_are_stored_once_whatever_restarts(store: Store, start):
    files = {"1.txt": b"first", "2.txt": b"second", "3.txt": b"third"}
    asked: list[str] = []

    def read(name: str) -> bytes:
        asked.append(name)
        return files[name]

    tracker = start()
    tracker.log_missing("samples", [], read)
    tracker.log_missing("samples", ["1.txt"], read)
    tracker.log_missing("samples", ["1.txt", "2.txt"], read)
    run_id = run_id_of(tracker)
    assert tracker.finish("KILLED")
    again = start()
    again.log_missing("samples", list(files), read)
    assert again.finish("FINISHED")
    assert asked == list(files)
    held = client(store).list_artifacts(run_id, "samples")
    assert [each.path for each in held] == [f"samples/{name}" for name in files]
    assert artifact(store, run_id, "samples/3.txt") == b"third"


def test_a_file_that_is_gone_when_it_is_sent_holds_up_nothing(store: Store, start, tmp_path: Path):
    (tmp_path / "2.txt").write_text("second")
    tracker = start()
    tracker.log_missing("samples", ["1.txt", "2.txt"], lambda name: (tmp_path / name).read_bytes())
    tracker.log_text("later.txt", "said after it")
    run_id = run_id_of(tracker)
    assert tracker.finish("FINISHED")
    assert artifact(store, run_id, "samples/2.txt") == b"second"
    assert artifact(store, run_id, "later.txt") == b"said after it"


# Reading, and what messages may not hold.


def test_reading_what_is_not_there_is_a_user_error(store: Store, tmp_path: Path):
    with pytest.raises(UserError, match="no MLflow store there"):
        history(embedded_store(tmp_path).uri, "0" * 32, LOSS)
    assert not (tmp_path / "mlflow.db").exists()
    with pytest.raises(UserError, match="not found"):
        reading.run(store.uri, "0" * 32)


def test_a_server_that_is_down_is_named_without_its_password(said):
    uri = "http://user:secret@127.0.0.1:9/x"
    tracker = Tracker.start(uri, "e", "r", "key", say=said.append)
    assert tracker.wait_for_run(timeout_s=0.1) is None
    assert not tracker.finish("FINISHED", limit_s=0.5)
    with pytest.raises(UserError) as error:
        history(uri, "0" * 32, LOSS)
    text = "\n".join([*said, str(error.value)])
    assert "://***@127.0.0.1:9" in text
    assert "secret" not in text


def test_a_root_that_sqlite_urls_cannot_name_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="choose another root"):
        embedded_store(tmp_path / "what?")


def test_importing_the_module_does_not_import_mlflow():
    program = (
        "import sys, jobs.tracking.tracker, jobs.tracking.reading; print('mlflow' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "False\n"
