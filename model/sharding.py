"""The device mesh, and where each array of the train state lies on it.

Axes: `data` and `fsdp` split the rows of a batch; `fsdp` splits parameters too, which are gathered
where they are used; `tensor` splits the value columns, their gate and the output projection.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from model.config import ConfigError

AXES = ("data", "fsdp", "tensor")

TABLE: tuple[tuple[str, P], ...] = (
    ("embedding/table", P(None, "fsdp")),
    ("layers/query", P(None, "fsdp", None)),
    ("layers/key", P(None, "fsdp", None)),
    ("layers/distance", P(None, "fsdp", None)),
    ("layers/value", P(None, "fsdp", "tensor")),
    ("layers/gate", P(None, "fsdp", "tensor")),
    ("layers/output", P(None, "tensor", "fsdp")),
    ("output/kernel", P("fsdp", None)),
)
"""The end of a leaf's path, and its axes. Names go for parameters, codebooks and their optimizer
moments alike; what is not here is whole on every device. The vocabulary is not split: 259
ids of bytes divide by nothing."""


def make_mesh(
    devices: Sequence[jax.Device], *, data: int = -1, fsdp: int = 1, tensor: int = 1
) -> Mesh:
    """A mesh of all the devices. One axis may be -1: what is left.

    Raises ConfigError if the axes do not multiply to the number of devices.
    """
    shape = [data, fsdp, tensor]
    rest = math.prod(n for n in shape if n != -1)
    if shape.count(-1) == 1 and rest > 0 and len(devices) % rest == 0:
        shape[shape.index(-1)] = len(devices) // rest
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise ConfigError(
            f"cluster: data x fsdp x tensor must make {len(devices)} devices, "
            f"got {data} x {fsdp} x {tensor}"
        )
    return Mesh(np.asarray(devices).reshape(shape), AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is the rows of a batch."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of arrays that are whole on every device."""
    return NamedSharding(mesh, P())


def state_shardings(mesh: Mesh, abstract_state: Any) -> Any:
    """The sharding of every leaf of a tree with named paths, by TABLE.

    `abstract_state` is a TrainState, or any part of one, of arrays or of their shapes.
    Raises ConfigError if an axis of the mesh does not divide an axis of a leaf.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _leaf_sharding(mesh, _path_name(path), leaf.shape), abstract_state
    )


def _path_name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaf_sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    for suffix, spec in TABLE:
        if ("/" + name).endswith("/" + suffix):
            _check_divides(mesh, name, shape, spec)
            return NamedSharding(mesh, spec)
    return replicated(mesh)


def _check_divides(mesh: Mesh, name: str, shape: tuple[int, ...], spec: P) -> None:
    for size, axis in zip(shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ConfigError(
                f"cluster.{axis}: must divide {size} (an axis of {name}, {shape}), "
                f"got {mesh.shape[axis]}"
            )
