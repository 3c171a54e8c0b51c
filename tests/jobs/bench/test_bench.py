"""`tvq bench`: what it measures, how it counts, what it prints. No time is asserted."""

import json
import re
from dataclasses import replace

import jax.numpy as jnp
import pytest

from jobs.bench import measurement
from jobs.bench.measurement import Program, Spread, compare
from jobs.cli.bench import bench
from jobs.cli.main import run_cli
from jobs.console import Console
from jobs.errors import ExitCode
from model.config import PRESETS
from model.counts import flops_per_token

SIZES = {"n_layers": 1, "d_model": 16, "d_key": 8, "d_value": 16, "n_codes": 8, "window": 16}
TOY = tuple(f"model.{name}={value}" for name, value in SIZES.items())
QUICK = ("--rounds", "2", "--seconds", "0")


@pytest.fixture(autouse=True)
def small_peak(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measurement, "PEAK_SIZE", 64)


@pytest.mark.compiles
@pytest.mark.slow
def test_json_has_every_form_at_every_length(capsys):
    command = (
        "bench",
        "train",
        "small",
        *TOY,
        "--lengths",
        "32,64",
        "--forms",
        "serial,full-dense",
    )
    assert run_cli([*command, *QUICK, "--update-length", "32", "--json"]) == ExitCode.OK
    tree = json.loads(capsys.readouterr().out)
    assert (tree["bench"], tree["name"], tree["baseline"]) == ("train", "small", "serial")
    assert (tree["rounds"], tree["clock"]) == (2, "wall")
    assert (tree["batch_size"], tree["update_length"]) == (1, 32)
    assert tree["peak"] == "64x64x64 float32"
    assert tree["model"]["d_key"] == 8
    names = [(each["length"], each["form"]) for each in tree["results"]]
    assert names == [(32, "serial"), (32, "full-dense"), (64, "serial"), (64, "full-dense")]
    serial = replace(PRESETS["small"], **SIZES)
    full = replace(serial, quantized_keys=False, attention_form="dense")
    for each in tree["results"]:
        assert each["fits"]
        model = serial if each["form"] == "serial" else full
        flops = flops_per_token(model, each["length"])
        assert each["flops_per_token"] == flops
        assert each["flops_ratio"] == flops / flops_per_token(serial, each["length"])
        rate, gflops = each["tokens_per_second"], each["gflops"]
        assert 0 < rate["least"] <= rate["median"] <= rate["greatest"]
        assert gflops["median"] == pytest.approx(rate["median"] * flops / 1e9)
        assert each["memory_bytes"] > 0
        assert each["compile_seconds"] > 0
    assert tree["results"][0]["ratio"] == {"median": 1, "least": 1, "greatest": 1}


@pytest.mark.compiles
def test_table_is_plain_and_says_what_was_measured(capsys):
    command = ("bench", "attention", "small", *TOY, "--lengths", "32", "--forms", "dense,parallel")
    assert run_cli([*command, *QUICK]) == ExitCode.OK
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "== bench attention" in text
    assert re.search(
        r"model     small: 1 layers, d_model 16, .* codes 8, window 16, block 16", text
    )
    assert "one layer, forward and backward, batch 1 x T" in text
    assert "median of 2 rounds" in text
    header = next(line for line in text.splitlines() if line.lstrip().startswith("T "))
    for column in ("tokens/s", "x dense", "FLOPs x dense", "% of peak", "memory", "compile s"):
        assert column in header
    assert re.search(r"^32  dense +[\d,]+ .* 1\.00 .*%", text, re.MULTILINE)
    assert re.search(r"^32  parallel +[\d,]+ .*%", text, re.MULTILINE)
    assert re.search(r"^peak: .* GFLOP/s .* 64x64x64 float32 product", text, re.MULTILINE)


@pytest.mark.compiles
def test_what_does_not_fit_is_not_run(capsys, monkeypatch):
    monkeypatch.setattr(measurement, "_available_bytes", lambda: 1)
    command = ("bench", "attention", "small", *TOY, "--lengths", "32", "--forms", "serial")
    assert run_cli([*command, *QUICK]) == ExitCode.OK
    assert re.search(r"serial at 32 does not fit: needs 0.0 GiB, 0.0 GiB", capsys.readouterr().out)
    assert run_cli([*command, *QUICK, "--json"]) == ExitCode.OK
    [result] = json.loads(capsys.readouterr().out)["results"]
    assert result["fits"] is False
    assert "tokens_per_second" not in result


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("smal",), "recipe smal: unknown (did you mean small?); expected one of"),
        (("./none.yaml",), "no such file"),
        (("small", "--forms", "serial,seral"), "unknown form 'seral'; expected some of serial,"),
        (("small", "--forms", "serial,serial"), "expected each once"),
        (("small", "--lengths", "2k"), "--lengths: expected numbers of tokens"),
        (("small", "--lengths", "0"), "--lengths: expected numbers of tokens"),
        (("small", "--lengths", "64", "--update-length", "48"), "the nearest is 32"),
        (("small", "model.d_kye=8"), "did you mean d_key?"),
        (("small", "d_key=8"), "expected section.field=value"),
        (("small", "model.n_heads=3", "model.n_kv_heads=2"), "model.n_kv_heads: must divide"),
    ],
)
def test_mistake_is_one_line(capsys, arguments, expected):
    assert run_cli(["bench", "train", *arguments]) == ExitCode.USER
    output = capsys.readouterr()
    assert output.out == ""
    [line] = output.err.splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_examples_in_the_help_parse(capsys):
    for name, command in bench.commands.items():
        assert run_cli(["bench", name, "--help"]) == ExitCode.OK
        examples = re.findall(rf"^ +tvq bench {name}(.*)$", capsys.readouterr().out, re.MULTILINE)
        assert examples
        options = {option for item in command.params for option in item.opts}
        for example in examples:
            assert {word for word in example.split() if word.startswith("-")} <= options, example


# ---- Measuring -----------------------------------------------------------------------------------


def doubling(form: str, length: int, size: int = 4) -> Program:
    """A program that counts its calls, and doubles `size` numbers."""
    return Program(
        form=form,
        length=length,
        tokens=10 * length,
        flops_per_token=1000,
        function=lambda state, inputs: (state + 1, 2 * inputs),
        begin=lambda: (jnp.zeros(()), jnp.ones(size)),
    )


def test_programs_alternate_and_are_compared_round_by_round(monkeypatch):
    speeds = {
        ("a", 1): [4.0, 2.0, 8.0],
        ("b", 1): [8.0, 6.0, 8.0],
        ("a", 2): [1.0, 1.0, 1.0],
        ("b", 2): [0.5, 0.25, 3.0],
    }
    left, order = {name: list(times) for name, times in speeds.items()}, []

    def rate(runner):
        name = (runner.program.form, runner.program.length)
        order.append(name)
        return left[name].pop(0)

    peaks = [10.0, 20.0, 40.0, 50.0, 10.0, 20.0]
    gflops = iter([0.0, *peaks])  # its first call warms up
    monkeypatch.setattr(measurement._Runner, "tokens_per_second", rate)
    monkeypatch.setattr(measurement.Peak, "gflops", lambda peak: next(gflops))
    programs = [doubling(form, length) for length in (1, 2) for form in ("a", "b")]
    found = compare(programs, rounds=3, seconds=0, dtype="float32", console=Console(quiet=True))

    assert order == 3 * [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert found.peak_gflops == Spread(20, 10, 50)
    a, b, _, far = (each.speed for each in found.measured)
    assert a is not None
    assert b is not None
    assert far is not None
    assert b.tokens_per_second == Spread(8, 6, 8)
    assert a.ratio == Spread(1, 1, 1)
    assert b.ratio == Spread(2, 1, 3)
    assert far.ratio == Spread(0.5, 0.25, 3)
    assert b.gflops.median == pytest.approx(8e-6)
    # Peaks before length 1 were 10, 40 and 10: 8/10, 6/40 and 8/10 of 1e-6.
    assert b.percent_of_peak.median == pytest.approx(100 * 0.8e-6)
    assert b.percent_of_peak.least == pytest.approx(100 * 0.15e-6)


def test_memory_is_arguments_and_results_with_donated_ones_once():
    size = 1 << 18
    programs = [doubling("a", 1, size)]
    found = compare(programs, rounds=1, seconds=0, dtype="float32", console=Console(quiet=True))
    [measured] = found.measured
    assert 8 * size < measured.memory_bytes < 8 * size + 100


def test_without_a_first_that_fits_there_is_no_ratio(monkeypatch):
    monkeypatch.setattr(measurement, "_available_bytes", lambda: 1 << 16)
    programs = [doubling("large", 1, 1 << 18), doubling("little", 1)]
    found = compare(programs, rounds=1, seconds=0, dtype="float32", console=Console(quiet=True))
    large, little = found.measured
    assert large.speed is None
    assert little.speed is not None
    assert little.speed.ratio is None


def test_short_programs_are_repeated():
    [measured] = compare(
        [doubling("a", 1)], rounds=1, seconds=0.01, dtype="float32", console=Console(quiet=True)
    ).measured
    assert measured.speed is not None
    assert measured.speed.calls > 1
