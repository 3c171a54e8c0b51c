"""Registered models: copies that no retention touches, and the record that makes one complete.

    <root>/models/NAME/3/MLmodel                    what MLflow loads
                         artifacts/model/           weights, recipe, tokenizer
                         model.json                 written last, by exclusive create
                       lease.json                   who registers or promotes now (runs/lease.py)

A version is complete or it does not exist. Its number is MLflow's.
"""

import contextlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from jobs import recipe as recipes
from jobs.errors import UserError
from jobs.recipe import Recipe
from jobs.runs.lease import Lease
from jobs.runs.run_directory import RunDirectory
from pipeline.storage import Location, Store, open_store

FORMAT_VERSION = 1
RECORD = "model.json"
CONTENTS = "artifacts/model"
"""Of a version's weights, recipe and tokenizer, in its folder."""
FOLDER = "models"
"""Of the registered models, beside the runs."""
CHAMPION = "champion"
"""The alias that `tvq promote` moves."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_REFERENCE = re.compile(r"(?:models:/)?([^/@]+)(?:/(\d+)|@([A-Za-z0-9._-]+))?")


@dataclass(frozen=True)
class ModelVersion:
    """What `model.json` says of one version."""

    format_version: int
    name: str
    version: int
    run: str
    """Name of the run that it was trained in."""
    run_location: str
    """Where that run lay when it was registered."""
    run_key: str
    mlflow_run_id: str | None
    tracking_uri: str | None
    """Where MLflow is, without credentials; None: in the SQLite file beside the runs."""
    update: int
    """Of the checkpoint."""
    identity: str
    """Of the recipe's mathematics."""
    fingerprints: dict[str, str]
    """Of the splits of the corpus that it was trained on."""
    parameters: int
    """Trained ones, codebooks left out."""
    sums: dict[str, int]
    """Of the bits of each array, as in the checkpoint's manifest."""
    files: dict[str, str]
    """SHA-256 of every file, by its path in the version's folder."""
    n_bytes: int
    """Of all these files together."""
    provenance: list[dict[str, Any]]
    """What the run was trained on, start after start (jobs/lineage/provenance.py)."""
    created: str
    """UTC, ISO 8601."""


class ModelFolder:
    """The folder of one registered model, all versions."""

    def __init__(self, root: Location, name: str):
        """Raises UserError for a name that is none."""
        if not _NAME.fullmatch(name):
            raise UserError(
                f"model name {name!r}: expected letters, digits, '.', '_', '-', beginning with a"
                " letter or digit; choose another with --as"
            )
        self.name = name
        self.root = root
        self.store: Store = open_store(root).child(FOLDER).child(name)

    def version_store(self, version: int) -> Store:
        """The folder of one version."""
        return self.store.child(str(version))

    def run_of(self, version: ModelVersion) -> RunDirectory | None:
        """The run that a version was trained in, here or where it lay then; None if it is gone."""
        for run in (RunDirectory.at(self.root, version.run), RunDirectory(version.run_location)):
            record = run.record()
            if record and record.run_key == version.run_key:
                return run
        return None

    def versions(self) -> list[ModelVersion]:
        """The complete versions by number."""
        paths = [entry.name.split("/") for entry in self.store.list()]
        numbers = [int(path[0]) for path in paths if len(path) == 2 and path[1] == RECORD]
        return [self.version(number) for number in sorted(numbers)]

    def version(self, version: int) -> ModelVersion:
        """What is known of one version. Raises UserError if there is none or it is damaged."""
        where = f"{self.store.location}/{version}/{RECORD}"
        try:
            fields = json.loads(self.version_store(version).read(RECORD))
            if fields["format_version"] > FORMAT_VERSION:
                raise UserError(
                    f"{where}: format {fields['format_version']} is newer than {FORMAT_VERSION},"
                    " which this tvq reads; upgrade tvq"
                )
            return ModelVersion(**fields)
        except FileNotFoundError:
            raise UserError(
                f"model {self.name}: has no version {version} in {self.store.location}"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}: damaged ({error!r}); register the run again") from None

    def weights(self, version: int) -> str:
        """Path or URL of a version's weights, a file that `training.init_from` takes."""
        return f"{self.version_store(version).location}/{CONTENTS}/weights.safetensors"

    def recipe(self, version: int) -> Recipe:
        """What a version was trained by. Raises UserError if it is damaged."""
        name = f"{CONTENTS}/recipe.yaml"
        try:
            text = self.version_store(version).read(name).decode()
        except FileNotFoundError:
            raise UserError(
                f"model {self.name}: version {version} has no {name} any more; register its run"
                " again"
            ) from None
        return recipes.from_yaml(text, f"the recipe of version {version} of model {self.name}")

    def abandoned(self) -> list[int]:
        """Numbers of folders without a record: what killed registrations left."""
        paths = [entry.name.split("/") for entry in self.store.list()]
        there = {int(path[0]) for path in paths if len(path) > 1 and path[0].isdigit()}
        return sorted(there - {version.version for version in self.versions()})

    def write_record(self, record: ModelVersion) -> bool:
        """Makes a version complete; False if it was already."""
        text = json.dumps(asdict(record), indent=1) + "\n"
        return self.version_store(record.version).create(RECORD, text.encode())

    def lease(self) -> "contextlib.AbstractContextManager[Lease]":
        """The right to add versions and to move aliases, held by one process at a time."""
        busy = "model {name}: {holder} registers or promotes it now; wait for it"
        return Lease(self, busy=busy).held()


def parse_reference(text: str) -> tuple[str, int | None, str | None]:
    """`NAME`, `NAME/3` or `NAME@champion`, with `models:/` before it or not: name, version, alias.

    Raises:
        UserError: none of these.
    """
    match = _REFERENCE.fullmatch(text)
    if match is None or not _NAME.fullmatch(match[1]):
        raise UserError(f"model {text!r}: expected NAME, NAME/VERSION or NAME@ALIAS")
    return match[1], int(match[2]) if match[2] else None, match[3]
