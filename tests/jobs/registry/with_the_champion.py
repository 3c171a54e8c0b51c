"""What the champion of model `plays` writes and scores in a fresh process, loaded by MLflow."""

import json
import os
import subprocess
import sys
from pathlib import Path


def served(uri: str, texts: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """The process, ended: its last line tells `text` and the scores of each."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    return subprocess.run(
        [sys.executable, "-m", "tests.jobs.registry.with_the_champion", json.dumps(texts)],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def main(texts: list[str]) -> None:
    import mlflow
    import pandas as pd

    model = mlflow.pyfunc.load_model("models:/plays@champion")
    frame = pd.DataFrame({"text": texts})
    written = model.predict(frame, params={"tokens": 20, "seed": 5, "temperature": 1.0})
    score = model.predict(frame, params={"task": "score"})
    print(json.dumps({"text": written["text"].tolist(), **score.to_dict("list")}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
