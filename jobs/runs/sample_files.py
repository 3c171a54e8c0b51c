"""`<run>/samples/`: what a model wrote while it was trained, as files that are sent to MLflow."""

import re

from pipeline.storage import Store

SAMPLES = "samples"
"""Their folder, in the run's and in MLflow."""
_NAME = re.compile(r"\d{8,}\.(txt|png)")


def sample_files(run: Store) -> list[str]:
    """Their names in the run directory's store, by update, without the folder."""
    names = (entry.name for entry in run.child(SAMPLES).list())
    return [name for name in names if _NAME.fullmatch(name)]
