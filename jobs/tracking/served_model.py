"""What `mlflow.pyfunc.load_model("models:/NAME@champion")` runs: a copy lies in the model's folder.

It needs tvq installed. `predict` takes rows with a column `text`, and `params`: `task` is
"generate" (the default; with tokens, temperature, top_k, top_p, min_p, seed, as `tvq sample` takes
them) or "score" (nats and bits per byte of each text).
"""

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from jobs.registry.text_model import TextModel

DEFAULTS: dict[str, Any] = {
    "task": "generate",
    "tokens": 256,
    "temperature": 0.8,
    "top_k": 0,
    "top_p": 0.95,
    "min_p": 0.0,
    "seed": 0,
}


class ServedModel(PythonModel):
    """A registered model behind MLflow's interface."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads weights, recipe and tokenizer, verified."""
        self._model = TextModel.load(Path(context.artifacts["model"]))

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        context: PythonModelContext,  # MLflow looks for this name
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """A row for each text: `text` that follows it, or `nats`, `tokens`, `bits_per_byte`."""
        options = DEFAULTS | (params or {})
        texts = [str(text).encode() for text in model_input["text"]]
        if options["task"] == "score":
            scores = [self._model.score(text) for text in texts]
            rows = [(s.nats, s.tokens, s.n_bytes, s.bits_per_byte) for s in scores]
            return pd.DataFrame(rows, columns=["nats", "tokens", "bytes", "bits_per_byte"])
        if options["task"] != "generate":
            raise ValueError(f"task: expected generate or score, got {options['task']!r}")
        from model.sampling import Filters

        filters = Filters(*(options[name] for name in ("temperature", "top_k", "top_p", "min_p")))
        written = self._model.generate(texts, options["tokens"], options["seed"], filters)
        return pd.DataFrame({"text": [text.decode(errors="replace") for text in written]})


set_model(ServedModel())
