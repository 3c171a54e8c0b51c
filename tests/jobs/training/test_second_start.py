"""A training with a profile and a compile cache, and the same again: nothing is compiled."""

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jobs import recipe as recipes
from jobs.checkpoints.manifest import complete_checkpoints
from jobs.runs.lease import Lease
from jobs.runs.run_directory import RunDirectory
from jobs.training import loop
from jobs.training.loop_contract import LoopSettings
from tests.micro import write_micro

pytestmark = [pytest.mark.compiles, pytest.mark.slow]
HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


class Started(NamedTuple):
    run: RunDirectory
    events: Counter[str]


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Started]]:
    """Two runs of the same recipe, the second without anything compiled in this process."""
    folder = tmp_path_factory.mktemp("second start")
    write_micro(folder)
    recipe = recipes.load(
        str(folder / "micro.yaml"),
        (
            f"data.corpus={folder / 'corpus'}", f"cluster.compile_cache={folder / 'compiled'}",
            "training.steps=16", "training.evaluate_every=8", "training.profile=[4,7]",
        ),
    )  # fmt: skip
    recipe, events, found = recipes.resolve(recipe), Counter[str](), []

    def listen(event: str, **_: object) -> None:
        events[event] += 1

    jax.monitoring.register_event_listener(listen)
    before = jax.config.values["jax_compilation_cache_dir"]
    for name in ("one", "two"):
        jax.clear_caches()
        events.clear()
        run = RunDirectory.at(folder / "runs", name)
        run.claim("identity", {}, recipes.to_yaml(recipe))
        with Lease(run).held() as lease:
            loop.train(LoopSettings(run.location, recipe, lease.owner))
        found.append(Started(run, Counter(events)))
    yield found
    jax.monitoring.unregister_event_listener(listen)
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def test_a_second_start_compiles_nothing_and_computes_the_same(starts: list[Started]):
    one, two = starts
    assert one.events[MISS] > 3, "the step, the evaluation, the initial state, the sums"
    assert two.events[MISS] == 0
    assert two.events[HIT] >= one.events[MISS]
    sums = [[manifest.sums for manifest in complete_checkpoints(each.run)] for each in starts]
    assert sums[0] == sums[1]


def test_the_profile_holds_the_updates_asked_for(starts: list[Started]):
    """A batch is two updates: those of updates 3 and 4, 5 and 6, 7 and 8, as steps of the trace."""
    profile = starts[0].run.path / "profile"
    [spaces] = profile.glob("plugins/profile/*/*.xplane.pb")
    assert spaces.stat().st_size > 10_000
    [trace] = profile.glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [e for e in events if e.get("name", "").startswith("train")]
    assert sorted(int(e["args"]["step_num"]) for e in steps) == [4, 6, 8]
