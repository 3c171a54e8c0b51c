"""Registered models in a bucket, and through a server that does not see our folders."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import recipe as recipes
from jobs import ui
from jobs.console import Console
from jobs.registry.promote import promote
from jobs.registry.register import register
from jobs.registry.registered_model import CHAMPION
from jobs.registry.text_model import TextModel
from jobs.runs.run_directory import RunDirectory
from jobs.tracking import registry as mlflow_registry
from jobs.tracking.store import embedded_store
from jobs.tracking.tracker import Tracker
from jobs.training.train import train
from model.sampling import Filters
from pipeline.storage import open_store
from tests.micro import write_micro
from tests.services import free_port

pytestmark = [pytest.mark.tracking, pytest.mark.slow]

SCORE = """
import json, mlflow, pandas as pd
model = mlflow.pyfunc.load_model("models:/m@champion")
texts = pd.DataFrame({"text": ["eta sonh"]})
print(json.dumps([
    model.predict(texts, params={"tokens": 9, "seed": 1})["text"][0],
    model.predict(texts, params={"task": "score"})["nats"][0],
]))
"""


def trained(workplace: Path, root: str | Path, uri: str) -> RunDirectory:
    corpus, file = write_micro(workplace)
    overrides = (f"data.corpus={corpus}", f"tracking.uri={uri}", "training.steps=8")
    recipe = recipes.load(str(file), overrides)
    return train(recipe, root=root, name="run", console=Console(quiet=True)).run


def from_a_fresh_process(uri: str, cwd: Path) -> list:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", SCORE],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def here(folder: Path) -> list:
    model = TextModel.load(folder)
    [text] = model.generate([b"eta sonh"], 9, 1, Filters(0.8, 0, 0.95, 0.0))
    return [text.decode(errors="replace"), pytest.approx(model.score(b"eta sonh").nats, rel=1e-6)]


def test_a_model_in_a_bucket_is_registered_promoted_and_loaded(bucket: str, tmp_path: Path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = trained(tmp_path, f"{bucket}/runs", uri)
    registered = register(run, "m")
    assert registered.location == f"{bucket}/runs/models/m/1"
    assert register(run, "m").reused
    assert promote(run.root, "m", console=Console(quiet=True)).outcome == "promoted"
    assert mlflow_registry.versions(uri, "m")[0].source == registered.location
    copy = tmp_path / "copy"
    copy.mkdir()
    stored = open_store(f"{registered.location}/artifacts/model")
    for entry in list(stored.list()):
        (copy / entry.name).write_bytes(stored.read(entry.name))
    assert from_a_fresh_process(uri, tmp_path) == here(copy)


def test_a_server_is_given_the_files_that_it_cannot_see(tmp_path: Path):
    store = embedded_store(tmp_path / "server")
    first = Tracker.start(store.uri, "e", "first", "k", artifact_location=store.artifact_location)
    assert first.finish("FINISHED")  # the database exists
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    with ui.serve(store, tmp_path / "log", port):
        run = trained(tmp_path, tmp_path / "runs", uri)
        registered = register(run, "m")
        [version] = mlflow_registry.versions(uri, "m")
        assert version.source.startswith("mlflow-artifacts:/")
        assert promote(run.root, "m", console=Console(quiet=True)).outcome == "promoted"
        assert mlflow_registry.aliased(uri, "m", CHAMPION) == 1
        expected = here(Path(registered.location, "artifacts", "model"))
        assert from_a_fresh_process(uri, tmp_path) == expected
