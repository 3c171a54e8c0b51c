"""A micro run trained in this process, without MLflow: what tests of stored runs begin with."""

from pathlib import Path

from jobs import recipe as recipes
from jobs.checkpoints import init_from
from jobs.recipe import Recipe
from jobs.runs import run_log
from jobs.runs.lease import Lease
from jobs.runs.run_directory import RunDirectory
from jobs.training import loop
from jobs.training.loop_contract import LoopSettings
from pipeline.manifest import SPLITS
from pipeline.mixture import Mixture
from pipeline.storage import Location


def micro_recipe(folder: Path, *overrides: str) -> Recipe:
    """That of `write_micro` in `folder`, resolved."""
    corpus = f"data.corpus={folder / 'corpus'}"
    return recipes.resolve(recipes.load(str(folder / "micro.yaml"), (corpus, *overrides)))


def train_micro(
    folder: Path, name: str, *overrides: str, root: Location | None = None
) -> RunDirectory:
    """Trains run `name` under `root`; None: `<folder>/runs`."""
    run = RunDirectory.at(root or folder / "runs", name)
    asked = init_from.settle(micro_recipe(folder, *overrides), None, run.root)
    recipe, origin = init_from.look_up(asked, run.root)
    mixture = Mixture.load(recipe.data.corpora)
    fingerprints = {split: mixture.fingerprint(split) for split in SPLITS}
    run.claim(recipes.identity(recipe), fingerprints, recipes.to_yaml(recipe), origin)
    with Lease(run).held() as lease:
        loop.train(LoopSettings(run.location, recipe, lease.owner))
    run_log.close_log()
    return run
