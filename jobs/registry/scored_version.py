"""A version on the frozen validation split that it was trained beside: scored once, then kept."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jobs.checkpoints.manifest import complete_checkpoints
from jobs.console import Console
from jobs.registry.promotion import Scored
from jobs.registry.registered_model import CONTENTS, ModelFolder, ModelVersion
from jobs.runs.run_directory import RunDirectory

_EVALUATION = "evaluation.json"


def scored(folder: ModelFolder, version: ModelVersion, console: Console) -> Scored:
    """The version on its validation split: as scored for an earlier promotion, or now."""
    store = folder.version_store(version.version)
    with contextlib.suppress(FileNotFoundError):
        return _from_json(store.read(_EVALUATION))
    console.line(f"scoring version {version.version} on the validation split")
    with _evaluable(folder, version) as run:
        from jobs.evaluation.evaluate import evaluate_run

        found = evaluate_run(run, "validation", update=version.update, reuse=True, console=console)
    blocks = found.blocks
    new = Scored(found.fingerprint, blocks.nats, blocks.n_tokens, blocks.n_bytes, blocks.kind)
    store.write(_EVALUATION, _to_json(new))
    return new


@contextlib.contextmanager
def _evaluable(folder: ModelFolder, version: ModelVersion) -> Iterator[RunDirectory]:
    """The run of a version with its checkpoint, or a copy made of the registered weights."""
    run = folder.run_of(version)
    if run and version.update in {one.update for one in complete_checkpoints(run)}:
        yield run
        return
    from jobs.checkpoints.export import read_network
    from jobs.checkpoints.import_official import save_as_run
    from jobs.registry.text_model import WEIGHTS

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


def _to_json(scored: Scored) -> bytes:
    columns = {name: getattr(scored, name).tolist() for name in ("nats", "n_tokens", "n_bytes")}
    fields = {"fingerprint": scored.fingerprint, "items": scored.items, **columns}
    return (json.dumps(fields) + "\n").encode()


def _from_json(text: bytes) -> Scored:
    fields = json.loads(text)
    return Scored(
        fields["fingerprint"],
        np.array(fields["nats"], np.float64),
        np.array(fields["n_tokens"], np.int64),
        np.array(fields["n_bytes"], np.int64),
        fields["items"],
    )
