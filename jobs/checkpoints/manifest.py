"""Which checkpoints a run has: the manifest that makes one complete.

    checkpoints/00000200/state-4f1c.../  Orbax's sharded arrays, a new folder for each attempt
                         manifest.json   written last, by one host, after Orbax's commit
                         pinned          there while no retention may remove it

A checkpoint is complete or it does not exist. Needs no JAX, so that the driver can look.
"""

import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from jobs.errors import UserError
from jobs.runs.run_directory import RunDirectory
from pipeline.storage import LocalStore, Store

FORMAT_VERSION = 2
"""1 had no metrics and no digests, and its arrays always in `state`."""
_FILE = re.compile(r"checkpoints/(\d{8,})/(.+)")
log = logging.getLogger("tvq.checkpoints")


@dataclass(frozen=True)
class CheckpointManifest:
    """What `manifest.json` says of one complete checkpoint."""

    format_version: int
    update: int
    """Optimizer updates that the state has seen."""
    next_batch: int
    """The batch to go on with: a checkpoint lies on a batch border."""
    recipe: str
    """The resolved recipe, YAML."""
    tokens: int
    """Unmasked targets trained on."""
    fingerprints: dict[str, str]
    """Of each split of the corpus."""
    leaves: dict[str, str]
    """Shape and dtype of every leaf of the state, by its path: `float32[4,128]`."""
    sums: dict[str, int]
    """`leaf_sums` of the state."""
    files: dict[str, int]
    """Length in bytes of every file of the arrays' folder."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the evaluation after this update, if there was one."""
    created: float = 0.0
    """Unix time at which the state was taken, seconds."""
    folder: str = "state"
    """That the arrays lie in, beside the manifest."""
    digests: dict[str, str] = field(default_factory=dict)
    """MD5 of every file of that folder, base64, where the store gives one."""


class DamagedCheckpointError(RuntimeError):
    """A checkpoint is not what its manifest says; names the leaf or the file."""


def commit(run: RunDirectory, manifest: CheckpointManifest, may: Callable[[], None]) -> None:
    """Makes a checkpoint whose arrays are stored complete, in place of any of that update.

    Args:
        may: raises if this process may not write to the run any more. It is asked again before a
            manifest gives way to this one: a group that falls asleep in between and wakes up when
            another has saved the same update finds that one's and leaves it.
    """
    store, data = checkpoint_store(run, manifest.update), encode(manifest)
    while not store.create("manifest.json", data):
        may()
        store.remove("manifest.json")


def remove_other_attempts(run: RunDirectory, manifest: CheckpointManifest) -> None:
    """Removes what killed saves of the same update left beside a checkpoint."""
    store = checkpoint_store(run, manifest.update)
    for name in {entry.name.partition("/")[0] for entry in store.list()}:
        if name not in ("manifest.json", "pinned", manifest.folder):
            store.remove_tree(name)


def encode(manifest: CheckpointManifest) -> bytes:
    """The text of `manifest.json`."""
    fields = asdict(manifest)
    fields["checksum"] = _checksum(fields)
    return (json.dumps(fields, indent=1) + "\n").encode()


def arrays_store(run: RunDirectory, manifest: CheckpointManifest) -> Store:
    """Where the arrays of a checkpoint lie."""
    return checkpoint_store(run, manifest.update).child(manifest.folder)


def checkpoint_store(run: RunDirectory, update: int) -> Store:
    """Where the checkpoint after `update` updates lies."""
    return run.store.child(f"checkpoints/{update:08d}")


def complete_checkpoints(run: RunDirectory) -> list[CheckpointManifest]:
    """The checkpoints that exist, oldest first: those with a manifest.

    One whose manifest is damaged is named in the log and left out.

    Raises:
        UserError: one has a newer format than this tvq reads.
        CorpusError: the store cannot be read now.
    """
    manifests, damages = readable_checkpoints(run)
    for damage in damages:
        _log_once(f"checkpoint is damaged and skipped: {damage}")
    return manifests


def readable_checkpoints(
    run: RunDirectory,
) -> tuple[list[CheckpointManifest], list["DamagedCheckpointError"]]:
    """The checkpoints that exist, oldest first, and what is wrong with manifests left out."""
    found, damages = [], []
    for name, version in _files(run).items():
        match = _FILE.fullmatch(name)
        if match and match[2] == "manifest.json":
            try:
                found.append(_manifest(run, name, version))
            except FileNotFoundError:
                continue  # rank 0 removed it since it was listed
            except DamagedCheckpointError as damage:
                damages.append(damage)
    return sorted(found, key=lambda manifest: manifest.update), damages


def pinned_updates(run: RunDirectory) -> set[int]:
    """The updates whose checkpoints no retention may remove."""
    matches = map(_FILE.fullmatch, _files(run))
    return {int(match[1]) for match in matches if match and match[2] == "pinned"}


def unfinished_updates(run: RunDirectory) -> list[int]:
    """The updates of which there are files, but no sound manifest: killed, damaged or going on."""
    matches = [match for match in map(_FILE.fullmatch, _files(run)) if match]
    complete = {manifest.update for manifest in readable_checkpoints(run)[0]}
    return sorted({int(match[1]) for match in matches} - complete)


def abandoned_updates(run: RunDirectory) -> list[int]:
    """The updates of which there are files and no manifest, older than a checkpoint.

    While one save is under way at a time, they were left by a kill.
    """
    matches = [match for match in map(_FILE.fullmatch, _files(run)) if match]
    complete = {int(match[1]) for match in matches if match[2] == "manifest.json"}
    return sorted({int(m[1]) for m in matches if int(m[1]) < max(complete, default=0)} - complete)


def pin(run: RunDirectory, update: int, wanted: bool) -> None:
    """Protects a checkpoint from every retention, or takes that back.

    Raises:
        UserError: there is no such checkpoint.
    """
    manifest_of(run, update)
    store = checkpoint_store(run, update)
    if wanted:
        store.write("pinned", b"")
    else:
        store.remove("pinned")


def manifest_of(run: RunDirectory, update: int | None = None) -> CheckpointManifest:
    """The manifest of one checkpoint; None: of the newest.

    Raises:
        UserError: there is no such checkpoint; lists those that are.
    """
    manifests = {manifest.update: manifest for manifest in complete_checkpoints(run)}
    if not manifests:
        raise UserError(f"run {run.name}: has no checkpoint")
    if update is None:
        return manifests[max(manifests)]
    if update not in manifests:
        known = ", ".join(map(str, manifests))
        raise UserError(f"run {run.name}: has no checkpoint at update {update}; there are {known}")
    return manifests[update]


@functools.cache
def _log_once(message: str) -> None:
    log.error(message)  # the driver looks twice a second


def remove(run: RunDirectory, update: int) -> None:
    """Deletes a checkpoint; its manifest first, so that it is never half there."""
    store = checkpoint_store(run, update)
    store.remove("manifest.json")
    store.remove_tree("")


def newest_update(run: RunDirectory) -> int:
    """The update of the run's newest complete checkpoint; 0 if there is none."""
    return max((manifest.update for manifest in complete_checkpoints(run)), default=0)


def file_lengths(store: Store) -> dict[str, int]:
    """Length in bytes of every file of a folder, by its relative path."""
    return {entry.name: entry.size for entry in store.list()}


def _files(run: RunDirectory) -> dict[str, str]:
    """Every file below `checkpoints/`, by its name in the run, with its version."""
    return {entry.name: entry.version for entry in run.store.list("checkpoints")}


def _manifest(run: RunDirectory, name: str, version: str) -> CheckpointManifest:
    if isinstance(run.store, LocalStore):  # its versions are times, too coarse to tell
        return _read(run.store, name)
    # The driver looks every few seconds, and each reading is paid for.
    key = (run.location, name, version)
    if key not in _known:
        while len(_known) >= _KNOWN_MANIFESTS:
            _known.pop(next(iter(_known)))
        _known[key] = _read(run.store, name)
    return _known[key]


_KNOWN_MANIFESTS = 256
_known: dict[tuple[str, str, str], CheckpointManifest] = {}
"""Those read from object stores, oldest first."""


def _read(store: Store, name: str) -> CheckpointManifest:
    where = f"{store.location}/{name}"
    try:
        fields = json.loads(store.read(name).decode("utf-8"))
        # First, in every format: else a flipped bit in the version asks for an upgrade.
        if fields.pop("checksum") != _checksum(fields):
            raise DamagedCheckpointError(f"{where}: its checksum does not fit what it says")
        if fields["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"{where}: format {fields['format_version']} is newer than {FORMAT_VERSION}, which"
                " this tvq reads; upgrade tvq"
            )
        return CheckpointManifest(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{where}: {error!r}") from None


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
