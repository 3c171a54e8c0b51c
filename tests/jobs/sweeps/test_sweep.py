"""Sweeps: what a file spans, what the figures say, and one that is killed half-way."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from jobs.cli.main import run_cli
from jobs.errors import ExitCode
from jobs.sweeps.report import Trial, ranked, ranking_lines, table
from jobs.sweeps.sweep_file import combinations, load_sweep
from jobs.tracking.parent_run import children
from jobs.tracking.store import embedded_store
from tests.micro import write_micro

TVQ = [sys.executable, "-P", "-c", "from jobs.cli.main import main; main()"]
SWEEP = """\
name: rates
train: ./micro.yaml data.corpus=corpus
space:
  optimizer.learning_rate: [3e-3, 1e-2]
  model.window: [16, 32]
seeds: [0, 1]
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    write_micro(tmp_path)
    (tmp_path / "rates.yaml").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TVQ_ROOT", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def test_what_a_file_spans(workplace: Path):
    sweep = load_sweep("rates.yaml")
    grid = combinations(sweep.space)
    assert grid == [
        {"optimizer.learning_rate": rate, "model.window": window}
        for rate in (3e-3, 1e-2)
        for window in (16, 32)
    ]
    recipe = sweep.recipe(grid[1], 7)
    assert (recipe.optimizer.learning_rate, recipe.model.window) == (3e-3, 32)
    assert (recipe.training.seed, recipe.cluster.workers) == (7, 0)
    names = {sweep.run_name(values, seed) for values in grid for seed in sweep.seeds}
    assert len(names) == 8
    # The name of values does not depend on the order in which they are given.
    backwards = dict(reversed(grid[0].items()))
    assert sweep.run_name(backwards, 0) == sweep.run_name(grid[0], 0)
    (workplace / "again.yaml").write_text(sweep.to_yaml())
    assert load_sweep("again.yaml") == sweep


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("space:", "spaces:"), "did you mean space?"),
        (("name: rates", "name: ../up"), "name: expected letters"),
        (("[16, 32]", "[16, 32, 16]"), "model.window: names a value twice"),
        (("=corpus", "=corpus model.n_layerz=2"), "sweep rates.yaml: recipe ./micro.yaml: model"),
        (("data.corpus=corpus", ""), "data.corpus: no corpus given"),
        (("=corpus", "=nowhere"), "nowhere: there is no such folder"),
        (("[16, 32]", "[16, wide]"), "model.window: input should be"),
        (("model.window", "model.windo"), "did you mean window?"),
        (("[16, 32]", "{integers: [16, 32]}"), "expected a list of values, got"),
        (("seeds: [0, 1]", "seeds: [0, 0]"), "different whole numbers"),
        (("seeds: [0, 1]", "parallel: 0"), "parallel: expected a whole number"),
        (("seeds: [0, 1]", "search: best"), "expected grid, random or optuna"),
        (("corpus=corpus", "corpus=corpus training.seed=1"), "the sweep decides this"),
        (("model.window: [16, 32]", "training.seed: [1, 2]"), "give `seeds` instead"),
        (("seeds: [0, 1]", "early_stopping: {reduction: 3}"), "early_stopping.after"),
        (("[16, 32]", "{log_uniform: [0, 1]}\nsearch: random"), "expected a list of values, or"),
    ],
)
def test_mistakes(workplace: Path, capsys, change, expected):
    (workplace / "rates.yaml").write_text(SWEEP.replace(*change))
    assert run_cli(["sweep", "rates.yaml"]) == ExitCode.USER
    [line] = capsys.readouterr().err.splitlines()
    assert expected in line
    assert not (workplace / "runs").exists()


def test_a_root_in_a_bucket_is_refused(workplace: Path, capsys):
    assert run_cli(["sweep", "rates.yaml", "--root", "gs://bucket/runs"]) == ExitCode.USER
    assert "is a folder of this machine" in capsys.readouterr().err


def trials(figures: Mapping[str, Sequence[float | None]]) -> list[Trial]:
    return [
        Trial(f"{name}-s{seed}", {"a.b": name}, seed, figure)
        for name, row in figures.items()
        for seed, figure in enumerate(row)
    ]


def test_the_best_is_the_lowest_mean_with_its_confidence():
    found = ranked(trials({"x": [2.0, 2.2], "y": [1.9, 1.7], "z": [None, None], "w": [2.5, None]}))
    assert [one.values["a.b"] for one in found] == ["y", "x", "w", "z"]
    best = found[0]
    # Student's t of one degree of freedom: 12.7062; the mean's standard error is 0.1.
    assert best.mean == pytest.approx(1.8)
    assert (best.low, best.high) == pytest.approx((1.8 - 1.27062, 1.8 + 1.27062), abs=1e-5)
    assert found[2].low is None
    columns, rows = table(found)
    assert columns[:2] == ["a.b", "bits per byte"]
    assert rows[3][1] == "stopped early"
    lines = ranking_lines(found, Path("runs"))
    assert lines[0].startswith("best      a.b=y: 1.8000 bits per byte")
    # By seed: 0.1 and 0.5 better; mean 0.3, standard error 0.2.
    assert "+0.3000 (95% of -2.2412 to +2.8412 over 2 seeds): not more than the seeds" in lines[1]
    assert lines[2] == "more      tvq compare y-s0 y-s1 x-s0 x-s1 --root runs"


def test_two_seeds_are_no_verdict():
    for seeds, expected in ((2, "a verdict takes 3 seeds"), (3, "more than chance")):
        figures = {"x": [2.0, 2.1, 2.2][:seeds], "y": [1.5, 1.61, 1.69][:seeds]}
        assert ranking_lines(ranked(trials(figures)), Path("runs"))[1].endswith(expected)


def test_seeds_that_did_not_end_with_both_are_not_compared():
    found = ranked(trials({"x": [None, 1.5], "y": [2.0, None]}))
    [_, second, *_] = ranking_lines(found, Path("runs"))
    assert second == "second    +0.5000; no seed was trained to its end with both"


def test_a_configuration_that_became_unstable_with_one_seed_is_not_the_best():
    found = ranked(trials({"x": [1.0, math.inf], "y": [2.0, 2.2], "w": [None, None]}))
    assert [one.values["a.b"] for one in found] == ["y", "x", "w"]
    assert [row[1:4] for row in table(found)[1]] == [
        ["2.1000", "0.8294 to 3.3706", "2"],
        ["unstable", "-", "1"],
        ["stopped early", "-", "0"],
    ]
    best, unstable, more = ranking_lines(found, Path("runs"))
    assert best.startswith("best      a.b=y: 2.1000")
    assert unstable == "unstable  1 of 3: no update could be applied"
    assert more == "more      tvq compare y-s0 y-s1 --root runs"


def test_nothing_that_was_trained_to_its_end():
    assert ranking_lines(ranked(trials({"x": [None]})), Path("runs")) == [
        "no training was done to its end"
    ]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sweep_of_eight_that_is_killed_half_way_goes_on(workplace: Path, capsys):
    root = workplace / "runs"

    def end_when(n_done: int, how: signal.Signals) -> tuple[int, str, list[Path]]:
        sweep = subprocess.Popen(
            [*TVQ, "sweep", "rates.yaml"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while len(done := list(root.glob("rates-*/closed.json"))) < n_done:
            assert sweep.poll() is None, "it was over before it could be ended"
            time.sleep(0.2)
        os.kill(sweep.pid, how)
        _, errors = sweep.communicate()
        return sweep.returncode, errors, done

    code, errors, _ = end_when(1, signal.SIGINT)
    assert code == ExitCode.INTERRUPTED
    said = "interrupted; what was done is kept, the same command goes on"
    assert errors.strip() == said  # on a terminal ^C stands before it, so it begins a line
    _, _, done = end_when(4, signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in done}
    ended = subprocess.run(
        [*TVQ, "sweep", "rates.yaml", "--json"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    ranking = json.loads(ended.stdout)["ranking"]
    assert len(ranking) == 4
    assert sum(len(one["trials"]) for one in ranking) == 8
    assert all(trial["bits_per_byte"] for one in ranking for trial in one["trials"])
    means = [one["mean"] for one in ranking]
    assert means == sorted(means)
    # Four were done: none of them was touched.
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert len(list(root.glob("rates-*/closed.json"))) == 8
    under = children(embedded_store(root), "tvq", "rates")
    assert len({run["name"] for run in under}) == len(under) == 8
    assert {run["status"] for run in under} == {"FINISHED"}
    # Again: all is done, the answer is the same, and its report says how sure it is.
    assert run_cli(["sweep", "rates.yaml", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["ranking"] == ranking
    assert run_cli(["sweep", "rates.yaml"]) == ExitCode.OK
    best, second, more = capsys.readouterr().out.splitlines()[-3:]
    assert f"{ranking[0]['mean']:.4f} bits per byte on the whole validation split" in best
    assert f"{means[1] - means[0]:+.4f} (95% of " in second
    assert "over 2 seeds): " in second
    # The comparison that it names is one.
    command = more.removeprefix("more      tvq ").split()
    assert command[0] == "compare"
    assert run_cli([*command, "--json"]) == ExitCode.OK
    compared = capsys.readouterr().out
    assert all(trial["run"] in compared for one in ranking[:2] for trial in one["trials"])
    # Another file under the same name is refused.
    (workplace / "rates.yaml").write_text(SWEEP.replace("[16, 32]", "[16]"))
    assert run_cli(["sweep", "rates.yaml"]) == ExitCode.USER
    assert "was begun with another file" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_values_that_ruin_a_training_do_not_end_the_sweep(workplace: Path, capsys):
    text = SWEEP.replace("[3e-3, 1e-2]", "[1e30, 1e-2]").replace("[16, 32]", "[16]")
    (workplace / "rates.yaml").write_text(text)
    assert run_cli(["sweep", "rates.yaml", "--json"]) == ExitCode.OK
    good, bad = json.loads(capsys.readouterr().out)["ranking"]
    assert good["mean"] < 8
    assert not good["unstable"]
    assert bad["values"]["optimizer.learning_rate"] == 1e30
    assert bad["unstable"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "how",
    [
        "search: optuna\ntrials: 3",
        "search: random\ntrials: 3\nearly_stopping: {after: 20, reduction: 2}",
    ],
)
def test_an_optimiser_and_early_stopping(workplace: Path, capsys, how):
    text = SWEEP.replace("[3e-3, 1e-2]", "{log_uniform: [1e-5, 3e-2]}")
    (workplace / "rates.yaml").write_text(f"{text}{how}\n")
    assert run_cli(["sweep", "rates.yaml", "--json"]) == ExitCode.OK
    ranking = json.loads(capsys.readouterr().out)["ranking"]
    assert len(ranking) == 3
    assert [len(one["trials"]) for one in ranking] == [2, 2, 2]
    rates = {one["values"]["optimizer.learning_rate"] for one in ranking}
    assert len(rates) == 3
    assert all(1e-5 <= rate <= 3e-2 for rate in rates)
    assert ranking[0]["mean"] is not None
