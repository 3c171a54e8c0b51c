"""Whether recipes differ by more than their seeds do, against scipy and by hand."""

import math
import random
from typing import Any

import pytest
from scipy import stats

from jobs.comparison.seed_groups import group_by_recipe
from jobs.comparison.seed_spread import Conclusion, seed_verdicts

LOW, HIGH = [1.0, 1.1, 1.2], [2.0, 2.2, 2.1]


@pytest.mark.parametrize("sizes", [(3, 3), (3, 5), (8, 4)])
def test_the_test_is_welchs(sizes: tuple[int, int]):
    draws = random.Random(sum(sizes))
    for _ in range(20):
        first = [draws.gauss(2, 0.1) for _ in range(sizes[0])]
        other = [draws.gauss(2.1, 0.4) for _ in range(sizes[1])]
        [verdict] = seed_verdicts(first, [other])
        expected: Any = stats.ttest_ind(other, first, equal_var=False)
        assert verdict.welch
        assert verdict.welch.t == pytest.approx(expected.statistic)
        assert verdict.welch.degrees == pytest.approx(expected.df)
        assert verdict.welch.p == verdict.p_adjusted == pytest.approx(expected.pvalue)
        assert verdict.difference == pytest.approx(sum(other) / sizes[1] - sum(first) / sizes[0])


def test_equal_recipes_are_seldom_said_to_differ():
    draws = random.Random(0)
    exceeds = 0
    for _ in range(1000):
        first, other = ([draws.gauss(0, 1) for _ in range(4)] for _ in range(2))
        exceeds += seed_verdicts(first, [other])[0].conclusion is Conclusion.EXCEEDS
    assert 5 < exceeds < 55  # at most 5%, and three standard deviations less than certain of it


@pytest.mark.parametrize(
    ("first", "other", "conclusion", "said"),
    [
        (LOW, HIGH, Conclusion.EXCEEDS, "the ranges are apart; Welch's t = "),
        (LOW, [1.05, 1.15, 1.12], Conclusion.WITHIN, "the ranges overlap; Welch's t = "),
        ([1.0, 1.5, 1.9], [2.0, 2.5, 3.5], Conclusion.OPEN, "the ranges are apart; Welch's t = "),
        (LOW, HIGH[:2], Conclusion.OPEN, "the ranges are apart; a test needs 3 of each"),
        (LOW, [1.05, 2.0], Conclusion.WITHIN, "the ranges overlap; a test needs 3 of each"),
        (LOW, [5.0], Conclusion.OPEN, "one seed shows no spread"),
        ([1.0] * 3, [2.0] * 3, Conclusion.EXCEEDS, "gave the same figure"),
        ([1.0] * 3, [1.0] * 3, Conclusion.WITHIN, "gave the same figure"),
    ],
)
def test_conclusions(first: list[float], other: list[float], conclusion: Conclusion, said: str):
    [verdict] = seed_verdicts(first, [other])
    assert verdict.conclusion is conclusion
    assert said in verdict.why
    assert "confiden" not in verdict.why


def test_means_that_differ_in_ranges_that_overlap_are_left_open():
    first = [0.0 + 0.1 * i for i in range(12)]
    other = [value + 0.6 for value in first]
    [verdict] = seed_verdicts(first, [other])
    assert verdict.welch
    assert verdict.welch.p < 0.01
    assert not verdict.ranges_apart
    assert verdict.conclusion is Conclusion.OPEN


def test_several_recipes_are_adjusted_by_holm():
    others = [[1.31, 1.42, 1.38], HIGH, [1.05, 1.15, 1.12]]
    verdicts = seed_verdicts(LOW, others)
    ps = [verdict.welch.p for verdict in verdicts if verdict.welch]
    smallest, middle, largest = sorted(ps)
    expected = {
        smallest: min(1, 3 * smallest),
        middle: max(3 * smallest, 2 * middle),
        largest: max(3 * smallest, 2 * middle, largest),
    }
    assert [verdict.p_adjusted for verdict in verdicts] == [
        pytest.approx(min(1, expected[p])) for p in ps
    ]
    assert "Holm's of 3 comparisons" in verdicts[0].why


class Run:
    """What grouping asks of a run."""

    def __init__(self, name: str, datasets: dict[str, list[str]] | None = None, **fields: str):
        self.name = name
        self.parameters = {key.replace("__", "."): value for key, value in fields.items()}
        self.datasets = datasets or {"training": ["f"]}


def test_runs_are_grouped_by_all_that_changes_a_result_but_the_seed():
    runs = [
        Run("wide-0", training__seed="0", model__d_model="64", cluster__workers="1"),
        Run("narrow-0", training__seed="0", model__d_model="32", cluster__workers="1"),
        Run("wide-1", training__seed="1", model__d_model="64", cluster__workers="2"),
        Run("wide-1b", training__seed="1", model__d_model="64", cluster__workers="2"),
        Run("longer", training__seed="2", model__d_model="64", training__steps="9"),
        Run("elsewhere", {"training": ["g"]}, training__seed="2", model__d_model="64"),
    ]
    groups = group_by_recipe(runs)
    assert [(group.members, group.repeats) for group in groups] == [
        ([0, 2], [3]),
        ([1], []),
        ([4], []),
        ([5], []),
    ]
    assert [group.name for group in groups] == ["wide", "narrow-0", "longer", "elsewhere"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("books-seed0", "books-seed1"), "books"),
        (("books-s1", "books-s2"), "books"),
        (("lr3-10", "lr3-11"), "lr3"),
        (("books 1", "books 2"), "books"),
        (("x", "y"), "x"),
    ],
)
def test_a_group_is_called_what_its_runs_have_in_common(names: tuple[str, str], expected: str):
    runs = [Run(name, training__seed=str(seed)) for seed, name in enumerate(names)]
    assert [group.name for group in group_by_recipe(runs)] == [expected]


def test_groups_of_one_name_are_told_apart():
    runs = [
        Run(f"a-{seed}{where}", training__seed=str(seed), model__d_model=where)
        for where in "xy"
        for seed in (0, 1)
    ]
    names = [group.name for group in group_by_recipe(runs)]
    assert len(set(names)) == 2
    assert math.prod(name.startswith("a") for name in names)
