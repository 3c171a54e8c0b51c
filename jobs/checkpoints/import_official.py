"""`tvq import`: a checkpoint of the official code becomes a finished run."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import recipe as recipes
from jobs.checkpoints.manifest import complete_checkpoints
from jobs.console import Console
from jobs.errors import UserError
from jobs.recipe import CheckpointConfig, DataConfig, Recipe, TrainingConfig
from jobs.runs.lease import Fence, Lease
from jobs.runs.run_directory import RunDirectory
from model.config import OptimizerConfig
from pipeline.manifest import SPLITS, Manifest
from pipeline.storage import Location
from pipeline.tokenizers import ByteTokenizer, ImageTokenizer

if TYPE_CHECKING:
    from model.official import Imported

_BYTES = (ByteTokenizer.kind, ImageTokenizer.kind)
"""Tokenizers of the official numbers: pad 0, eos 1, unk 2, byte b is b + 3."""
_TOKENIZERS = {"enwik8": ByteTokenizer.kind, "imagenet64": ImageTokenizer.kind}
"""By the official script's data set."""


def import_command(
    checkpoint: Path,
    *,
    flags: Path,
    corpus: Path,
    root: Location,
    name: str,
    console: Console,
    as_json: bool = False,
) -> RunDirectory:
    """Makes run `name` of the official `checkpoint` and its script's `flags`, a JSON file.

    The corpus gives the tokenizer, which the checkpoint does not have, and the text to evaluate on.
    The run has ended at the checkpoint's update, so that `tvq sample` and `tvq evaluate` read it as
    any other. Its optimizer state is a new one: the official one is not read.

    Raises:
        UserError, ConfigError, CorpusError: a file that cannot be read, a flag or leaf that does
            not fit, a corpus of other tokens, or a run of that name.
    """
    from model.official import read_checkpoint

    run = RunDirectory.at(root, name)
    if complete_checkpoints(run):  # one without was not imported to its end
        raise _taken(run)
    corpus = corpus.expanduser().absolute()
    manifest = Manifest.load(corpus)
    stated = _read("--flags", flags).decode("utf-8", errors="replace")
    imported = read_checkpoint(_read("CHECKPOINT", checkpoint), stated)
    recipe = _recipe(imported, json.loads(stated), corpus, manifest)
    save_as_run(
        run,
        recipe,
        network=imported.network,
        updates=imported.updates,
        fingerprints={split: manifest.splits[split].fingerprint for split in SPLITS},
    )

    if as_json:
        console.json({"run": run.name, "path": run.location, "update": imported.updates})
        return run
    console.line(
        f"imported update {imported.updates:,} as run {run.location}; its optimizer state is not"
        " imported"
    )
    if manifest.tokenizer.kind not in _BYTES:
        console.warning(
            f"the {manifest.tokenizer.kind} tokenizer of {corpus} has as many ids as the"
            " checkpoint; that they are the same ones cannot be seen in it"
        )
    return run


def _recipe(
    imported: "Imported", flags: dict[str, Any], corpus: Path, manifest: Manifest
) -> Recipe:
    """How the checkpoint was trained, as far as a recipe can say it."""
    kind, ids = manifest.tokenizer.kind, manifest.tokenizer.vocab_size
    if imported.model.vocab_size != ids:
        raise UserError(
            f"--corpus {corpus}: its tokenizer ({kind}) has {ids} ids, the checkpoint"
            f" {imported.model.vocab_size}; give a corpus of the tokens that it was trained on"
        )
    wanted = _TOKENIZERS.get(flags.get("dataset", ""))
    if wanted not in (None, kind):
        raise UserError(
            f"--corpus {corpus}: its tokenizer is {kind}, and {flags['dataset']} needs {wanted};"
            " give a corpus of the tokens that the checkpoint was trained on"
        )
    length, update_length, batch_size = (
        _positive(flags, flag) for flag in ("sequence_len", "update_len", "global_batch_size")
    )
    updates = imported.updates
    if length % update_length or not 1 <= updates < 2**31 or updates % (length // update_length):
        raise UserError(
            f"official checkpoint: step must be one or more times the sequence_len / update_len"
            f" updates of a batch, got {updates} and {length} / {update_length}"
        )
    recipe = Recipe(
        data=DataConfig(
            corpus=str(corpus),
            sequence_length=length,
            window="document" if kind == ImageTokenizer.kind else "stream",
        ),
        model=imported.model,
        optimizer=imported.optimizer or OptimizerConfig(schedule="constant"),
        training=TrainingConfig(
            steps=updates,
            batch_size=batch_size,
            update_length=update_length,
            evaluate_every=updates,
        ),
        checkpoint=CheckpointConfig(every=updates),
    )
    where = "the recipe of these flags"
    return recipes.resolve(recipes.from_yaml(recipes.to_yaml(recipe), where))


def save_as_run(
    run: RunDirectory,
    recipe: Recipe,
    *,
    network: tuple[Any, Any],
    updates: int,
    fingerprints: dict[str, str],
) -> None:
    """Claims the run and saves parameters and codebooks, as a training does at its end.

    Raises:
        UserError: there is a run of that name.
    """
    import jax

    from jobs.checkpoints.writer import CheckpointWriter
    from model.training import initial_state

    identity, text = recipes.identity(recipe), recipes.to_yaml(recipe)
    if run.claim(identity, fingerprints, text).identity != identity:
        raise _taken(run)
    per_batch = recipe.updates_per_batch

    @jax.jit  # which never makes the initial values that the imported ones replace
    def state_of(params: Any, codebooks: Any) -> Any:
        state = initial_state(recipe.model, recipe.optimizer, recipe.training.seed)
        return state._replace(
            params=params,
            codebooks=codebooks,
            updates=state.updates + updates,
            batches=state.batches + updates // per_batch,
        )

    with Lease(run).held() as lease:
        if complete_checkpoints(run):
            raise _taken(run)
        fence = Fence(run, lease.owner)
        fence.raise_over_others()
        writer = CheckpointWriter(
            run, fence, keep=recipe.checkpoint, recipe=text, fingerprints=fingerprints
        )
        try:
            writer.save(
                state_of(*network),
                update=updates,
                next_batch=updates // per_batch,
                # As if none had been padding: how many were is not in the checkpoint.
                tokens=updates * recipe.training.batch_size * recipe.training.update_length,
                last=True,
            )
        finally:
            writer.close()


def _taken(run: RunDirectory) -> UserError:
    return UserError(f"run {run.name}: exists already; choose another name with --run")


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read: {error.strerror}") from None


def _positive(flags: dict[str, Any], name: str) -> int:
    value = flags.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"official flag {name}: must be a whole number from 1, got {value!r}")
    return value
