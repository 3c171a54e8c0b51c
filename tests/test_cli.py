"""The command as a user meets it: help that teaches, and one clear line for every mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from jobs.cli.main import cli, run_cli
from jobs.errors import ExitCode
from pipeline.manifest import FORMAT_VERSION
from tests.command_lines import commands_of, parse, shown_in
from tests.micro import write_micro


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    write_micro(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TVQ_ROOT", raising=False)
    return tmp_path


def mistake(capsys, *arguments: str, code: int = ExitCode.USER) -> str:
    """Runs `tvq`, which must fail with `code` and say one line on stderr, nothing on stdout."""
    assert run_cli(list(arguments)) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert len(output.err.splitlines()) == 1
    return output.err


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


TRAIN = ("train", "./micro.yaml")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("train", "tinny", "data.corpus=corpus"), "did you mean tiny?"),
        (("train", "./none.yaml"), "no such file"),
        ((*TRAIN, "data.corpus=corpus", "trainig.steps=8"), "did you mean training?"),
        ((*TRAIN, "data.corpus=corpus", "training.step=8"), "did you mean steps?"),
        ((*TRAIN, "data.corpus=corpus", "training.steps=many"), "training.steps: input should be"),
        ((*TRAIN, "data.corpus=corpus", "training.steps=9"), "the nearest is 8"),
        ((*TRAIN, "data.corpus=corpus", "steps=9"), "expected section.field=value"),
        ((*TRAIN, "data.corpus=corpus", "training.update_length=48"), "must divide"),
        (TRAIN, "data.corpus: no corpus given"),
        ((*TRAIN, "data.corpus=nowhere"), "no such folder; make a corpus with `tvq prepare`"),
        ((*TRAIN, "data.corpus=."), "not a prepared corpus"),
        ((*TRAIN, "data.corpus=corpus", "model.vocab_size=300"), "set model.vocab_size=259"),
        ((*TRAIN, "data.corpus=corpus", "--run", "../x"), "run name '../x'"),
        ((*TRAIN, "data.corpus=corpus", "--run", "models"), "run name 'models'"),
        (("evaluate", "nobody"), "`tvq train`"),
        (("sample", "nobody"), "`tvq train`"),
        (("compare", "nobody"), "`tvq train`"),
        (("compare",), "name one run or more"),
        (("compare", "--query", ""), "`tvq train`"),
        (("register", "nobody", "--as", "x"), "`tvq train`"),
        (("promote", "nobody", "--if-better", "eval/bits_per_byte"), "`tvq register RUN --as"),
        (("promote", "nobody", "--if-better", "test/bits_per_byte"), "never decides"),
        (("lineage", "nobody"), "neither a run nor a registered model"),
        (("reproduce", "nobody"), "`tvq train`"),
        (("ui",), "no runs there yet"),
        (("prepare", "-o", "out"), "expected either SOURCES"),
        (("prepare", "nowhere", "-o", "out"), "no such file"),
        (("prepare", "corpus", "--include", "*.none", "-o", "out"), "no file matches"),
        (("recipes", "tinny"), "did you mean tiny?"),
    ],
)
def test_mistake_is_one_line_and_changes_nothing(workplace, capsys, arguments, expected):
    before = snapshot(workplace)
    assert expected in mistake(capsys, *arguments)
    assert snapshot(workplace) == before


def test_folder_that_is_not_ours_is_refused(workplace, capsys):
    foreign = workplace / "runs" / "mine"
    foreign.mkdir(parents=True)
    (foreign / "thesis.tex").write_text("precious")
    before = snapshot(workplace)
    line = mistake(capsys, *TRAIN, "data.corpus=corpus", "--run", "mine")
    assert "is there and is not a tvq run" in line
    assert snapshot(workplace) == before


def test_output_that_is_not_ours_is_refused(workplace, capsys):
    (workplace / "out").mkdir()
    (workplace / "out" / "thesis.tex").write_text("precious")
    before = snapshot(workplace)
    assert "name a new or empty folder" in mistake(capsys, "prepare", "micro.yaml", "-o", "out")
    assert snapshot(workplace) == before


def test_corpus_of_a_newer_format_is_refused(workplace, capsys):
    path = workplace / "corpus" / "manifest.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"format_version": FORMAT_VERSION + 1}))
    assert "upgrade tvq" in mistake(capsys, *TRAIN, "data.corpus=corpus")


def test_damaged_shard_is_refused_before_anything_is_begun(workplace, capsys):
    shard = next((workplace / "corpus").rglob("train-*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-100])
    line = mistake(capsys, *TRAIN, "data.corpus=corpus")
    assert shard.name in line
    assert not (workplace / "runs").exists()


def test_password_in_a_url_is_refused_and_not_repeated(workplace, capsys):
    line = mistake(capsys, *TRAIN, "data.corpus=corpus", "tracking.uri=http://me:hunter2@host")
    assert "hunter2" not in line
    assert "MLFLOW_TRACKING_USERNAME and _PASSWORD" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("trian",), ("'trian'", "`tvq --help`")),
        (("train",), ("'RECIPE'", "`tvq train --help`")),
        (("train", "tiny", "--rn", "x"), ("--rn", "--run", "`tvq train --help`")),
        (("sample", "a", "--tokens", "0"), ("'--tokens': 0", "x>=1", "`tvq sample --help`")),
        (("evaluate", "a", "--split", "x"), ("'validation', 'test'", "`tvq evaluate --help`")),
        (("bench", "attentoin"), ("'attention'", "`tvq bench --help`")),
        (("bench", "train", "--rounds"), ("'--rounds' requires an argument",)),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_help(capsys, arguments, expected):
    line = mistake(capsys, *arguments)
    for part in expected:
        assert part in line


def test_without_a_command_there_is_the_help(capsys):
    for arguments in ([], ["bench"]):
        assert run_cli(arguments) == ExitCode.USER
        assert "Examples:" in capsys.readouterr().err


def test_every_help_teaches_by_example(capsys):
    for words in ((), *commands_of(cli)):
        assert run_cli([*words, "--help"]) == ExitCode.OK
        text = capsys.readouterr().out
        assert re.search(r"Examples:\n(\s+tvq .*\n)+", text), words
    assert "Exit codes:" in cli.get_help(click.Context(cli))


def test_examples_in_the_help_parse():
    """Each example names a command that exists, with options and arguments that it takes."""
    for command in (cli, *commands_of(cli).values()):
        examples = shown_in(command.epilog or "")
        assert examples, command.name
        for words in examples:
            parse(words)


def test_recipes_are_printed_for_people_and_scripts(capsys):
    assert run_cli(["recipes", "--json"]) == ExitCode.OK
    assert "tiny" in json.loads(capsys.readouterr().out)
    assert run_cli(["recipes", "tiny", "training.steps=200"]) == ExitCode.OK
    assert "steps: 200" in capsys.readouterr().out
    assert run_cli(["recipes", "--fields"]) == ExitCode.OK
    assert "checkpoint.every = 200 (operational)" in capsys.readouterr().out


def test_defect_of_ours_shows_its_traceback(workplace):
    code = (
        "import jobs.recipe_yaml as r; r.named_recipes = None;"
        "from jobs.cli.main import main; main()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "recipes"], cwd=workplace, capture_output=True, text=True
    )
    assert run.returncode == ExitCode.INTERNAL
    assert "Traceback" in run.stderr


def test_the_formats_offered_are_those_there_are():
    from jobs.cli import corpora as cli_data
    from pipeline.formats import KINDS

    assert cli_data._KINDS == KINDS  # said twice, so that `tvq --help` need not load the pipeline
