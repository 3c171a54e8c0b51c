"""`tvq plan`, for CPU devices; for TPUs where libtpu is there (slow)."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import pytest
from PIL import Image

from jobs import recipe
from jobs.cli.main import run_cli
from jobs.console import Console
from jobs.errors import UserError
from jobs.planning import compilations
from jobs.planning import report as plan_report
from jobs.planning.changes import possible_changes, with_changes
from jobs.planning.chips import CHIPS, devices_of, read_target
from jobs.planning.compilations import compile_for
from jobs.planning.compiler import _program
from jobs.planning.forecast import forecast, refuse_what_does_not_fit
from jobs.planning.plan import Plan, bytes_wanted, plan
from jobs.planning.prices import read_prices
from model.config import ConfigError
from model.counts import parameter_count
from tests.micro import RECIPE, write_micro

pytestmark = pytest.mark.timeout(900)  # three programs are compiled: 27 s of a core


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what the module's tests compile: each program once."""
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(autouse=True)
def in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVQ_PLAN_CACHE", str(cache))


@pytest.fixture(scope="module")
def micro(cache: Path) -> recipe.Recipe:
    path = cache / "micro.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return recipe.resolve(recipe.load(str(path)))


@pytest.fixture
def planned(micro: recipe.Recipe, in_the_cache: None) -> Plan:
    return plan(micro, "cpu:2")


def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks the compiler fails."""
    monkeypatch.setattr(compilations.sys, "executable", "/there is no such python")


# ---- The plan ------------------------------------------------------------------------------------


def test_the_compiled_program_multiplies_what_the_formula_says(planned: Plan):
    assert planned.flops_compiler == planned.flops_formula


def test_memory_is_that_of_the_model_and_adds_up(planned: Plan, micro: recipe.Recipe):
    count = parameter_count(micro.model)
    assert planned.memory["parameters"] == 4 * count.trained
    assert planned.memory["codebooks"] == 4 * count.codebook
    assert planned.memory["optimizer"] >= 2 * 4 * count.trained  # adamw
    train = planned.programs[0]
    assert train.name == "train"
    assert train.needed
    assert sum(planned.memory.values()) == pytest.approx(train.needed, rel=1e-3)
    assert planned.fits


def test_steps_rows_and_checkpoints_are_those_of_the_recipe(planned: Plan, micro: recipe.Recipe):
    assert planned.mesh == {"data": 2, "fsdp": 1, "tensor": 1}
    assert (planned.updates, planned.batches, planned.rows_per_device) == (40, 20, 2)
    assert planned.batch_tokens == 4 * 64
    assert planned.checkpoints_kept == 2
    count = parameter_count(micro.model)
    state = 4 * (3 * count.trained + count.codebook)
    assert state <= planned.checkpoint_bytes < state + 1000


def test_data_parallel_gradients_are_reduced_every_update(planned: Plan, micro: recipe.Recipe):
    """Of two devices, each sends the gradients of all parameters once an update."""
    gradients = 4 * parameter_count(micro.model).trained * micro.updates_per_batch
    assert gradients <= planned.collectives["all-reduce"] < 1.1 * gradients
    assert planned.parameter_collectives == 3 * gradients
    assert not planned.activations_travel
    assert dataclasses.replace(planned, collectives={"x": 13 * gradients}).activations_travel


def test_fsdp_gathers_parameters_and_leaves_activations_where_they_are(micro: recipe.Recipe):
    """Of two devices, each sends its half of the parameters, for either pass at most."""
    split = plan(with_changes(micro, {"cluster.fsdp": 2}), "cpu:2")
    assert split.mesh == {"data": 1, "fsdp": 2, "tensor": 1}
    parameters = 4 * parameter_count(micro.model).trained * micro.updates_per_batch
    assert split.collectives["all-gather"] <= parameters
    assert parameters / 2 < split.collectives["all-reduce"] < 1.1 * parameters
    assert split.flops_compiler == split.flops_formula
    assert not split.activations_travel


def test_hours_and_money_follow_from_the_time_of_a_batch(planned: Plan):
    assert planned.time
    assert planned.hours
    assert planned.hours == pytest.approx(20 * planned.time.total / 3600)
    assert planned.tokens_per_second == pytest.approx(256 / planned.time.total)
    assert max(planned.time[:2]) <= planned.time.total - planned.time.network
    price = read_prices(None)
    assert planned.money
    assert planned.money.devices == pytest.approx(planned.hours * 2 * price.devices["cpu"].price)


def test_of_written_tokens_each_costs_a_round_of_the_loop(planned: Plan, micro: recipe.Recipe):
    """A token reads the parameters of its products, and the caches; what is made once before the
    first one is shared by all."""
    parameters = 4 * parameter_count(micro.model).trained
    assert planned.decode_seconds
    moved = planned.decode_seconds * planned.target.chip.bandwidth
    assert parameters < moved < 20 * parameters
    assert planned.open_loops == 0


def test_the_second_time_the_compiler_is_not_asked(
    planned: Plan, micro: recipe.Recipe, monkeypatch: pytest.MonkeyPatch
):
    without_a_compiler(monkeypatch)
    assert plan(micro, "cpu:2") == planned
    # Fields that make no program ask nothing either; one that does, does.
    renamed = with_changes(micro, {"training.evaluate_windows": 4, "checkpoint.keep": 7})
    assert plan(renamed, "cpu:2").checkpoints_kept == 7
    with pytest.raises(OSError, match="no such python"):
        plan(with_changes(micro, {"training.batch_size": 8}), "cpu:2")


@pytest.mark.parametrize("name", ["train", "decode", "attention serial 64"])
def test_the_compiler_is_told_what_it_is_told_where_the_program_runs(
    name: str, micro: recipe.Recipe, monkeypatch: pytest.MonkeyPatch
):
    def options(platform: str) -> dict[str, str]:
        assert platform == "cpu"
        return {"xla_no_such_option": "1"}

    monkeypatch.setattr("jobs.training.programs.compiler_options", options)
    monkeypatch.setattr("jobs.planning.compiler.compiler_options", options)
    program, arguments, _ = _program(micro, name, jax.devices("cpu")[:1])
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        program.lower(*arguments).compile()


def test_a_gpu_is_planned_with_the_cpus_compiler_and_says_so(
    planned: Plan, micro: recipe.Recipe, monkeypatch: pytest.MonkeyPatch
):
    without_a_compiler(monkeypatch)  # what it said for two CPU devices goes for two GPUs
    gpu = plan(micro, "h100:2")
    assert gpu.flops_compiler == planned.flops_compiler
    assert gpu.traffic is None
    assert any("XLA's compiler for the CPU" in each for each in gpu.assumptions)
    assert gpu.memory_available == pytest.approx(0.75 * CHIPS["h100"].memory, rel=1e-6)
    assert gpu.time
    assert gpu.time.bound in ("matrix products", "network")


def test_what_could_make_it_fit_is_the_least_change_first(planned: Plan, micro: recipe.Recipe):
    assert planned.needed
    tight = dataclasses.replace(planned, memory_available=int(0.9 * planned.needed))
    wanted = list(possible_changes(micro, tight))
    assert wanted[0] == {"cluster.fsdp": 2}  # the state alone is more than a third
    assert wanted[1] == {"cluster.fsdp": 2, "model.remat": True}
    assert wanted[2] == {"cluster.fsdp": 2, "model.remat": True, "training.accumulate": 2}
    changed = with_changes(micro, wanted[2])
    assert (changed.cluster.fsdp, changed.model.remat, changed.training.accumulate) == (2, True, 2)
    assert recipe.identity(changed) == recipe.identity(micro)


@pytest.mark.slow
def test_a_change_that_makes_it_fit_is_compiled_and_fits(
    planned: Plan, micro: recipe.Recipe, monkeypatch: pytest.MonkeyPatch
):
    assert planned.needed
    target = read_target("cpu:2")
    small = target._replace(chip=target.chip._replace(memory=int(0.85 * planned.needed)))
    monkeypatch.setattr("jobs.planning.plan.read_target", lambda text: small)
    refused = plan(micro, "cpu:2")
    assert not refused.fits
    assert refused.changes
    assert refused.changed
    assert refused.changed.fits
    # Again, from the changed recipe alone: what the plan says of it is what it is.
    assert plan(with_changes(micro, refused.changes), "cpu:2").needed == refused.changed.needed


def test_a_recipes_own_cluster_is_planned_for_unless_told_otherwise(micro: recipe.Recipe):
    assert devices_of(micro.cluster) == "cpu:1"
    slice_ = recipe.ClusterConfig(
        accelerator="tpu", accelerator_version="v5e", topology="4x4", workers=4
    )
    assert devices_of(slice_) == "v5e:4x4"
    assert devices_of(recipe.ClusterConfig(workers=(2, 8))) == "cpu:2"  # each holds the most
    for cluster in (
        dataclasses.replace(slice_, workers=8),
        recipe.ClusterConfig(accelerator="gpu", workers=8),
    ):
        with pytest.raises(UserError, match="name the devices"):
            devices_of(cluster)


# ---- What a user does wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on", "said"),
    [
        ("v5e:3x3", "no v5e slice is 3x3"),
        ("v4:2x2", "no v4 slice is 2x2"),
        ("tpu", "expected a TPU slice"),
        ("h100", "h100:NUMBER"),
        ("cpu:0", "cpu:NUMBER"),
        ("cpu:٣", "cpu:NUMBER"),
    ],
)
def test_devices_that_are_none_are_refused(on: str, said: str):
    with pytest.raises(UserError, match=said) as refused:
        read_target(on)
    assert str(refused.value).startswith(f"--on {on}: ")


def test_a_mesh_that_is_not_the_devices_is_refused(micro: recipe.Recipe):
    with pytest.raises(ConfigError, match=r"--on: cpu:2 it is, and .* 1 x 1 x 1 does not make 2"):
        plan(with_changes(micro, {"cluster.data": 1}), "cpu:2")


def test_without_libtpu_the_extra_is_named(micro: recipe.Recipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compilations, "has_libtpu", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'tvq\[plan\]'"):
        plan(micro, "v5e:2x2")


def test_a_compiler_that_takes_too_long_is_ended(micro: recipe.Recipe):
    changed = with_changes(micro, {"training.batch_size": 12})
    with pytest.raises(UserError, match="longer than 1 s and was ended"):
        plan(changed, "cpu:2", limit_seconds=1)


def test_a_mesh_that_the_model_cannot_be_on_is_refused_in_a_line(micro: recipe.Recipe):
    changed = with_changes(micro, {"model.d_model": 18, "cluster.fsdp": 4})
    with pytest.raises(UserError, match=r"cluster.fsdp: must divide 18") as refused:
        plan(changed, "cpu:4")
    assert "\n" not in str(refused.value)


def test_prices_of_ones_own_are_taken(planned: Plan, micro: recipe.Recipe, tmp_path: Path):
    text = (Path(compilations.__file__).parent / "prices.yaml").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("cpu: {price: 0.05", "cpu: {price: 0.10"), encoding="utf-8")
    dear = plan(micro, "cpu:2", prices=path)
    assert dear.money
    assert planned.money
    assert dear.money.devices == pytest.approx(2 * planned.money.devices)


def test_the_compilers_words_are_read():
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 22.31G of 15.75G hbm."
    assert bytes_wanted(said) == int(22.31 * 2**30)
    said = "RESOURCE_EXHAUSTED: the total memory required (335.31G) exceeds available HBM (31.25G)."
    assert bytes_wanted(said) == int(335.31 * 2**30)
    assert bytes_wanted("RESOURCE_EXHAUSTED: something else") is None


# ---- The command ---------------------------------------------------------------------------------


def test_the_command_prints_json_draws_and_ends_with_0(
    planned: Plan, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    picture = tmp_path / "plan.png"
    recipe_file = str(cache / "micro.yaml")
    code = run_cli(
        ["plan", recipe_file, "--on", "cpu:2,h100:2", "--json", "--figure", str(picture)]
    )
    printed = json.loads(capsys.readouterr().out)
    assert code == 0
    assert [each["on"] for each in printed["plans"]] == ["cpu:2", "h100:2"]
    assert printed["plans"][0]["flops_per_batch_compiler"] == planned.flops_compiler
    assert printed["cheapest"] in ("cpu:2", "h100:2")
    with Image.open(picture) as image:
        assert image.size[0] == 1500
        assert len(image.convert("RGB").getcolors(2**24) or []) > 10


def test_the_command_prints_tables_with_the_cheapest(
    planned: Plan, cache: Path, capsys: pytest.CaptureFixture[str]
):
    assert run_cli(["plan", str(cache / "micro.yaml"), "--on", "cpu:2,h100:2"]) == 0
    printed = capsys.readouterr().out
    assert "fits: " in printed
    assert "operations of a batch by the compiler" in printed
    [last] = [line for line in printed.splitlines() if line.startswith("cheapest: ")]
    assert plan_report.cheapest([planned]) == planned
    assert "(estimates)" in last


def test_what_does_not_fit_is_refused_with_the_change_that_fits(planned: Plan):
    assert planned.needed
    small = dataclasses.replace(
        planned,
        programs=[each._replace(fits=False) for each in planned.programs],
        changes={"training.accumulate": 2, "model.remat": True},
        changed=planned,
    )
    from jobs.planning.command import _fix

    assert _fix([small]) == "on cpu:2 it fits with training.accumulate=2 model.remat=true"
    assert plan_report.cheapest([small]) == planned
    _, [row] = plan_report.comparison_table([small])
    assert row[1] == "with training.accumulate=2 model.remat=true"


def test_a_dry_run_says_what_the_compiler_has_said(
    planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    without_a_compiler(monkeypatch)
    write_micro(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = ["train", "micro.yaml", "data.corpus=corpus", "cluster.workers=2", "--dry-run"]
    assert run_cli([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["plan"]
    assert (told["fits"], told["memory_needed_bytes"]) == (True, planned.needed)
    assert run_cli(command) == 0
    assert "plan        cpu:2: fits, " in capsys.readouterr().out
    # Another program, of which nothing is known: it is said, and nothing is compiled.
    assert run_cli([*command, "training.batch_size=8"]) == 0
    assert "plan        of cpu:2 not made yet: `tvq plan`" in capsys.readouterr().out


def test_what_is_known_not_to_fit_is_not_submitted(
    planned: Plan, micro: recipe.Recipe, monkeypatch: pytest.MonkeyPatch
):
    without_a_compiler(monkeypatch)
    two = with_changes(micro, {"cluster.workers": 2})
    console = Console(quiet=True)
    refuse_what_does_not_fit(forecast(two, console, compiles=True).plan)
    refuse_what_does_not_fit(None)
    assert planned.needed
    target = read_target("cpu:2")
    small = target._replace(chip=target.chip._replace(memory=planned.needed - 1))
    monkeypatch.setattr("jobs.planning.plan.read_target", lambda text: small)
    with pytest.raises(UserError, match=r"cpu:2: does not fit, needs .*; nothing was sent"):
        refuse_what_does_not_fit(forecast(two, console, compiles=True).plan)


# ---- TPUs that are not there ---------------------------------------------------------------------

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: `pip install 'tvq[plan]'`",
)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.timeout(1800)
def test_a_tpu_program_multiplies_what_the_formula_says(micro: recipe.Recipe):
    made = plan(micro, "v5e:2x2")
    assert made.fits
    assert made.flops_compiler == made.flops_formula
    assert made.memory["parameters"] == 4 * parameter_count(micro.model).trained
    assert made.collectives["all-reduce"] > 0


@pytest.mark.slow
@needs_libtpu
@pytest.mark.timeout(1800)
def test_what_is_too_large_for_a_tpu_is_refused_in_the_compilers_words(micro: recipe.Recipe):
    changed = with_changes(micro, {"model.d_model": 65536, "model.vocab_size": 65536})
    compiled = compile_for(
        changed, read_target("v5e:1x1"), ["evaluate"], limit_seconds=1500,
        console=Console(quiet=True),
    )["evaluate"]  # fmt: skip
    assert compiled.facts.error
    wanted = bytes_wanted(compiled.facts.error)
    assert wanted
    assert wanted > 4 * 65536 * 65536 > CHIPS["v5e"].memory


@pytest.mark.slow
@needs_libtpu
@pytest.mark.timeout(1800)
def test_what_does_not_fit_a_tpu_is_refused_with_a_change_that_fits():
    enwik8 = recipe.resolve(recipe.load("enwik8", ("model.remat=false",)))
    refused = plan(enwik8, "v5e:2x4")
    assert not refused.fits
    assert refused.needed
    assert refused.needed > CHIPS["v5e"].memory
    assert refused.changes == {"model.remat": True}
    assert refused.changed
    assert refused.changed.fits
    # The recipe as it is published.
    assert plan(recipe.resolve(recipe.load("enwik8")), "v5e:2x4") == refused.changed
