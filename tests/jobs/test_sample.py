"""`tvq sample` on a model that never trained."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import sample
from jobs.console import Console
from jobs.recipe import Recipe
from jobs.run_directory import RunDirectory
from jobs.trained_model import TrainedModel
from model.config import ModelConfig
from model.training import initial_state
from tests.pipeline.corpora import write_corpus


def test_a_prompt_that_is_not_utf_8_is_read_as_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write_corpus(tmp_path / "corpus", train=[[[b"text"]]])
    recipe = Recipe()
    recipe = replace(
        recipe,
        model=ModelConfig(n_layers=1, d_model=8, d_key=4, d_value=8, n_codes=4, block_length=4),
        data=replace(recipe.data, corpus=str(tmp_path / "corpus")),
        optimizer=replace(recipe.optimizer, schedule_steps=1000),
    )
    state = initial_state(recipe.model, recipe.optimizer, 0)
    trained = TrainedModel(recipe, 0, {}, state.params, state.codebooks)
    monkeypatch.setattr(sample, "load_trained_model", lambda run: trained)
    read = []
    monkeypatch.setattr(
        sample,
        "model_ids",
        lambda tokenizer, text: read.append(text) or list(tokenizer.encode(text)),
    )
    monkeypatch.setattr(RunDirectory, "existing", RunDirectory.at)
    sample.sample_command(
        tmp_path,
        "run",
        prompt=os.fsdecode(b"caf\xe9"),
        tokens=2,
        temperature=1.0,
        top_p=1.0,
        seed=0,
        console=Console(),
        as_json=True,
    )
    assert read == [b"caf\xe9"]
    assert json.loads(capsys.readouterr().out)["prompt"] == "caf\ufffd"
