"""`tvq plan --attention`: a layer with each form of attention, compiled."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from jobs import recipe as recipes
from jobs.console import Console
from jobs.planning.attention import FormsCompared, compare_forms
from jobs.planning.chips import read_target
from model.counts import flops_per_token, flops_per_update
from tests.micro import RECIPE

LENGTHS = (256, 512)


def compared(folder: Path, on: str, monkeypatch: pytest.MonkeyPatch) -> FormsCompared:
    """The forms for the smallest recipe; what its layer multiplies is checked."""
    monkeypatch.setenv("TVQ_PLAN_CACHE", str(folder))
    path = folder / "micro.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    micro = recipes.resolve(recipes.load(str(path)))
    forms = compare_forms(
        micro, read_target(on), LENGTHS, limit_seconds=1500, console=Console(quiet=True)
    )
    one = dataclasses.replace(micro.model, n_layers=1)
    two = dataclasses.replace(micro.model, n_layers=2)
    for length in LENGTHS:
        layer = flops_per_token(two, length) - flops_per_token(one, length)
        # Its gradients need no product of the output's projection but their own.
        layer -= 2 * one.d_model * one.d_value * one.n_heads
        for form in ("serial", "parallel"):
            per_token = forms.of(form, length).flops_per_token
            assert per_token == layer + flops_per_update(one) / length
    return forms


def test_a_layer_multiplies_what_the_formula_says_less_its_own_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compared(tmp_path, "cpu:1", monkeypatch)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: `pip install 'tvq[plan]'`",
)
@pytest.mark.timeout(1800)
def test_dense_attention_on_a_tpu_costs_more_the_longer_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    forms = compared(tmp_path, "v5e:1x1", monkeypatch)
    shorter, longer = (forms.of("full-chunked", length).flops_per_token for length in LENGTHS)
    assert shorter
    assert longer
    assert longer > 1.3 * shorter
