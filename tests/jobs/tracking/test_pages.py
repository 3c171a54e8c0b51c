"""What MLflow's pages show of three trainings, in a browser.

The curves are taken from the charts themselves and held against what the trainings measured; texts
and figures against the files that were logged. Pictures of the pages are kept in the folder that
TVQ_SCREENSHOTS names, to be looked at.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from mlflow import MlflowClient

from jobs import recipe as recipes
from jobs.cli.main import run_cli
from jobs.console import Console
from jobs.errors import ExitCode
from jobs.metric_names import EVAL_BITS, TRAIN_LOSS
from jobs.runs.metric_spool import MetricPoint
from jobs.tracking.checkpoint_models import models_of_run
from jobs.tracking.store import embedded_store
from jobs.training.train import train
from jobs.ui import charts_url, serve
from tests.browser import Page, browser_page
from tests.micro import write_micro

pytestmark = [pytest.mark.browser, pytest.mark.tracking, pytest.mark.timeout(900)]

# Saves that follow so fast are skipped or gone before anybody looks: one at each evaluation.
RUNS = {
    "cache": ("checkpoint.every=20", "training.samples=2"),
    "window": ("checkpoint.every=20", "model.compressive_cache=false"),
    "narrow": ("checkpoint.every=20", "model.d_model=8"),
}
STEPS = 40
Curve = list[tuple[int, float]]

# What is looked for in MLflow's pages, in their own words.
ASSISTANT_CLOSE = "document.querySelector('[data-component-id$=\"chat_panel.close\"]')"
TICK = """[...document.querySelectorAll('[role=dialog] [class*=tree-treenode]')]
    .find(e => e.innerText.trim() === %s)?.querySelector('[class*=tree-checkbox]')"""
TABLE = """(() => {
    const rows = {}, titles = {};
    for (const cell of document.querySelectorAll('[role=columnheader][col-id]'))
        titles[cell.getAttribute('col-id')] = cell.innerText.trim();
    for (const cell of document.querySelectorAll('[row-index] > [col-id]')) {
        const row = rows[cell.parentElement.getAttribute('row-index')] ??= {};
        row[titles[cell.getAttribute('col-id')]] = cell.innerText.trim().split('\\n');
    }
    return Object.values(rows);
})()"""
CHART = """((metric, runs) => {
    const plot = [...document.querySelectorAll('.js-plotly-plot')].find(
        e => e.data.length && e.data.every(line => line.metricKey === metric && line.x.length));
    const strokes = [...plot?.querySelectorAll('.js-line') ?? []].map(e => e.style.stroke);
    return new Set(strokes).size === runs  // each run in a colour of its own
        && plot.data.map(line => ({name: line.name, x: [...line.x], y: [...line.y]}));
})(%s, %d)"""
PICTURE = """(async name => {
    const picture = [...document.images].find(e => e.alt === name && e.complete);
    if (!picture?.naturalWidth) return null;
    const bytes = await (await fetch(picture.src)).arrayBuffer();
    const sum = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
    return {
        sha256: [...sum].map(byte => byte.toString(16).padStart(2, '0')).join(''),
        shown_width: picture.getBoundingClientRect().width,
    };
})(%s)"""
LINK = "[...document.links].find(e => e.innerText.trim() === %s).href"


class Shown(NamedTuple):
    """A browser, a server, and what was trained."""

    page: Page
    client: MlflowClient
    url: str
    experiment: str
    runs: dict[str, str]
    """MLflow's ids, by name."""
    measured: dict[str, list[MetricPoint]]
    """As the trainings handed them out, by name."""
    root: Path
    pictures: Path

    def open(self, path: str) -> None:
        """A page of the experiment; MLflow's own kind of it is for generative AI."""
        query = "&" if "?" in path else "?"
        self.page.open(f"{self.url}/#/{path}{query}workflowType=machine_learning")

    def curve(self, name: str, metric: str) -> Curve:
        return [(p.step, p.values[metric]) for p in self.measured[name] if metric in p.values]

    def keep(self, name: str) -> None:
        self.page.screenshot(self.pictures / f"{name}.png")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    folder = tmp_path_factory.mktemp("pages")
    corpus, file = write_micro(folder)
    root, measured = folder / "runs", {}
    for name, fields in RUNS.items():
        recipe = recipes.load(str(file), (f"data.corpus={corpus}", *fields))
        measured[name] = []
        quiet = Console(quiet=True)
        train(recipe, root=root, name=name, console=quiet, on_points=measured[name].extend)
    for command in (
        ["evaluate", "cache", "--split", "test"],
        ["register", "cache", "--as", "plays"],
        ["promote", "plays", "--if-better", EVAL_BITS],
    ):
        assert run_cli([*command, "--root", str(root)]) == ExitCode.OK
    store = embedded_store(root)
    client = MlflowClient(store.uri)
    experiment = client.get_experiment_by_name("tvq")
    assert experiment
    found = client.search_runs([experiment.experiment_id])
    with serve(store, folder / "log") as server, browser_page() as page:
        yield Shown(
            page,
            client,
            server.url,
            experiment.experiment_id,
            {run.info.run_name or "": run.info.run_id for run in found},
            measured,
            root,
            Path(os.environ.get("TVQ_SCREENSHOTS", folder / "pictures")),
        )
        assert page.errors == []


def test_the_table_of_runs_shows_what_they_reached_and_what_they_were_given(shown: Shown):
    page = shown.page
    page.resize(2100, 700)  # all columns, which the table draws only where they are seen
    shown.open(f"experiments/{shown.experiment}/runs")
    page.wait_for_text(*RUNS)
    page.click(ASSISTANT_CLOSE)  # it covers a third of the first page that somebody opens
    page.click("document.querySelector('[data-testid=column-selection-dropdown]')")
    columns = (EVAL_BITS, TRAIN_LOSS, "model.d_model", "model.compressive_cache")
    for column in columns:
        page.type_into("[role=dialog] input[placeholder='Search columns']", column)
        page.click(TICK % json.dumps(column))
    page.wait_for_text(*columns)
    page.press("Escape")
    shown.keep("runs")
    rows = {cells.pop("Run Name")[-1]: cells for cells in page.evaluate(TABLE)}
    assert rows.keys() == RUNS.keys()
    for name, cells in rows.items():
        for metric in (EVAL_BITS, TRAIN_LOSS):
            assert float(cells[metric][0]) == shown.curve(name, metric)[-1][1]
        assert cells["model.d_model"] == ["8" if name == "narrow" else "16"]
        cached = "false" if name == "window" else "true"
        assert cells["model.compressive_cache"] == [cached]
        assert cells["Dataset"][0].startswith("corpus-train")
        assert cells["Models"][0].startswith(f"{name}-{STEPS:08d}")


def test_the_charts_of_three_runs_draw_every_point_that_was_measured(shown: Shown):
    page = shown.page
    page.resize(1400, 1000)
    page.open(charts_url(shown.url, "tvq"))  # where `tvq ui` leads
    page.wait_for("document.querySelector('svg.main-svg')")
    shown.keep("charts")
    for metric in (EVAL_BITS, TRAIN_LOSS, "train/learning_rate"):
        # Charts are drawn where they are seen.
        page.type_into("input[placeholder='Search metric charts']", metric)
        chart = page.wait_for(CHART % (json.dumps(metric), len(RUNS)))
        for name in RUNS:
            [curve] = {
                tuple(zip(line["x"], line["y"], strict=True))
                for line in chart
                if line["name"] == name
            }
            assert list(curve) == [pytest.approx(point) for point in shown.curve(name, metric)]
            assert len(curve) == (2 if metric == EVAL_BITS else STEPS)


def test_the_figures_and_texts_of_a_run_are_shown_beside_their_names(shown: Shown):
    page, run = shown.page, shown.runs["cache"]
    page.resize(1400, 900)
    positions = f"loss_by_position_test_{STEPS:08d}.png"
    for name in ("plots/curves.png", f"plots/{positions}"):
        shown.open(f"experiments/{shown.experiment}/runs/{run}/artifacts/{name}")
        seen = page.wait_for(PICTURE % json.dumps(name))
        logged = Path(shown.client.download_artifacts(run, name)).read_bytes()
        assert seen["sha256"] == hashlib.sha256(logged).hexdigest()
        assert seen["shown_width"] > 500
        shown.keep(Path(name).stem)
    for update in (STEPS // 2, STEPS):
        name = f"samples/{update:08d}.txt"
        shown.open(f"experiments/{shown.experiment}/runs/{run}/artifacts/{name}")
        written = (shown.root / "cache" / name).read_text()
        page.wait_for_text(f"cache, update {update}: 2 texts")
        text = "".join(page.text().split())
        for line in filter(None, map(str.strip, written.splitlines())):
            assert "".join(line.split()) in text
    shown.keep("samples")


def test_each_checkpoint_that_was_evaluated_has_its_figures(shown: Shown):
    for name, run in shown.runs.items():
        models = models_of_run(shown.client, shown.experiment, run)
        for update, value in shown.curve(name, EVAL_BITS):
            held = {one.key: one.value for one in models[update].metrics or []}
            assert held[EVAL_BITS] == value


def test_the_pages_of_a_model_lead_from_the_champion_to_its_run_and_its_corpus(shown: Shown):
    page = shown.page
    shown.open("models/plays")
    said = page.wait_for_text("Version 1", "champion")
    assert f"tvq.update\n: {STEPS}" in said
    shown.keep("model")
    shown.open("models/plays/versions/1")
    said = page.wait_for_text("Source Run", "champion")
    assert page.evaluate(LINK % json.dumps("cache")).endswith(shown.runs["cache"])
    [newest] = shown.client.search_logged_models([shown.experiment], f"name = 'cache-{STEPS:08d}'")
    shown.open(f"experiments/{shown.experiment}/models/{newest.model_id}")
    said = page.wait_for_text("Datasets used", "test/bits_per_byte")
    shown.keep("checkpoint")
    lines = [line.strip() for line in said.splitlines()]
    measured = dict(shown.curve("cache", EVAL_BITS))[STEPS]
    for metric, split, value in (
        (EVAL_BITS, "validation", measured),
        ("test/bits_per_byte", "test", None),
    ):
        at = lines.index(metric)
        assert lines[at + 1].startswith(f"corpus-{split} (#")
        assert lines[at + 2] == "cache"
        assert value is None or float(lines[at + 3]) == pytest.approx(value)
