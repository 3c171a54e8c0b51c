"""Which checkpoints a run has: the manifest that makes one complete.

    checkpoints/00000200/state/         Orbax's sharded arrays
                         manifest.json  written last, by one host, after Orbax's commit

A checkpoint is complete or it does not exist. Needs no JAX, so that the driver can look.
"""

import functools
import hashlib
import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.errors import UserError
from jobs.run_directory import RunDirectory, write_atomically

FORMAT_VERSION = 1
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
    """Length in bytes of every file under `state/`."""


class DamagedCheckpointError(RuntimeError):
    """A checkpoint is not what its manifest says; names the leaf or the file."""


def write(run: RunDirectory, manifest: CheckpointManifest) -> None:
    """Makes a checkpoint whose arrays are committed complete."""
    fields = asdict(manifest)
    fields["checksum"] = _checksum(fields)
    path = checkpoint_folder(run, manifest.update) / "manifest.json"
    write_atomically(path, json.dumps(fields, indent=1) + "\n")


def checkpoint_folder(run: RunDirectory, update: int) -> Path:
    """Where the checkpoint after `update` updates lies; absolute, as Orbax wants it."""
    return (run.checkpoints / f"{update:08d}").absolute()


def complete_checkpoints(run: RunDirectory) -> list[CheckpointManifest]:
    """The checkpoints that exist, oldest first: those with a manifest.

    One whose manifest is damaged is named in the log and left out.

    Raises:
        UserError: one has a newer format than this tvq reads.
    """
    found = []
    for path in sorted(run.checkpoints.glob("*/manifest.json")):
        try:
            found.append(_read(path))
        except FileNotFoundError:
            continue  # rank 0 removed it since it was listed
        except DamagedCheckpointError as damage:
            _log_once(f"checkpoint is damaged and skipped: {damage}")
    return found


@functools.cache
def _log_once(message: str) -> None:
    log.error(message)  # the driver looks twice a second


def remove(run: RunDirectory, update: int) -> None:
    """Deletes a checkpoint; its manifest first, so that it is never half there."""
    folder = checkpoint_folder(run, update)
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def newest_update(run: RunDirectory) -> int:
    """The update of the run's newest complete checkpoint; 0 if there is none."""
    return max((manifest.update for manifest in complete_checkpoints(run)), default=0)


def file_lengths(folder: Path) -> dict[str, int]:
    """Length in bytes of every file under `folder`, by its relative path."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _read(path: Path) -> CheckpointManifest:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        # First, in every format: else a flipped bit in the version asks for an upgrade.
        if fields.pop("checksum") != _checksum(fields):
            raise DamagedCheckpointError(f"{path}: its checksum does not fit what it says")
        if fields["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"{path}: format {fields['format_version']} is newer than {FORMAT_VERSION}, which"
                " this tvq reads; upgrade tvq"
            )
        return CheckpointManifest(**fields)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path}: {error!r}") from None


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
