"""`tvq sample` on a model that never trained."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jobs.console import Console
from jobs.errors import UserError
from jobs.evaluation import sample
from jobs.evaluation.sample import Sample
from jobs.evaluation.trained_model import TrainedModel
from jobs.recipe import Recipe
from jobs.runs.run_directory import RunDirectory
from model import sampling
from model.config import EOS_ID, N_SPECIAL, ModelConfig
from model.training import initial_state
from model.transformer import bind, initial_cache
from tests.pipeline.corpora import write_corpus, write_pictures

MODEL = ModelConfig(n_layers=1, d_model=8, d_key=4, d_value=8, n_codes=4, block_length=4)
ASCII = np.zeros(MODEL.vocab_size, bool)
ASCII[[EOS_ID, *range(N_SPECIAL + 32, N_SPECIAL + 127)]] = True

Command = Callable[..., list[Sample]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """Writes ASCII, so that its text tells its tokens, and ends now and then."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, train=[[[b"text"]]])
    recipe = Recipe()
    recipe = replace(
        recipe,
        model=MODEL,
        data=replace(recipe.data, corpus=str(folder)),
        optimizer=replace(recipe.optimizer, schedule_steps=1000),
    )
    state = initial_state(recipe.model, recipe.optimizer, 0)
    bias = jnp.where(ASCII, 0.0, -100.0).at[EOS_ID].set(2.0)
    params = {**state.params, "output": {**state.params["output"], "bias": bias}}
    return TrainedModel(recipe, 0, {}, params, state.codebooks)


@pytest.fixture
def command(tmp_path: Path, trained: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr(sample, "load_trained_model", lambda run: trained)
    monkeypatch.setattr(RunDirectory, "existing", RunDirectory.at)

    def run(*, quiet: bool = False, **options) -> list[Sample]:
        options = {"tokens": 12, "temperature": 1.0, "top_p": 1.0, "seed": 0, **options}
        return sample.sample_command(tmp_path, "run", console=Console(quiet=quiet), **options)

    return run


def test_a_prompt_that_is_not_utf_8_is_read_as_typed(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    read = []
    monkeypatch.setattr(
        sample,
        "model_ids",
        lambda tokenizer, text: read.append(text) or list(tokenizer.encode(text)),
    )
    command(prompts=[os.fsdecode(b"caf\xe9")], as_json=True)
    assert read == [b"caf\xe9"]
    assert json.loads(capsys.readouterr().out)["samples"][0]["prompt"] == "caf\ufffd"


def test_prompts_of_any_length_are_gone_on_from(command: Command, trained: TrainedModel):
    """At temperature 0 each token is the likeliest that the network gives after those before."""
    prompts = ["ab", "", "something longer", "cd"]
    drawn = command(prompts=prompts, temperature=0.0, ignore_eos=True)
    assert [one.prompt for one in drawn] == prompts
    network = bind(MODEL, trained.params, trained.codebooks)
    cache = initial_cache(MODEL, 1)
    logits_of = jax.jit(lambda ids: network.logits(network(ids, cache).features))
    for prompt, text, tokens, ended in drawn:
        assert (len(text), tokens, ended) == (12, 12, False)
        whole = np.frombuffer((prompt + text).encode(), np.uint8).astype(np.int32) + N_SPECIAL
        padded = np.full((1, 32), N_SPECIAL, np.int32)
        padded[0, : len(whole) + 1] = [EOS_ID, *whole]
        logits = np.array(logits_of(padded))[0, len(prompt) : len(whole)]
        logits[:, EOS_ID] = -np.inf
        np.testing.assert_array_equal(whole[len(prompt) :], logits.argmax(-1))


def test_a_sample_does_not_depend_on_those_beside_it(command: Command):
    """Their number decides which are drawn in one batch, not what is drawn."""
    three = command(prompts=["ab", "cdefg", "xy"])
    other = command(prompts=["ab", "cd", "xy"])
    assert (other[0], other[2]) == (three[0], three[2])
    many = command(prompts=["ab"], samples=6)
    assert many[0] == three[0]
    assert len({one.text for one in many}) == 6
    assert command(prompts=["ab"], samples=6) == many
    assert command(prompts=["ab"], samples=6, seed=1) != many


def test_a_prompt_is_read_once_for_all_its_samples(
    command: Command, monkeypatch: pytest.MonkeyPatch
):
    """What is read once goes on as if every row had been read by itself."""
    read, prefill = [], sampling.prefill

    def spy(model, params, codebooks, prompt, capacity):
        read.append(prompt.shape)
        return prefill(model, params, codebooks, prompt, capacity)

    monkeypatch.setattr(sampling, "prefill", spy)
    typed = ["zz", "ab", "ab"]
    drawn = command(prompts=typed, samples=3)
    assert read == [(2, 3)]
    assert len({one.text for one in drawn}) == 9
    for row in (1, 5, 6):
        before = ["some other text"] * row
        assert command(prompts=[*before, typed[row // 3]])[row] == drawn[row]


def test_a_text_ends_at_eos(command: Command, capsys: pytest.CaptureFixture[str]):
    drawn = command(prompts=["ab"], samples=6, as_json=True)
    assert {one.ended for one in drawn} == {True, False}
    for one in drawn:
        assert len(one.text) == one.tokens
        assert one.ended == (one.tokens < 12)
    printed = json.loads(capsys.readouterr().out)
    assert printed == {
        "run": "run",
        "update": 0,
        "seed": 0,
        "samples": [one._asdict() for one in drawn],
    }


def test_what_is_printed(command: Command, capsys: pytest.CaptureFixture[str]):
    [one] = command(prompts=["ab"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"run at update 0: {one.tokens} tokens in ")
    assert lines[0].endswith("with compilation" + ", ended by itself" * one.ended)
    assert lines[1:] == ["ab" + one.text]

    drawn = command(prompts=["ab"], samples=6)
    lines = capsys.readouterr().out.splitlines()
    total = sum(one.tokens for one in drawn)
    assert lines[0].startswith(f"run at update 0: 6 samples, {total} tokens in ")
    expected = []
    for number, one in enumerate(drawn, start=1):
        ended = ", ended by itself" if one.ended else ""
        expected += ["", f"== sample {number} of 6: {one.tokens} tokens{ended}", "ab" + one.text]
    assert lines[1:] == expected

    command(prompts=["ab"], samples=6, quiet=True)
    assert capsys.readouterr().out.splitlines() == ["ab" + one.text for one in drawn]


def test_prompts_of_a_file(command: Command, tmp_path: Path):
    """One a line, whatever ends the lines; those of the command line come first."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"ab\r\n\ncaf\xe9\nlast")
    drawn = command(prompts=["ab"], prompts_file=file, samples=2)
    typed = ["ab", "ab", "", "caf\ufffd", "last"]
    assert [one.prompt for one in drawn] == [prompt for prompt in typed for _ in range(2)]


def test_without_a_prompt_a_document_begins(command: Command):
    drawn = command()
    assert drawn == command(prompts=[""])
    assert [one.prompt for one in drawn] == [""]


def test_mistakes_name_the_option(command: Command, tmp_path: Path):
    (tmp_path / "empty").touch()
    for options, expected in [
        ({"prompts_file": tmp_path / "none"}, r"^--prompts .*none: .* No such file"),
        ({"prompts_file": tmp_path / "empty"}, r"^--prompts .*empty: .* an empty file$"),
        ({"prompts_file": tmp_path}, r"^--prompts .*: .* Is a directory$"),
        ({"temperature": float("inf")}, r"^--temperature: needs a finite number, got inf$"),
        ({"min_p": float("nan")}, r"^--min-p: needs a finite number, got nan$"),
        ({"top_p": float("nan")}, r"^--top-p: needs a finite number, got nan$"),
    ]:
        with pytest.raises(UserError, match=expected):
            command(**options)


@pytest.mark.slow
def test_a_model_of_pictures_draws_them_into_files(trained, tmp_path, monkeypatch, capsys):
    write_pictures(tmp_path / "photos", tmp_path / "corpus")
    data = replace(trained.recipe.data, corpus=str(tmp_path / "corpus"), window="document")
    params = {**trained.params, "output": {**trained.params["output"]}}
    params["output"]["bias"] = jnp.full(259, -100.0).at[N_SPECIAL + 7].set(0.0).at[EOS_ID].set(9.0)
    painter = trained._replace(recipe=replace(trained.recipe, data=data), params=params)
    monkeypatch.setattr(sample, "load_trained_model", lambda run: painter)
    monkeypatch.setattr(RunDirectory, "existing", RunDirectory.at)
    options: Any = {"tokens": 5, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    for _ in range(2):
        sample.sample_command(
            tmp_path, "run", samples=2, output=tmp_path / "out", console=Console(), **options
        )
    paths = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in paths] == [f"run-000{number}.png" for number in range(4)]
    assert capsys.readouterr().out.count("run-000") == 4
    for path in paths:
        assert (np.asarray(Image.open(path)) == np.full((64, 64, 3), 7)).all()
    with pytest.raises(UserError, match="--prompt: run run is a model of pictures"):
        sample.sample_command(tmp_path, "run", prompts=("a",), console=Console(), **options)


def test_a_model_of_text_takes_no_folder_for_pictures(command, tmp_path):
    with pytest.raises(UserError, match="--output: run run writes text, not pictures"):
        command(output=tmp_path)
