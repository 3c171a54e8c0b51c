"""The device mesh, and where each array of the train state lies on it.

Axes: `data` and `fsdp` split the rows of a batch; `fsdp` splits parameters too, which are gathered
where they are used (`gathered`), for XLA alone would rather gather the rows; `tensor` splits value
columns, their gate and the output projection, the inner width of feed-forward units, and heads
where it divides them. `sequence` is reserved: states of the compressive cache merge associatively,
so that devices could each read a part of a window and then take the prefixes; so far it is 1.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from model.config import ConfigError, ModelConfig

AXES = ("data", "fsdp", "tensor", "sequence")
ROWS = ("data", "fsdp")
"""The axes that split the rows of a batch."""
CONSTRAINT = "sharding_constraint"
"""What JAX calls the operation in a traced program."""

TABLE: tuple[tuple[str, P], ...] = (
    ("embedding/table", P(None, "fsdp")),
    ("layers/query", P(None, "fsdp", "query_heads")),
    ("layers/key", P(None, "fsdp", "kv_heads")),
    ("layers/distance", P(None, "fsdp", "kv_heads")),
    ("layers/content_bias", P(None, "query_heads")),
    ("layers/position_bias", P(None, "query_heads")),
    ("layers/value", P(None, "fsdp", "tensor")),
    ("layers/gate", P(None, "fsdp", "tensor")),
    ("layers/output", P(None, "tensor", "fsdp")),
    ("layers/feed_forward/expand", P(None, "fsdp", "tensor")),
    ("layers/feed_forward/contract", P(None, "tensor", "fsdp")),
    ("layers/codebook/sums", P(None, "kv_heads", None, None)),
    ("layers/codebook/counts", P(None, "kv_heads", None)),
    ("output/kernel", P("fsdp", None)),
)
"""The end of a leaf's path, and its axes. Names go for parameters, codebooks and their optimizer
moments alike; what is not here is whole on every device. The vocabulary is not split: 259
ids of bytes divide by nothing.

`query_heads` and `kv_heads` are axes of heads, or of columns that lie head by head: they are split
by `tensor` if it divides the heads, whole if not. A single head stays whole, because scores sum
over the columns of a head."""

_ADAFACTOR = re.compile(r"optimizer/factored/(v_row|v_col|v)/(.+)")


def make_mesh(
    devices: Sequence[jax.Device],
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
) -> Mesh:
    """A mesh of all the devices. One of data, fsdp and tensor may be -1: what is left.

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
    return Mesh(np.asarray(devices).reshape(*shape, 1), AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is the rows of a batch."""
    return NamedSharding(mesh, P(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of arrays that are whole on every device."""
    return NamedSharding(mesh, P())


def abstract_state(mesh: Mesh, model: ModelConfig, create: Callable[[], Any]) -> Any:
    """Shapes, dtypes and shardings of the train state that `create` makes, without making it.

    Raises ConfigError if an axis of the mesh does not divide an axis of a leaf.
    """
    shapes = jax.eval_shape(create)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, model, shapes),
    )


def state_shardings(mesh: Mesh, model: ModelConfig, state: Any) -> Any:
    """The sharding of every leaf of a tree with named paths, by TABLE.

    `state` is a TrainState of arrays or of their shapes, or any part of one; Adafactor's part
    needs the parameters beside it. Raises ConfigError if an axis of the mesh does not divide an
    axis of a leaf.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves
    }
    axes = _head_axes(mesh, model)
    shardings = []
    for name, shape in shapes.items():
        spec = P(*(axes.get(axis, axis) for axis in _partition_spec(name, shapes)))
        if spec != P():
            _check_divides(mesh, name, shape, spec)
        shardings.append(NamedSharding(mesh, spec))
    return jax.tree.unflatten(structure, shardings)


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which when jit traces it knows the mesh: `by_row` and `gathered` act within."""

    @functools.wraps(function)
    def traced(*arguments: Any, **options: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments, **options)

    return traced


def by_row(x: Any) -> Any:
    """Activations, rows first: each device keeps to its own, and has them whole.

    Left alone, XLA takes the split of the parameters' axes over to the activations, and each device
    computes the rows of its whole `fsdp` group (`pg19` on 64 devices, fsdp 32: 80 times the bytes
    that parameters and gradients are). x itself unless `fsdp` splits parameters.
    """
    if _fsdp_mesh() is None:
        return x
    return lax.with_sharding_constraint(x, P(ROWS))


def gathered(
    parameters: Any, name: str, model: ModelConfig, *, dtype: str | None = None, layer: bool = False
) -> Any:
    """Parameters as they are used: not split by `fsdp`. Their gradients are summed over all rows
    and split again. Given back as they are unless `fsdp` splits parameters.

    Args:
        parameters: an array, or a nested dict of arrays.
        name: its path in the network.
        model: of the recipe.
        dtype: that the parameters which travel are used in, so that they travel in it.
        layer: of one layer: the axis of layers is gone.
    """
    mesh = _fsdp_mesh()
    if mesh is None:
        return parameters
    axes = _head_axes(mesh, model)

    def gather(path: Any, leaf: jax.Array) -> jax.Array:
        end = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = _partition_spec(f"{name}/{end}" if end else name, {})
        if "fsdp" not in spec:
            return leaf
        split = [axes.get(axis, axis) for axis in spec[1 if layer else 0 :]]
        whole = [None if axis == "fsdp" else axis for axis in split]
        # The first of the two is for the gradient, which takes them in the opposite order.
        leaf = lax.with_sharding_constraint(leaf.astype(dtype or leaf.dtype), P(*split))
        return lax.with_sharding_constraint(leaf, P(*whole))

    return jax.tree_util.tree_map_with_path(gather, parameters)


def gathered_again(layer: Callable[..., Any]) -> Callable[..., Any]:
    """A layer that does not keep the parameters that it gathered for its backward pass: of all the
    layers they would be the whole network on each device. The layer itself unless `fsdp` splits
    parameters."""
    if _fsdp_mesh() is None:
        return layer
    return jax.checkpoint(layer, policy=lambda primitive, *_, **__: primitive.name != CONSTRAINT)


def _fsdp_mesh() -> AbstractMesh | None:
    """The mesh that jit traces on, if `fsdp` splits parameters on it."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.shape.get("fsdp", 1) > 1 else None


def _head_axes(mesh: Mesh | AbstractMesh, model: ModelConfig) -> dict[str | None, str | None]:
    """What the table's axes of heads are on this mesh."""
    heads = {"query_heads": model.n_heads, "kv_heads": model.kv_heads}
    return {
        axis: "tensor" if n_heads > 1 and n_heads % mesh.shape["tensor"] == 0 else None
        for axis, n_heads in heads.items()
    }


def _partition_spec(name: str, shapes: dict[str, tuple[int, ...]]) -> P:
    """The axes of the leaf of that name, in the table's words."""
    spec = next((spec for suffix, spec in TABLE if f"/{name}".endswith(f"/{suffix}")), P())
    moment = _ADAFACTOR.fullmatch(name)
    if moment is None or spec == P():
        return spec
    return _moment_spec(moment[1], spec, shapes[name], shapes[f"params/{moment[2]}"])


def _moment_spec(moment: str, spec: P, shape: tuple[int, ...], parameter: tuple[int, ...]) -> P:
    """The axes of one of Adafactor's moments, from those of its parameter.

    A factored parameter has means over its longest axis in v_row and over the second longest in
    v_col, the layers' axis aside, and a placeholder of size 1 in v; another has v whole and two
    placeholders. (Of axes of one length, the last is the longest.)
    """
    if moment == "v":
        return spec if shape == parameter else P()
    first = len(parameter) - 2
    by_length = first + np.argsort(parameter[first:], kind="stable")
    dropped = by_length[-1 if moment == "v_row" else -2]
    if shape != parameter[:dropped] + parameter[dropped + 1 :]:
        return P()
    return P(*spec[:dropped], *spec[dropped + 1 :])


def _check_divides(mesh: Mesh, name: str, shape: tuple[int, ...], spec: P) -> None:
    for size, axis in zip(shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ConfigError(
                f"cluster.{axis}: must divide {size} (an axis of {name}, {shape}), "
                f"got {mesh.shape[axis]}"
            )
