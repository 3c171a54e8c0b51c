"""`tvq compare` on runs of a real MLflow store."""

import itertools
import math
from pathlib import Path

import pytest

from jobs.comparison.differences import (
    Candidate,
    Comparison,
    as_json,
    compare,
    difference_table,
    result_table,
    verdict_lines,
)
from jobs.comparison.figure import plot
from jobs.comparison.report import page
from jobs.comparison.seed_spread import Conclusion
from jobs.errors import UserError
from jobs.metric_names import EVAL_BITS, EVAL_LOSS, TOKENS_PER_SECOND, TRAIN_LOSS
from jobs.runs.metric_spool import MetricPoint, MetricSpool
from jobs.tracking.adding import add_to_run
from jobs.tracking.reading import find_runs
from jobs.tracking.store import embedded_store
from jobs.tracking.tracker import Tracker

pytestmark = pytest.mark.tracking

NAMES = ("full cache", "no cache")


def train_loss(run: int, update: int) -> float:
    return 2.0 + 0.1 * run + 3.0 * math.exp(-update / 30)


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> list[Candidate]:
    """Two runs: 200 updates, and 100 updates that meet a NaN and an infinity."""
    root = tmp_path_factory.mktemp("compare root")
    store = embedded_store(root)
    found = []
    for run, name in enumerate(NAMES):
        last = 200 - 100 * run
        spool = MetricSpool(root / name)
        for update in range(1, last + 1):
            values = {
                TRAIN_LOSS: train_loss(run, update),
                TOKENS_PER_SECOND: 1000.0 * (1 + update % 3),
            }
            if run and update in (30, 31):
                values[TRAIN_LOSS] = math.nan if update == 30 else math.inf
            if update % 50 == 0:
                # The best evaluation is the one before the last.
                bits = 4.0 + run - update / 100 + (1.0 if update == last else 0.0)
                values |= {EVAL_BITS: bits, EVAL_LOSS: bits * math.log(2)}
            spool.append(MetricPoint(update, update * 512, update * 1000, values))
        spool.flush()
        tracker = Tracker.start(
            store.uri, "e", name, f"key {run}", artifact_location=store.artifact_location
        )
        recipe = {"model": {"compressive_cache": run == 0, "d_model": 64}, "training": {"seed": 0}}
        tracker.log_recipe(recipe | ({"only": {"here": 1}} if run else {}), "", "")
        tracker.attach_spool(root / name, lambda points: None)
        run_id = tracker.wait_for_run()
        assert run_id
        assert tracker.finish("FINISHED")
        add_to_run(store.uri, run_id, {"test/bits_per_byte": 2.5 + run}, last)
        found.append(Candidate(name, run_id, store.uri))
    return found


@pytest.fixture(scope="module")
def comparison(candidates: list[Candidate]) -> Comparison:
    return compare(candidates)


def test_parameters_that_differ_are_all_that_is_listed(comparison: Comparison):
    assert difference_table(comparison) == (
        ["parameter", *NAMES],
        [["model.compressive_cache", "true", "false"], ["only.here", "-", "1"]],
    )


def test_results_are_those_of_the_curves(comparison: Comparison):
    columns, rows = result_table(comparison)
    assert columns == ["result", *NAMES, "difference"]
    table = {row[0]: row[1:] for row in rows}
    last_5_percent = [
        math.fsum(train_loss(0, u) for u in range(191, 201)) / 10,
        math.fsum(train_loss(1, u) for u in range(96, 101)) / 5,
    ]
    assert table == {
        "updates": ["200", "100", "-100"],
        "tokens trained on": ["102,400", "51,200", "-51,200"],
        "train loss, nats/token (last 5%)": [
            *(f"{value:.4f}" for value in last_5_percent),
            f"{last_5_percent[1] - last_5_percent[0]:+.4f}",
        ],
        "eval/bits_per_byte, last": ["3.0000", "5.0000", "+2.0000"],
        "eval/bits_per_byte, best": ["2.5000", "4.5000", "+2.0000"],
        "eval/loss_nats_per_token, last": ["2.0794", "3.4657", "+1.3863"],
        "eval/loss_nats_per_token, best": ["1.7329", "3.1192", "+1.3863"],
        "eval/bits_per_byte at update 100": ["3.0000", "5.0000", "+2.0000"],
        "test/bits_per_byte, last": ["2.5000", "3.5000", "+1.0000"],
        "tokens/s (median)": ["2,000", "2,000", "+0"],
    }


def test_json_says_the_same_and_names_the_updates(comparison: Comparison):
    found = as_json(comparison)
    assert found["differences"]["model.compressive_cache"] == {NAMES[0]: "true", NAMES[1]: "false"}
    assert found["last_common_evaluation"] == {
        "update": 100,
        EVAL_BITS: {NAMES[0]: 3.0, NAMES[1]: 5.0},
    }
    first = found["runs"][0]
    assert first["name"] == NAMES[0]
    assert first["status"] == "FINISHED"
    assert first["best"][EVAL_BITS] == {"value": 2.5, "update": 150}
    assert first["last"]["test/bits_per_byte"] == 2.5


def test_one_run_has_results_and_nothing_that_differs(candidates: list[Candidate]):
    alone = compare(candidates[:1])
    assert alone.differences == {}
    columns, rows = result_table(alone)
    assert columns == ["result", NAMES[0]]
    assert ["updates", "200"] in rows
    assert not any("at update" in row[0] for row in rows)


def test_a_run_without_metrics_is_shown_as_such(candidates: list[Candidate], tmp_path: Path):
    empty = Tracker.start(candidates[0].uri, "e", "empty", "empty key")
    run_id = empty.wait_for_run()
    assert run_id
    empty.finish("KILLED")
    both = compare([candidates[0], Candidate("empty", run_id, candidates[0].uri)])
    _, rows = result_table(both)
    assert ["eval/bits_per_byte, best", "2.5000", "-", "-"] in rows
    assert as_json(both)["last_common_evaluation"] is None
    plot(both, tmp_path / "empty.png")


def test_nothing_to_compare_and_a_run_that_is_not_there_are_user_errors(
    candidates: list[Candidate],
):
    with pytest.raises(UserError, match="name one run or more"):
        compare([])
    with pytest.raises(UserError, match="not found"):
        compare([Candidate("x", "0" * 32, candidates[0].uri)])


def test_the_picture_is_a_png_with_both_curves_and_their_colours(
    comparison: Comparison, tmp_path: Path
):
    from matplotlib.image import imread

    path = tmp_path / "a folder" / "loss.png"
    plot(comparison, path)
    assert [child.name for child in path.parent.iterdir()] == ["loss.png"]
    pixels = imread(path)[..., :3]
    assert pixels.shape[1] > 1500
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        near = abs(pixels - [channel / 255 for channel in colour]).max(axis=-1) < 0.02
        assert near[:, : pixels.shape[1] // 2].sum() > 500  # losses
        assert near[:, pixels.shape[1] * 2 // 3 :].sum() > 200  # bits per byte


# ---- Recipes over seeds --------------------------------------------------------------------------

BITS = {"wide": (2.00, 2.02, 2.01), "<narrow>": (2.30, 2.32, 2.36)}
"""Last bits per byte of each seed, by recipe."""


def seed_bits(final: float, update: int) -> float:
    return final + (100 - update) / 50


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> list[Candidate]:
    """Two recipes with three seeds each, of 100 updates that take a second and 512 tokens each."""
    root = tmp_path_factory.mktemp("seeds")
    store = embedded_store(root)
    found = []
    for recipe, finals in BITS.items():
        for seed, final in enumerate(finals):
            name = f"{recipe}-{seed}"
            spool = MetricSpool(root / name)
            for update in range(1, 101):
                values = {TRAIN_LOSS: final + 1 / update}
                if update % 25 == 0:
                    bits = seed_bits(final, update)
                    values |= {EVAL_BITS: bits, EVAL_LOSS: bits * math.log(2)}
                spool.append(MetricPoint(update, update * 512, update * 1000, values))
            spool.flush()
            tracker = Tracker.start(
                store.uri, "seeds", name, name, artifact_location=store.artifact_location
            )
            width = 64 if recipe == "wide" else 32
            fields = {"model": {"d_model": width}, "training": {"seed": seed}}
            tracker.log_recipe(fields | {"cluster": {"workers": seed}}, "", "")
            tracker.log_corpus("v", "f" * 64, "/c", {}, {"tokens": "integer"}, "evaluation")
            tracker.attach_spool(root / name, lambda points: None)
            run_id = tracker.wait_for_run()
            assert run_id
            assert tracker.finish("FINISHED")
            found.append(Candidate(name, run_id, store.uri))
    return found


@pytest.fixture(scope="module")
def recipes_compared(seeded: list[Candidate]) -> Comparison:
    return compare(seeded)


def test_runs_that_differ_in_the_seed_are_one_column(recipes_compared: Comparison):
    assert difference_table(recipes_compared) == (
        ["parameter", "wide", "<narrow>"],
        [["model.d_model", "64", "32"], ["training.seed", "0, 1, 2", "0, 1, 2"]],
    )
    columns, rows = result_table(recipes_compared)
    assert columns == ["result", "wide", "<narrow>", "difference"]
    table = {row[0]: row[1:] for row in rows}
    assert table["eval/bits_per_byte, last"] == [
        "2.0100 (2.0000 to 2.0200)",
        "2.3267 (2.3000 to 2.3600)",
        "+0.3167",
    ]
    assert table["updates"] == ["100", "100", "+0"]


def test_the_verdict_is_of_the_last_evaluation_that_all_share(
    recipes_compared: Comparison, seeded: list[Candidate]
):
    verdict = recipes_compared.verdict
    assert verdict
    assert (verdict.metric, verdict.update) == (EVAL_BITS, 100)
    assert verdict.values == [pytest.approx(list(BITS[name])) for name in BITS]
    [line] = verdict_lines(recipes_compared)
    assert "<narrow> less wide: +0.3167 exceeds the seed spread (3 and 3 seeds:" in line
    [told] = as_json(recipes_compared)["verdicts"]
    assert told["conclusion"] == Conclusion.EXCEEDS == "exceeds the seed spread"
    assert told["p_adjusted"] < 0.01
    alone = verdict_lines(compare([seeded[0], seeded[3]]))
    assert alone == [
        "eval/bits_per_byte at update 100, <narrow>-0 less wide-0: +0.3000 cannot be told from the"
        " seed spread (1 and 1 seeds: one seed shows no spread)"
    ]


def test_other_validation_texts_and_repeated_seeds_are_warned_of(
    seeded: list[Candidate], candidates: list[Candidate]
):
    assert compare(seeded[:2]).cautions == []
    mixed = compare([seeded[0], candidates[0]])
    assert any("fingerprints differ" in caution for caution in mixed.cautions)
    repeated = compare([seeded[0], Candidate("copy", seeded[0].run_id, seeded[0].uri)])
    assert "copy repeats a seed of wide-0 and is not counted" in repeated.cautions
    assert repeated.verdict is None


@pytest.mark.parametrize(("by", "last"), [("step", 100.0), ("tokens", 51200.0), ("hours", None)])
def test_curves_lie_over_updates_tokens_or_hours(
    seeded: list[Candidate], by: str, last: float | None
):
    comparison = compare(seeded[:1], by)  # pyright: ignore[reportArgumentType]
    curve = comparison.runs[0].curves[EVAL_BITS]
    assert [point.update for point in curve] == [25, 50, 75, 100]
    steps = [after.x - before.x for before, after in itertools.pairwise(curve)]
    if last is None:
        assert steps == [pytest.approx(25 / 3600)] * 3
    else:
        assert curve[-1].x == last
        assert steps == [pytest.approx(last / 4)] * 3


def test_a_query_finds_runs_by_their_parameters(seeded: list[Candidate]):
    uri = seeded[0].uri
    found = find_runs(uri, "seeds", "params.`model.d_model` = '32'")
    assert [one.run_id for one in found] == [one.run_id for one in seeded[3:]]
    assert found[0].datasets == {"evaluation": ["f" * 36]}
    assert len(find_runs(uri, "seeds", "")) == 6
    with pytest.raises(UserError, match="has none of that name"):
        find_runs(uri, "nowhere", "")
    with pytest.raises(UserError, match="MLflow at"):
        find_runs(uri, "seeds", "this is no filter")


def test_the_report_is_one_page_with_figure_verdict_and_every_run(
    recipes_compared: Comparison, seeded: list[Candidate], tmp_path: Path
):
    import xml.etree.ElementTree as ET

    text = page(recipes_compared)
    assert "<narrow>" not in text  # names are escaped
    assert "&lt;narrow&gt; less wide: +0.3167 exceeds the seed spread" in text
    assert all(one.run_id in text for one in seeded)
    assert not any(mark in text for mark in ("<script", "src=", "url(http"))
    figure = text[text.index("<svg") : text.index("</svg>") + len("</svg>")]
    assert ET.fromstring(figure).tag.endswith("svg")
    plot(recipes_compared, tmp_path / "seeds.png")
    from matplotlib.image import imread

    assert imread(tmp_path / "seeds.png").shape[1] == 2100


def test_a_band_reaches_from_the_least_to_the_most_seed(recipes_compared: Comparison):
    from jobs.comparison.figure import _band, _split

    group = recipes_compared.groups[1]
    curves = [_split(recipes_compared.runs[i].curves[EVAL_BITS]) for i in group.members]
    band = _band(curves)
    assert list(band.x) == [25, 50, 75, 100]
    assert band.least.tolist() == pytest.approx([seed_bits(2.30, u) for u in (25, 50, 75, 100)])
    assert band.most.tolist() == pytest.approx([seed_bits(2.36, u) for u in (25, 50, 75, 100)])
    # Of other x each: only where all of them are, and on the lines between their points.
    shifted = [(x + shift, y) for shift, (x, y) in enumerate(curves)]
    band = _band(shifted)
    assert (band.x[0], band.x[-1]) == (27, 100)
    assert band.least[-1] == pytest.approx(seed_bits(2.30, 100))
