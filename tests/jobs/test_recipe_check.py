"""Fields that cannot go together: the one to change is named, with a value that is accepted."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import UserError
from jobs.recipe import load
from tests.jobs.refused_recipe import BASE, refusal


def test_operational_fields_that_cannot_work_are_refused():
    assert load("tiny", ("training.profile=[3,5]",)).training.profile == (3, 5)
    for value in ("[5,3]", "[0,1]"):
        assert "training.profile: expected the first" in refusal(f"training.profile={value}")
    for value in ("[1]", "7", "[1,2,3]"):
        assert "training.profile" in refusal(f"training.profile={value}")
    assert "cluster.compile_cache: must be a fold" in refusal("cluster.compile_cache=gs://b/c")
    assert "model.remat_keeps: products is" in refusal("model.remat_keeps=products")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.steps=401"], "training.steps: .* multiple of 2, got 401; the nearest is 400"),
        (["checkpoint.every=1"], "checkpoint.every: .* got 1; the nearest is 2"),
        (
            ["training.update_length=64", "training.evaluate_every=101"],
            "training.evaluate_every: .* multiple of 8, got 101; the nearest is 104",
        ),
        (["training.update_length=300"], "training.update_length: .* got 300; the nearest is 256"),
        (["training.update_length=9999"], "training.update_length: .* the nearest is 512"),
        (["training.update_length=0"], "training.update_length: must be at least 1, got 0"),
        (["training.steps=40"], r"training.steps: must be more than optimizer.warmup_steps \(40\)"),
        (["training.steps=0"], "training.steps: must be more than"),
        (["optimizer.schedule_steps=40"], "optimizer.schedule_steps: must be more than"),
        (["training.batch_size=0"], "training.batch_size: must be at least 1, got 0"),
        (["training.seed=-1"], "training.seed: must be at least 0, got -1"),
        (["training.seed=4294967296"], "training.seed: must be at most 4294967295"),
        (["data.sequence_length=0"], "data.sequence_length: must be at least 1"),
        (["data.shuffle_span=0"], "data.shuffle_span: must be at least 1, got 0"),
        (["cluster.workers=-1"], "cluster.workers: must be at least 0"),
        (["cluster.workers=[0,2]"], "cluster.workers: must be at least 1"),
        (["cluster.workers=[2,1]"], r"cluster.workers: \[least, most\]"),
        (["cluster.data=0"], "cluster.data: must be at least 1, or -1"),
        (["cluster.fsdp=3"], "cluster.workers: each brings one device"),
        (["cluster.data=1"], "cluster.workers: each brings one device"),
        (["checkpoint.keep=0"], "checkpoint.keep: must be at least 1"),
        (["model.d_model=31"], "model.d_model: must be even"),
        (["model.window=0"], "model.window: must be at least 1"),
        (["model.codebook_decay=1"], r"model.codebook_decay: must be in \[0, 1\)"),
        (["optimizer.learning_rate=.nan"], "optimizer.learning_rate: must be"),
        (["optimizer.weight_decay=.inf"], "optimizer.weight_decay: must be finite"),
        (["model.commitment_weight=.inf"], "model.commitment_weight: must be finite"),
    ],
)
def test_an_impossible_combination_names_the_field_and_a_valid_value(
    overrides: list[str], expected: str
):
    message = refusal(*BASE, *overrides)
    assert message.startswith("recipe tiny: ")
    assert re.search(expected, message), message


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_the_value_that_a_refusal_names_is_the_nearest_that_is_accepted(
    per_batch: int, update_length: int, every: int
):
    cut = (
        *BASE,
        f"data.sequence_length={per_batch * update_length}",
        f"training.update_length={update_length}",
        f"training.steps={per_batch * 100}",
        f"training.evaluate_every={per_batch}",
        "optimizer.warmup_steps=0",
    )
    try:
        load("tiny", (*cut, f"checkpoint.every={every}"))
        assert every % per_batch == 0
    except UserError as error:
        named = int(str(error).rpartition(" ")[2])
        assert load("tiny", (*cut, f"checkpoint.every={named}")).checkpoint.every == named
        valid = (n * per_batch for n in range(1, 302))
        assert abs(named - every) == min(abs(value - every) for value in valid)
