"""`tvq register`: a checkpoint as a version of a model, which no retention touches."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from jobs import recipe as recipes
from jobs.checkpoints.init_from import network_sums
from jobs.checkpoints.manifest import CheckpointManifest, manifest_of
from jobs.errors import UserError
from jobs.lineage.provenance import noted_starts
from jobs.registry.announcement import announce, reconcile, tracking_uri
from jobs.registry.registered_model import FORMAT_VERSION, ModelFolder, ModelVersion
from jobs.runs.run_directory import RunDirectory, RunRecord
from model.counts import parameter_count
from pipeline.manifest import Manifest, tokenizer_of
from pipeline.storage import Store


class Registered(NamedTuple):
    """A version, and whether it was there before."""

    version: ModelVersion
    location: str
    """Its folder."""
    reused: bool


def register(run: RunDirectory, name: str, *, update: int | None = None) -> Registered:
    """Copies a checkpoint's weights, recipe and tokenizer, and registers them with MLflow.

    Args:
        run: the run; its corpus must be there, for the tokenizer.
        name: of the model.
        update: which checkpoint; None: the newest.

    Returns:
        The version; the one that is there if this checkpoint is registered under the name already.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or MLflow or the store does not
            answer; the same command goes on.
    """
    from jobs.tracking import registry as mlflow_registry

    folder = ModelFolder(run.root, name)
    manifest = manifest_of(run, update)
    record = run.record()
    assert record is not None, "a run with checkpoints was claimed"
    uri = tracking_uri(record.tracking_uri, run.root)
    with folder.lease():
        reconcile(folder, uri)
        versions = folder.versions()
        for version in versions:
            if (version.run_key, version.update) == (record.run_key, manifest.update):
                return Registered(version, folder.version_store(version.version).location, True)
        known = [one.version for one in mlflow_registry.versions(uri, name)]
        number = 1 + max([0, *known, *(one.version for one in versions)])
        return _added(folder, number, uri, run, record, manifest)


def _added(
    folder: ModelFolder,
    number: int,
    uri: str,
    run: RunDirectory,
    record: RunRecord,
    manifest: CheckpointManifest,
) -> Registered:
    """A new version, under the first number from `number` on that MLflow gives."""
    from jobs.tracking import registry as mlflow_registry

    with _built(run, record, manifest) as built:
        while True:
            version = _place(folder, number, built, run, record, manifest)
            given = announce(folder, version, uri)
            if given == number:
                return Registered(version, folder.version_store(number).location, False)
            # A version that was deleted in MLflow keeps its number for ever.
            mlflow_registry.delete_version(uri, folder.name, given)
            folder.store.remove_tree(str(number))
            number = given + 1


@contextlib.contextmanager
def _built(run: RunDirectory, record: RunRecord, manifest: CheckpointManifest) -> Iterator[Path]:
    """A local folder with all files of a version but its record."""
    from jobs.checkpoints.export import exported_file
    from jobs.registry.text_model import write_model
    from jobs.tracking.registry import save_served_model

    recipe = recipes.from_yaml(manifest.recipe, f"the recipe of run {run.name}")
    corpus = next(iter(recipe.data.corpora))  # those of a mixture have one tokenizer
    tokenizer = tokenizer_of(corpus, Manifest.load(corpus))
    with tempfile.TemporaryDirectory(prefix="tvq.") as temporary:
        files = Path(temporary, "model")  # as it is called in the version's folder
        files.mkdir()
        write_model(files, exported_file(run, manifest), manifest.recipe, tokenizer)
        about = {"run": run.name, "run_key": record.run_key, "update": str(manifest.update)}
        folder = Path(temporary, "version")
        save_served_model(folder, files, about)
        yield folder


def _place(
    folder: ModelFolder,
    number: int,
    built: Path,
    run: RunDirectory,
    record: RunRecord,
    manifest: CheckpointManifest,
) -> ModelVersion:
    """Copies what was built to its number, and makes it complete."""
    if number in folder.abandoned():
        folder.store.remove_tree(str(number))
    store = folder.version_store(number)
    paths = sorted(path for path in built.rglob("*") if path.is_file())
    files = {}
    for path in paths:
        name = path.relative_to(built).as_posix()
        files[name] = _copy(path, store, name)
    recipe = recipes.from_yaml(manifest.recipe, f"the recipe of run {run.name}")
    version = ModelVersion(
        format_version=FORMAT_VERSION,
        name=folder.name,
        version=number,
        run=run.name,
        run_location=run.location,
        run_key=record.run_key,
        mlflow_run_id=record.mlflow_run_id,
        tracking_uri=record.tracking_uri,
        update=manifest.update,
        identity=record.identity,
        fingerprints=manifest.fingerprints,
        parameters=parameter_count(recipe.model).trained,
        sums=network_sums(manifest.sums),
        files=files,
        n_bytes=sum(path.stat().st_size for path in paths),
        provenance=[asdict(start) for start in noted_starts(run)],
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    if not folder.write_record(version):
        raise UserError(
            f"model {folder.name}: version {number} appeared in {store.location} meanwhile; run"
            " the same command again"
        )
    return version


def _copy(path: Path, store: Store, name: str) -> str:
    """Stores a local file durably under `name`; returns its SHA-256."""
    temporary = store.scratch(name)
    digest = hashlib.sha256()
    with path.open("rb") as source, temporary.open("wb") as target:
        while piece := source.read(2**22):
            digest.update(piece)
            target.write(piece)
        target.flush()
        os.fsync(target.fileno())
    shutil.copymode(path, temporary)
    store.place(temporary, name)
    return digest.hexdigest()
