"""Files that are there whole or not at all, whenever the writer dies."""

import json
import os
import uuid
from pathlib import Path


def temporary_name(target: Path) -> Path:
    """A name beside `target` that nobody else uses and that no reader takes for a result."""
    return target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")


def replace_durably(temporary: Path, target: Path) -> None:
    """Give a finished (and synced) file its name, so that it is still there after a power cut."""
    temporary.replace(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """What was created or renamed in `folder` is still there after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(target: Path, value: object, indent: int | None = None) -> None:
    """Write a JSON file that is there whole or not at all; the same value gives the same bytes."""
    temporary = temporary_name(target)
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            # json.dump would encode in Python, not in C.
            text = json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False)
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        replace_durably(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
