"""`tvq promote`: a version becomes the champion if it is better on the validation split."""

from typing import NamedTuple

from jobs.console import Console
from jobs.errors import UserError
from jobs.metric_names import DECIDING, EVAL_BITS
from jobs.registry.announcement import reconcile, tracking_uri
from jobs.registry.promotion import Decision, Outcome, decide
from jobs.registry.registered_model import CHAMPION, ModelFolder, ModelVersion
from jobs.registry.scored_version import scored
from pipeline.storage import Location


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


def promote(
    root: Location,
    name: str,
    *,
    version: int | None = None,
    metric: str = EVAL_BITS,
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

    if metric not in DECIDING:
        raise UserError(
            f"--if-better {metric}: expected {' or '.join(DECIDING)}, figures of the validation"
            " split; the test split never decides"
        )
    if min_delta < 0:
        raise UserError(f"--min-delta {min_delta}: expected 0 or more")
    folder = ModelFolder(root, name)
    versions = folder.versions()
    if not versions:
        raise UserError(f"model {name}: has no version yet; `tvq register RUN --as {name}`")
    candidate = versions[-1] if version is None else folder.version(version)
    uri = tracking_uri(candidate.tracking_uri, root)
    with folder.lease():
        reconcile(folder, uri)
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
    uri = tracking_uri(versions[-1].tracking_uri, root)
    number = mlflow_registry.aliased(uri, name, CHAMPION)
    return None if number is None else folder.version(number)


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
    ours, theirs = (scored(folder, one, console) for one in (candidate, champion))
    return decide(ours, theirs, metric, min_delta)
