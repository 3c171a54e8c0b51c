"""What MLflow is told of the versions that lie in the store."""

from jobs.errors import UserError
from jobs.registry.registered_model import ModelFolder, ModelVersion
from pipeline.storage import Location


def announce(folder: ModelFolder, version: ModelVersion, uri: str) -> int:
    """Registers a complete version with MLflow; returns the number that it was given."""
    from jobs.tracking.registry import create_version

    tags = {
        "tvq.run": version.run,
        "tvq.run_key": version.run_key,
        "tvq.update": str(version.update),
        "tvq.identity": version.identity,
        "tvq.parameters": str(version.parameters),
        "tvq.bytes": str(version.n_bytes),
    }
    tags |= {f"tvq.fingerprint.{split}": text for split, text in version.fingerprints.items()}
    location = folder.version_store(version.version).location
    return create_version(uri, folder.name, location, version.mlflow_run_id, tags)


def reconcile(folder: ModelFolder, uri: str) -> None:
    """Registers with MLflow what a killed registration left complete but unannounced."""
    from jobs.tracking.registry import delete_version, versions

    known = max((one.version for one in versions(uri, folder.name)), default=0)
    for version in folder.versions():
        if version.version > known:
            given = announce(folder, version, uri)
            if given != version.version:
                delete_version(uri, folder.name, given)
                raise UserError(
                    f"model {folder.name}: version {version.version} lies in"
                    f" {folder.version_store(version.version).location}, and MLflow would number it"
                    f" {given}; remove that folder and register its run again"
                )


def tracking_uri(recorded: str | None, root: Location) -> str:
    """The MLflow store of a run's record (None: the one beside the runs)."""
    from jobs.training.train import recorded_store

    return recorded_store(recorded, root).uri
