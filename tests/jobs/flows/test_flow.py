"""A flow of real trainings: what is done stays, what broke goes on, the better model is kept."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jobs import recipe as recipes
from jobs.checkpoints.exported_file import read_exported
from jobs.cli.main import run_cli
from jobs.console import Console
from jobs.errors import ExitCode
from jobs.flows.flow import FlowResult, _as_json, run_flow
from jobs.flows.flow_file import load_flow
from jobs.flows.flow_folder import FlowFolder, flow_state
from jobs.flows.stages import Candidate, Corpus, Verdict
from jobs.registry import promote as promotions
from jobs.registry.registered_model import ModelFolder
from jobs.runs.run_directory import list_runs
from jobs.tracking.parent_run import children
from jobs.tracking.store import embedded_store
from tests.micro import RECIPE

FLOW = """\
name: nightly
prepare: books --output corpora/books --validation 0.3 --test 0
train: ./micro.yaml
begin_from: champion
"""
TICKS = [f"2026010{day}T020000Z" for day in range(1, 8)]


def text(number: int, paragraphs: int = 120) -> str:
    lines = (
        f"In the year {number * 37 + k} the {k % 17}th ship came home." for k in range(paragraphs)
    )
    return "\n".join(lines) + "\n"


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    (tmp_path / "micro.yaml").write_text(RECIPE)
    (tmp_path / "nightly.yaml").write_text(FLOW)
    (tmp_path / "books").mkdir()
    for number in range(40):
        (tmp_path / "books" / f"{number}.txt").write_text(text(number))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TVQ_ROOT", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.mark.ray
@pytest.mark.tracking
@pytest.mark.compiles
def test_a_flow_breaks_goes_on_finds_nothing_new_and_then_something(
    workplace: Path, monkeypatch, capsys
):
    root, console = workplace / "runs", Console(quiet=True)
    flow = load_flow("nightly.yaml").absolute()
    promote = promotions.promote

    def breaks(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    # The first tick breaks where the champion is made: the candidate is registered already.
    monkeypatch.setattr(promotions, "promote", breaks)
    with pytest.raises(ZeroDivisionError):
        run_flow(flow, TICKS[0], root, console)
    assert flow_state(root, "nightly", TICKS[0]) is None
    [trained] = list_runs(root)
    before = (trained.path / "closed.json").stat().st_mtime_ns
    monkeypatch.setattr(promotions, "promote", promote)
    first = run_flow(flow, TICKS[0], root, console)
    assert flow_state(root, "nightly", TICKS[0]) == "succeeded"
    assert first.seconds["train"] == 0
    assert first.corpus.reused
    assert first.verdict.outcome == "promoted"
    assert first.champion == first.candidate.run == trained.location
    assert [one.version for one in ModelFolder(root, "nightly").versions()] == [1]
    champion = promotions.champion(root, "nightly")
    assert champion
    assert (champion.version, champion.update) == (1, first.candidate.update)
    assert (trained.path / "closed.json").stat().st_mtime_ns == before

    # Again, and by the command: it is done.
    assert run_flow(flow, TICKS[0], root, console) == first
    assert run_cli(["flow", "run", "nightly.yaml", "--tick", TICKS[0], "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["champion"] == first.champion

    # Nothing new: nothing is trained.
    second = run_flow(flow, TICKS[1], root, console)
    assert second.candidate.run == first.champion
    assert second.verdict.outcome == "inconclusive"
    assert "nothing is new" in second.verdict.why
    assert second.verdict.bits_per_byte == first.verdict.bits_per_byte
    assert len(list_runs(root)) == 1

    # More text: an increment, and a training that begins where the champion is.
    for number in range(40, 60):
        (workplace / "books" / f"{number}.txt").write_text(text(number))
    third = run_flow(flow, TICKS[2], root, console)
    assert third.corpus.increments == 2
    assert third.corpus.fingerprints["validation"] == first.corpus.fingerprints["validation"]
    assert third.corpus.tokens > first.corpus.tokens
    assert third.candidate.run != first.champion
    assert third.verdict.champion_bits_per_byte == first.verdict.bits_per_byte
    assert third.verdict.outcome == "promoted"  # forty updates more, from forty
    assert third.champion == third.candidate.run
    stored = (Path(third.candidate.run) / "recipe.yaml").read_text()
    recipe = recipes.from_yaml(stored, "recipe.yaml")
    assert recipe.training.init_from == ModelFolder(root, "nightly").weights(1)
    before, after = first.verdict.bits_per_byte, third.verdict.bits_per_byte
    assert third.verdict.difference == pytest.approx(after - before, rel=1e-9)

    # Nothing new: the champion was trained by this recipe, though it began with another's weights.
    fourth = run_flow(flow, TICKS[3], root, console)
    assert fourth.candidate.run == third.champion
    assert "nothing is new" in fourth.verdict.why
    assert len(list_runs(root)) == 2

    # In MLflow: the parent of each tick, with its stages under it.
    store = embedded_store(root)
    under = children(store, "tvq", f"nightly-{TICKS[2]}")
    assert {run["name"] for run in under} == {
        f"nightly-{TICKS[2]}-prepare",
        f"nightly-{TICKS[2]}-judge",
        Path(third.candidate.run).name,
    }
    assert {run["status"] for run in under} == {"FINISHED"}
    [judged] = [run for run in under if run["name"].endswith("judge")]
    assert judged["metrics"]["bits_per_byte"] == third.verdict.bits_per_byte
    assert judged["tags"]["outcome"] == "promoted"

    # What people see.
    assert run_cli(["flow", "show", "nightly.yaml"]) == ExitCode.OK
    shown = capsys.readouterr().out
    assert f"champion  version 2, {third.champion} at update 40" in shown
    assert shown.index(TICKS[2]) < shown.index(TICKS[0])
    # The run's own checkpoints are not needed any more to begin with the champion.
    network, exported = read_exported(ModelFolder(root, "nightly").weights(2))
    assert network
    assert exported.update == 40


def test_a_tick_that_another_process_runs_is_busy(workplace: Path, capsys):
    claim = FlowFolder(workplace / "runs", "nightly", TICKS[0]).claim()
    assert claim.take() is None
    assert flow_state(workplace / "runs", "nightly", TICKS[0]) == "running"
    assert run_cli(["flow", "run", "nightly.yaml", "--tick", TICKS[0]]) == ExitCode.BUSY
    assert "is being run by process" in capsys.readouterr().err
    claim.give_back()
    assert flow_state(workplace / "runs", "nightly", TICKS[0]) is None


def test_the_tick_of_a_clusters_cron_is_that_of_its_expression_and_waited_for(
    workplace: Path, monkeypatch, capsys
):
    """Once it is done, by whomever, there is nothing left to do."""
    run = ["flow", "run", "nightly.yaml", "--tick-from-cron", "0 2 1 1 *", "--timezone"]
    assert run_cli([*run, "Europe/Atlantis"]) == ExitCode.USER
    assert run_cli([*run, "UTC", "--tick", TICKS[0]]) == ExitCode.USER
    capsys.readouterr()
    now = datetime.now(UTC)
    year = now.year if now >= datetime(now.year, 1, 1, 1, tzinfo=UTC) else now.year - 1
    folder = FlowFolder(workplace / "runs", "nightly", f"{year}0101T010000Z")  # 2:00 in Berlin
    claim = folder.claim()
    assert claim.take() is None

    def another_finishes(_: float) -> None:
        parts = Corpus("c", {}, 1, 1, 1, False), Candidate("r", 1, "w", None)
        verdict = Verdict("promoted", "the first champion", 1.0, None)
        result = FlowResult(folder.tick, *parts, verdict, "r", {})
        folder.write("result.json", _as_json(result))
        claim.give_back()

    monkeypatch.setattr("jobs.flows.flow.time.sleep", another_finishes)
    assert run_cli([*run, "Europe/Berlin"]) == ExitCode.OK
    said = capsys.readouterr().out
    assert "is being run by process" in said
    assert f"tick {folder.tick} is done already" in said


def test_a_flow_is_the_same_from_its_own_yaml_and_from_anywhere(workplace: Path, monkeypatch):
    flow = load_flow("nightly.yaml").absolute()
    (workplace / "elsewhere").mkdir()
    monkeypatch.chdir(workplace / "elsewhere")
    (workplace / "elsewhere" / "copy.yaml").write_text(flow.to_yaml())
    assert load_flow("copy.yaml").absolute() == flow
    assert flow.corpus == str(workplace / "corpora" / "books")
    shutil.rmtree(workplace / "elsewhere")


def test_what_is_no_tick_is_refused(workplace: Path, capsys):
    assert run_cli(["flow", "run", "nightly.yaml", "--tick", "tomorrow"]) == ExitCode.USER
    assert "expected a UTC instant" in capsys.readouterr().err
