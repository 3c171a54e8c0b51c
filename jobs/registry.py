"""`tvq register` and `tvq promote`: trained models under a name, in versions, with a champion."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from jobs import recipe as recipes
from jobs.checkpoint_manifest import CheckpointManifest, complete_checkpoints, manifest_of
from jobs.console import Console
from jobs.errors import UserError
from jobs.init_from import network_sums
from jobs.promotion import METRICS, Decision, Outcome, Scored, decide
from jobs.provenance import noted_starts
from jobs.registered_model import CHAMPION, CONTENTS, FORMAT_VERSION, ModelFolder, ModelVersion
from jobs.run_directory import RunDirectory, RunRecord
from model.counts import parameter_count
from pipeline.manifest import Manifest, tokenizer_of
from pipeline.storage import Location, Store

_EVALUATION = "evaluation.json"


class Registered(NamedTuple):
    """A version, and whether it was there before."""

    version: ModelVersion
    location: str
    """Its folder."""
    reused: bool


class Promotion(NamedTuple):
    """What `promote` did."""

    outcome: Outcome
    name: str
    version: int
    """The candidate."""
    champion: int | None
    """Who has the alias now; None if nobody."""
    why: str
    difference: float | None = None
    """Of the metric, candidate less the champion before."""
    low: float | None = None
    high: float | None = None


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
    uri = _tracking_uri(record.tracking_uri, run.root)
    with folder.lease(), _built(run, record, manifest) as built:
        _reconcile(folder, uri)
        for version in folder.versions():
            if (version.run_key, version.update) == (record.run_key, manifest.update):
                return Registered(version, folder.version_store(version.version).location, True)
        known = [one.version for one in mlflow_registry.versions(uri, name)]
        number = 1 + max([0, *known, *(one.version for one in folder.versions())])
        while True:
            version = _place(folder, number, built, run, record, manifest)
            given = _announce(folder, version, uri)
            if given == number:
                return Registered(version, folder.version_store(number).location, False)
            # A version that was deleted in MLflow keeps its number for ever.
            mlflow_registry.delete_version(uri, name, given)
            folder.store.remove_tree(str(number))
            number = given + 1


def promote(
    root: Location,
    name: str,
    *,
    version: int | None = None,
    metric: str = METRICS[0],
    min_delta: float = 0.0,
    console: Console,
) -> Promotion:
    """Makes a version the champion if it is better than the champion on the validation split.

    The first champion needs to beat nobody. A version is scored once, on the frozen validation
    split that it was trained beside; the test split never decides. MLflow moves an alias
    without comparing, so the move is made under the model's lease, if the champion is still the
    one that was compared with, and is read back.

    Raises:
        UserError: there is no such version, or MLflow or the store does not answer.
    """
    from jobs.tracking import registry as mlflow_registry

    if metric not in METRICS:
        raise UserError(
            f"--if-better {metric}: expected {' or '.join(METRICS)}, figures of the validation"
            " split; the test split never decides"
        )
    if min_delta < 0:
        raise UserError(f"--min-delta {min_delta}: expected 0 or more")
    folder = ModelFolder(root, name)
    versions = folder.versions()
    if not versions:
        raise UserError(f"model {name}: has no version yet; `tvq register RUN --as {name}`")
    candidate = versions[-1] if version is None else folder.version(version)
    uri = _tracking_uri(candidate.tracking_uri, root)
    with folder.lease():
        _reconcile(folder, uri)
    before = mlflow_registry.aliased(uri, name, CHAMPION)
    if before == candidate.version:
        why = "is the champion already"
        return Promotion("promoted", name, candidate.version, before, why)
    if before is None:
        decision = Decision("promoted", "the first champion")
    else:
        decision = _compared(folder, candidate, folder.version(before), metric, min_delta, console)
    champion = before
    if decision.outcome == "promoted":
        with folder.lease():
            now = mlflow_registry.aliased(uri, name, CHAMPION)
            if now != before:
                why = f"the champion became version {now} meanwhile; compare with that one"
                return Promotion("refused", name, candidate.version, now, why)
            mlflow_registry.move_alias(uri, name, CHAMPION, candidate.version)
            champion = mlflow_registry.aliased(uri, name, CHAMPION)
            if champion != candidate.version:
                why = f"somebody else made version {champion} the champion in the same moment"
                return Promotion("refused", name, candidate.version, champion, why)
    told = {"tvq.promotion": decision.outcome, "tvq.promotion_reason": decision.why}
    told |= {} if before is None else {"tvq.compared_with_version": str(before)}
    mlflow_registry.set_tags(uri, name, candidate.version, told)
    return Promotion(
        decision.outcome,
        name,
        candidate.version,
        champion,
        decision.why,
        decision.difference,
        decision.low,
        decision.high,
    )


def champion(root: Location, name: str) -> ModelVersion | None:
    """The version that has the alias; None if none has it, or there is no such model yet.

    Raises:
        UserError: MLflow or the store does not answer.
    """
    from jobs.tracking import registry as mlflow_registry

    folder = ModelFolder(root, name)
    versions = folder.versions()
    if not versions:
        return None
    uri = _tracking_uri(versions[-1].tracking_uri, root)
    number = mlflow_registry.aliased(uri, name, CHAMPION)
    return None if number is None else folder.version(number)


def scored(root: Location, name: str, version: int, console: Console) -> Scored:
    """A version on its validation split: as scored before, or now."""
    folder = ModelFolder(root, name)
    return _scored(folder, folder.version(version), console)


def _compared(
    folder: ModelFolder,
    candidate: ModelVersion,
    champion: ModelVersion,
    metric: str,
    min_delta: float,
    console: Console,
) -> Decision:
    prints = [one.fingerprints["validation"] for one in (candidate, champion)]
    if prints[0] != prints[1]:
        return Decision(
            "refused",
            f"version {candidate.version} and the champion, version {champion.version}, were"
            f" trained beside different validation splits (fingerprints {prints[0][:16]} and"
            f" {prints[1][:16]})",
        )
    ours, theirs = (_scored(folder, one, console) for one in (candidate, champion))
    return decide(ours, theirs, metric, min_delta)


def _scored(folder: ModelFolder, version: ModelVersion, console: Console) -> Scored:
    """The version on its validation split: as scored for an earlier promotion, or now."""
    store = folder.version_store(version.version)
    with contextlib.suppress(FileNotFoundError):
        return _from_json(store.read(_EVALUATION))
    console.line(f"scoring version {version.version} on the validation split")
    with _evaluable(folder, version) as run:
        from jobs.evaluate import evaluate_run

        found = evaluate_run(run, "validation", update=version.update, reuse=True, console=console)
    blocks = found.blocks
    scored = Scored(found.fingerprint, blocks.nats, blocks.n_tokens, blocks.n_bytes, blocks.kind)
    store.write(_EVALUATION, _to_json(scored))
    return scored


@contextlib.contextmanager
def _evaluable(folder: ModelFolder, version: ModelVersion) -> Iterator[RunDirectory]:
    """The run of a version with its checkpoint, or a copy made of the registered weights."""
    run = folder.run_of(version)
    if run and version.update in {one.update for one in complete_checkpoints(run)}:
        yield run
        return
    from jobs.checkpoint_export import read_network
    from jobs.import_official import save_as_run
    from jobs.text_model import WEIGHTS

    with tempfile.TemporaryDirectory(prefix="tvq.") as temporary:
        file = Path(temporary, WEIGHTS)
        store = folder.version_store(version.version)
        file.write_bytes(store.read(f"{CONTENTS}/{WEIGHTS}"))
        network, exported = read_network(file)
        copy = RunDirectory.at(Path(temporary), "registered")
        save_as_run(
            copy,
            exported.recipe,
            network=tuple(network),
            updates=exported.update,
            fingerprints=exported.fingerprints,
        )
        yield copy


@contextlib.contextmanager
def _built(run: RunDirectory, record: RunRecord, manifest: CheckpointManifest) -> Iterator[Path]:
    """A local folder with all files of a version but its record."""
    from jobs.checkpoint_export import exported_file
    from jobs.text_model import write_model
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


def _announce(folder: ModelFolder, version: ModelVersion, uri: str) -> int:
    """Registers a complete version with MLflow; returns the number that it was given."""
    from jobs.tracking.registry import create_version

    tags = {
        "tvq.run": version.run,
        "tvq.run_key": version.run_key,
        "tvq.update": str(version.update),
        "tvq.identity": version.identity,
        "tvq.parameters": str(version.parameters),
        "tvq.bytes": str(version.n_bytes),
        "tvq.leaf_sums": json.dumps(version.sums),
    }
    tags |= {f"tvq.fingerprint.{split}": text for split, text in version.fingerprints.items()}
    location = folder.version_store(version.version).location
    return create_version(uri, folder.name, location, version.mlflow_run_id, tags)


def _reconcile(folder: ModelFolder, uri: str) -> None:
    """Registers with MLflow what a killed registration left complete but unannounced."""
    from jobs.tracking.registry import delete_version, versions

    known = max((one.version for one in versions(uri, folder.name)), default=0)
    for version in folder.versions():
        if version.version > known:
            given = _announce(folder, version, uri)
            if given != version.version:
                delete_version(uri, folder.name, given)
                raise UserError(
                    f"model {folder.name}: version {version.version} lies in"
                    f" {folder.version_store(version.version).location}, and MLflow would number it"
                    f" {given}; remove that folder and register its run again"
                )


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


def _tracking_uri(recorded: str | None, root: Location) -> str:
    from jobs.train import recorded_store

    return recorded_store(recorded, root).uri


def _to_json(scored: Scored) -> bytes:
    columns = {name: getattr(scored, name).tolist() for name in ("nats", "n_tokens", "n_bytes")}
    fields = {"fingerprint": scored.fingerprint, "items": scored.items, **columns}
    return (json.dumps(fields) + "\n").encode()


def _from_json(text: bytes) -> Scored:
    import numpy as np

    fields = json.loads(text)
    return Scored(
        fields["fingerprint"],
        np.array(fields["nats"], np.float64),
        np.array(fields["n_tokens"], np.int64),
        np.array(fields["n_bytes"], np.int64),
        fields["items"],
    )
