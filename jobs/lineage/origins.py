"""`tvq lineage`: what a model or a run was made of, and from what."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from jobs import recipe as recipes
from jobs.checkpoints.manifest import complete_checkpoints
from jobs.console import Console
from jobs.errors import UserError
from jobs.evaluation.trained_model import recipe_of
from jobs.lineage.provenance import Provenance, noted_starts
from jobs.lineage.reproduction import parent_of
from jobs.recipe import Recipe
from jobs.registry.registered_model import CHAMPION, ModelFolder, ModelVersion, parse_reference
from jobs.runs.run_directory import RunDirectory, RunRecord
from pipeline.errors import CorpusError
from pipeline.mixture import Mixture
from pipeline.storage import Location, is_url

_SHOWN_SHARDS = 8


class Lineage(NamedTuple):
    """Where a model or a run comes from, as JSON would have it."""

    model: dict[str, Any] | None
    """The registered version, if one was asked for."""
    run: dict[str, Any]
    """Name, key, MLflow run, update, when it was begun."""
    starts: list[Provenance]
    """What it was trained on, start after start."""
    recipe: dict[str, Any]
    """The fields that are not the defaults."""
    identity: str
    corpora: list[dict[str, Any]]
    """Path, plan, tokenizer, splits and shards of each, as they are now."""
    problems: list[str]
    """What is not what it was, or not there any more."""
    parents: list[dict[str, Any]]
    """The run that this one reproduces, the one that that one reproduces, and so on; then the
    MLflow run that it is a part of (a sweep, a flow). Each with its relation and its name."""


def lineage_command(root: Location, name: str, *, console: Console, as_json: bool) -> None:
    """Prints the lineage of a run, or of a registered model: NAME, NAME/3 or NAME@champion."""
    found = lineage(root, name)
    if as_json:
        console.json(found._asdict() | {"starts": [asdict(start) for start in found.starts]})
        return
    for label, text in _lines(found):
        console.result(f"{label:<11}{text}".rstrip())
    for problem in found.problems:
        console.warning(problem)


def lineage(root: Location, name: str) -> Lineage:
    """What is known of a run or a model.

    Raises:
        UserError: there is neither of that name.
    """
    version, run = _what(root, name)
    if run is None:
        assert version is not None
        raise UserError(
            f"model {version.name}/{version.version}: its run {version.run} is not in"
            f" {version.run_location} any more; what the version itself holds is in its model.json"
        )
    record = run.record()
    assert record is not None
    recipe = recipe_of(run)
    checkpoints = complete_checkpoints(run)
    update = version.update if version else (checkpoints[-1].update if checkpoints else 0)
    corpora, problems = _corpora(recipe, record.fingerprints)
    starts = noted_starts(run)
    if not starts:
        problems.append(f"run {run.name} was begun by a tvq that did not note its commit")
    defaults = recipes.flatten(Recipe())
    return Lineage(
        model=asdict(version) if version else None,
        run={
            "name": run.name,
            "location": run.location,
            "run_key": record.run_key,
            "mlflow_run_id": record.mlflow_run_id,
            "update": update,
            "created": record.created,
        },
        starts=starts,
        recipe={k: v for k, v in recipes.flatten(recipe).items() if v != defaults[k]},
        identity=record.identity,
        corpora=corpora,
        problems=problems,
        parents=_parents(run) + _whole(run, record, problems),
    )


def _what(root: Location, name: str) -> tuple[ModelVersion | None, RunDirectory | None]:
    """The version, if one is named, and the run."""
    if is_url(name) or Path(name, "run.json").is_file():
        return None, RunDirectory.existing(root, name)
    model, number, alias = parse_reference(name)
    if model == name and RunDirectory.at(root, name).record():
        return None, RunDirectory.at(root, name)
    folder = ModelFolder(root, model)
    versions = folder.versions()
    if not versions:
        raise UserError(
            f"{name!r}: neither a run nor a registered model under {root};"
            f" `tvq register RUN --as {model}` makes a model of a run"
        )
    if alias is not None:
        number = _aliased(folder, versions[-1], alias)
    version = versions[-1] if number is None else folder.version(number)
    return version, folder.run_of(version)


def _aliased(folder: ModelFolder, any_version: ModelVersion, alias: str) -> int:
    from jobs.tracking.registry import aliased
    from jobs.training.train import recorded_store

    uri = recorded_store(any_version.tracking_uri, folder.root).uri
    number = aliased(uri, folder.name, alias)
    if number is None:
        hint = f"; `tvq promote {folder.name}` gives it" if alias == CHAMPION else ""
        raise UserError(f"model {folder.name}: has no alias {alias!r}{hint}")
    return number


def _corpora(
    recipe: Recipe, fingerprints: dict[str, str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The corpora as they are now, and what is not as the run had it."""
    try:
        mixture = Mixture.load(recipe.data.corpora)
    except CorpusError as error:
        return [], [str(error)]
    problems = [
        f"the run was begun {difference}"
        for split, recorded in fingerprints.items()
        if (difference := mixture.difference(split, recorded))
    ]
    corpora = []
    for corpus in mixture.corpora:
        manifest = corpus.manifest
        corpora.append(
            {
                "path": corpus.path,
                "weight": corpus.weight,
                "plan_id": manifest.plan_id,
                "tokenizer": {
                    "kind": manifest.tokenizer.kind,
                    "fingerprint": manifest.tokenizer.fingerprint,
                    "vocab_size": manifest.tokenizer.vocab_size,
                },
                "splits": {
                    name: {
                        "fingerprint": split.fingerprint,
                        "documents": split.documents,
                        "tokens": split.tokens,
                        "shards": [shard.path for shard in split.shards],
                    }
                    for name, split in manifest.splits.items()
                },
            }
        )
    return corpora, problems


def _parents(run: RunDirectory) -> list[dict[str, Any]]:
    parents, seen = [], set()
    parent = parent_of(run)
    while parent and parent["run_key"] not in seen:
        seen.add(parent["run_key"])
        parents.append({"relation": "reproduces", **parent})
        parent = parent_of(RunDirectory(parent["location"]))
    return parents


def _whole(run: RunDirectory, record: RunRecord, problems: list[str]) -> list[dict[str, Any]]:
    """The MLflow run that this run is a part of, if MLflow answers and has one."""
    from jobs.tracking.reading import run as tracked
    from jobs.training.train import store_of_run

    if record.mlflow_run_id is None:
        return []
    try:
        uri = store_of_run(run).uri
        whole = tracked(uri, record.mlflow_run_id).tags.get("mlflow.parentRunId")
        name = tracked(uri, whole).name if whole else ""
    except UserError as error:
        problems.append(f"whether the run is part of another is not known: {error}")
        return []
    return [{"relation": "is part of", "name": name, "mlflow_run_id": whole}] if whole else []


def _lines(found: Lineage) -> list[tuple[str, str]]:
    lines = []
    if model := found.model:
        lines.append(
            (
                "model",
                f"{model['name']}/{model['version']}, {model['parameters']:,} parameters,"
                f" {model['n_bytes']:,} bytes in {len(model['files'])} files, registered"
                f" {model['created']}",
            )
        )
    run = found.run
    lines.append(("run", f"{run['name']} at update {run['update']:,}, begun {run['created']}"))
    lines.append(("", f"{run['location']}, key {run['run_key']}"))
    lines.append(("mlflow", run["mlflow_run_id"] or "not tracked yet"))
    for start in found.starts:
        dirty = ", with changed files" if start.dirty else ""
        lines.append(("commit", f"{start.commit or 'none: an installed tvq'}{dirty}"))
        packages = ", ".join(f"{name} {version}" for name, version in start.versions.items())
        lines.append(("versions", f"Python {start.python}, {packages}"))
        lines.append(("hardware", ", ".join(f"{k} {v}" for k, v in start.hardware.items())))
    stated = " ".join(f"{name}={value}" for name, value in found.recipe.items())
    lines.append(("recipe", f"identity {found.identity}"))
    lines.append(("", stated))
    for corpus in found.corpora:
        tokenizer = corpus["tokenizer"]
        lines.append(("corpus", f"{corpus['path']}, plan {corpus['plan_id'][:16]}"))
        lines.append(
            (
                "tokenizer",
                f"{tokenizer['kind']}, {tokenizer['vocab_size']} ids, fingerprint"
                f" {tokenizer['fingerprint'][:16]}",
            )
        )
        for name, split in corpus["splits"].items():
            lines.append(
                (
                    name,
                    f"{split['documents']:,} documents, {split['tokens']:,} tokens, fingerprint"
                    f" {split['fingerprint'][:16]}",
                )
            )
            shards = split["shards"]
            more = f" and {len(shards) - _SHOWN_SHARDS} more" if len(shards) > _SHOWN_SHARDS else ""
            lines.append(("", f"shards {', '.join(shards[:_SHOWN_SHARDS])}{more}"))
    for parent in found.parents:
        where = parent.get("location") or f"MLflow run {parent['mlflow_run_id']}"
        lines.append(("parent", f"it {parent['relation']} {parent['name']}, {where}"))
    return lines
