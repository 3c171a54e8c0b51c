"""The checkpoints of a run as MLflow's logged models: by reference, linked to what was measured."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from jobs.tracking.reading import reading

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

UPDATE_TAG = "tvq.update"
DELETED_TAG = "tvq.deleted"


def models_of_run(
    client: "MlflowClient", experiment_id: str, run_id: str
) -> dict[int, "LoggedModel"]:
    """The logged models of a run, by the update of their checkpoint."""
    found: dict[int, LoggedModel] = {}
    token = None
    while True:
        page = client.search_logged_models(
            [experiment_id], f"source_run_id = '{run_id}'", page_token=token
        )
        found |= {int(one.tags[UPDATE_TAG]): one for one in page if UPDATE_TAG in one.tags}
        token = page.token
        if not token:
            return found


def mark_deleted(
    client: "MlflowClient", experiment_id: str, run_id: str, present: Collection[int]
) -> None:
    """Tags the models whose checkpoint is not `present` (updates); their metrics stay."""
    for update, model in models_of_run(client, experiment_id, run_id).items():
        marked = DELETED_TAG in model.tags
        if update not in present and not marked:
            client.set_logged_model_tags(model.model_id, {DELETED_TAG: "true"})
        elif update in present and marked:  # made again by a training that went back
            client.delete_logged_model_tag(model.model_id, DELETED_TAG)


def mark_deleted_in(uri: str, run_id: str, present: Collection[int]) -> None:
    """The same for a command. Raises UserError if the store does not answer or has no such run."""
    with reading(uri) as client:
        mark_deleted(client, client.get_run(run_id).info.experiment_id, run_id, present)
