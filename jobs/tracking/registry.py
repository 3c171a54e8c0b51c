"""MLflow's model registry: versions that point to our folders, and their aliases."""

import warnings
from collections.abc import Mapping
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jobs.tracking.reading import reading
from jobs.tracking.store import load, without_credentials
from pipeline.storage import is_url

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_SERVED = Path(__file__).with_name("served_model.py")


class RegisteredVersion(NamedTuple):
    """A version as MLflow holds it."""

    version: int
    source: str
    run_id: str | None
    tags: dict[str, str]
    aliases: list[str]


def save_served_model(folder: Path, files: Path, metadata: Mapping[str, str]) -> None:
    """Makes `folder`, which must not exist, a model that MLflow loads; copies `files` into it."""
    load()
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    from jobs.tracking.served_model import DEFAULTS

    kinds = {str: DataType.string, int: DataType.long, float: DataType.double}
    params = [ParamSpec(name, kinds[type(value)], value) for name, value in DEFAULTS.items()]
    with warnings.catch_warnings():
        # It asks for type hints and an example, which the signature makes needless.
        warnings.simplefilter("ignore", UserWarning)
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=str(_SERVED),
            artifacts={"model": str(files)},
            signature=ModelSignature(
                inputs=Schema([ColSpec(DataType.string, "text")]), params=ParamSchema(params)
            ),
            pip_requirements=[f"tvq=={installed('tvq')}"],  # else MLflow imports all to guess
            metadata=dict(metadata),
        )


def versions(uri: str, name: str) -> list[RegisteredVersion]:
    """The versions of a model by number; none if it is not registered.

    Raises UserError if the store does not answer.
    """
    with reading(uri) as client:
        found = client.search_model_versions(f"name = '{name}'", max_results=10_000)
        return sorted(map(_version, found))


def create_version(
    uri: str,
    name: str,
    folder: str,
    run_id: str | None,
    tags: Mapping[str, str],
) -> int:
    """Registers the next version of a model, which lies in `folder`; returns its number.

    A server takes no model from a folder that it may not see: such a one is stored with the
    artifacts of its run too. Raises UserError if the store does not answer or refuses it.
    """
    with reading(uri) as client:
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = folder
        if uri.startswith(("http://", "https://")) and not is_url(folder) and run_id:
            source = _stored_with_run(client, name, folder, run_id)
        created = client.create_model_version(name, source, run_id, dict(tags))
        return int(created.version)


def delete_version(uri: str, name: str, version: int) -> None:
    """Takes a version back that was never announced."""
    with reading(uri) as client:
        client.delete_model_version(name, str(version))


def set_tags(uri: str, name: str, version: int, tags: Mapping[str, str]) -> None:
    """Adds tags to a version."""
    with reading(uri) as client:
        for key, value in tags.items():
            client.set_model_version_tag(name, str(version), key, value)


def aliased(uri: str, name: str, alias: str) -> int | None:
    """The version that an alias of a model points to; None if it has none."""
    with reading(uri) as client:
        from mlflow.exceptions import MlflowException

        try:
            return int(client.get_model_version_by_alias(name, alias).version)
        except MlflowException as error:
            # Unknown models and aliases are told apart by the one and not by the other store.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def move_alias(uri: str, name: str, alias: str, version: int) -> None:
    """Points an alias to a version. Raises UserError if the store does not answer."""
    with reading(uri) as client:
        client.set_registered_model_alias(name, alias, str(version))


def _stored_with_run(client: "MlflowClient", name: str, folder: str, run_id: str) -> str:
    number = Path(folder).name
    client.log_artifacts(run_id, folder, f"models/{name}/{number}")
    return f"{client.get_run(run_id).info.artifact_uri}/models/{name}/{number}"


def _version(found: "ModelVersion") -> RegisteredVersion:
    return RegisteredVersion(
        int(found.version),
        without_credentials(found.source or ""),
        found.run_id or None,
        dict(found.tags),
        list(found.aliases),
    )
