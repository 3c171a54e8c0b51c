"""A checkpoint's parameters and codebooks as one safetensors file.

The file holds the arrays by name (`params.embedding.table`, `codebooks...`), and as metadata the
recipe, the update, the run, the fingerprints of the corpus and the sum of every array. Reading it
runs no code of anybody's.
"""

import json
import struct
from typing import Any, NamedTuple

from jobs import recipe as recipes
from jobs.errors import UserError
from jobs.recipe import Recipe
from pipeline.errors import CorpusError
from pipeline.storage import Location, open_store

FORMAT_VERSION = 1
_LONGEST_HEADER = 100 * 1024 * 1024


class Exported(NamedTuple):
    """What such a file says of its arrays."""

    recipe: Recipe
    update: int
    run_key: str
    """Of the run that it was exported from."""
    fingerprints: dict[str, str]
    """Of the splits of that run's corpus."""
    sums: dict[str, int]
    """`jobs.checkpoints.restore.leaf_sums` of the arrays, by their paths in a train state."""


def is_exported_file(place: str) -> bool:
    """Whether a place is that of a file and not of a run: by its name, also when it is gone."""
    return place.endswith(".safetensors")


def named_leaves(network: Any) -> dict[str, Any]:
    """The leaves of parameters and codebooks under the names that they have in the file."""
    import jax

    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(network)
    }


def encode(arrays: dict[str, Any], exported: Exported) -> bytes:
    """The bytes of the file."""
    from safetensors.numpy import save

    metadata = {
        "tvq_format": str(FORMAT_VERSION),
        "update": str(exported.update),
        "run_key": exported.run_key,
        "recipe": recipes.to_yaml(exported.recipe),
        "fingerprints": json.dumps(exported.fingerprints),
        "sums": json.dumps(exported.sums),
    }
    return save(arrays, metadata)


def read_exported(place: Location) -> tuple[dict[str, Any], Exported]:
    """The arrays of a file, by name, and what it says of them, which is not compared here.

    Raises:
        UserError: it is not there, is not such a file, or has a newer format.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    folder, _, name = open_store(place).location.rpartition("/")
    try:
        data = open_store(folder or "/").read(name)
        arrays, metadata = load(data), _metadata(data)
    except FileNotFoundError:
        raise UserError(f"{place}: there is no such file") from None
    except CorpusError as error:
        raise UserError(str(error)) from None
    except (SafetensorError, ValueError, struct.error) as error:
        raise UserError(f"{place}: cannot be read as a safetensors file: {error}") from None
    if "tvq_format" not in metadata:
        raise UserError(f"{place}: was not written by `tvq checkpoints export`")
    if metadata["tvq_format"] != str(FORMAT_VERSION):
        raise UserError(
            f"{place}: format {metadata['tvq_format']}, this tvq reads {FORMAT_VERSION}; upgrade"
            " tvq"
        )
    try:
        exported = Exported(
            recipe=recipes.from_yaml(metadata["recipe"], f"the recipe in {place}"),
            update=int(metadata["update"]),
            run_key=str(metadata["run_key"]),
            fingerprints=json.loads(metadata["fingerprints"]),
            sums={str(key): int(value) for key, value in json.loads(metadata["sums"]).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{place}: its metadata is damaged: {error!r}") from None
    return arrays, exported


def _metadata(data: bytes) -> dict[str, str]:
    [length] = struct.unpack_from("<Q", data)
    if length > _LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    return json.loads(data[8 : 8 + length]).get("__metadata__") or {}
