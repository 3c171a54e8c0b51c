"""From the rows that this host loads to arrays over the whole mesh."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from pipeline.loader import Batch


class GlobalBatch:
    """How a global batch lies on the mesh: which rows this host loads and where they go.

    Args:
        sharding: of an array [B, T]; rows are split, tokens are not.
        batch_size: B. Where what each device takes at once does not divide it, masked rows are
            added at its end.
        accumulate: micro-batches that a device's rows are taken in.
    """

    def __init__(self, sharding: NamedSharding, batch_size: int, accumulate: int = 1):
        self._sharding = sharding
        self._vector = NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(sharding.spec[0]))
        self._each = NamedSharding(
            sharding.mesh, jax.sharding.PartitionSpec(sharding.mesh.axis_names)
        )
        devices_along_rows = sharding.num_devices // _replicas(sharding)
        at_once = devices_along_rows * accumulate
        self.padded_size = -(-batch_size // at_once) * at_once
        index_map = sharding.addressable_devices_indices_map((self.padded_size, 1))
        held = {
            row
            for index in index_map.values()
            if index is not None
            for row in range(*index[0].indices(self.padded_size))
        }
        self.rows = np.array(sorted(held), np.int64)
        """Positions in the padded batch, [R], that this host's devices hold."""

    def place(self, local: Batch) -> Batch:
        """The batch of `rows` as global arrays [B', T] and [B'], B' being the padded size."""
        return Batch(*(self._placed(name, array) for name, array in local._asdict().items()))

    def flag(self, value: int) -> jax.Array:
        """This host's number as a vector [devices] over the mesh; its maximum is over all hosts.

        Not [B']: hosts that share rows under tensor parallelism would hold replicas that differ.
        """
        return _put(np.full((self._each.num_devices,), value, np.int32), self._each)

    def _placed(self, name: str, local: np.ndarray) -> Any:
        if name == "rows":  # a random key is folded with 32 bits; -1 marks padding
            local = local.astype(np.uint32)
        full = np.zeros((self.padded_size, *local.shape[1:]), local.dtype)
        full[self.rows] = local
        sharding = self._sharding if local.ndim == 2 else self._vector
        return _put(full, sharding)


def _put(full: np.ndarray, sharding: NamedSharding) -> jax.Array:
    # The one transfer to the devices that the loop means, under its guard against all others.
    with jax.transfer_guard("allow"):
        return jax.make_array_from_callback(full.shape, sharding, full.__getitem__)


def _replicas(sharding: NamedSharding) -> int:
    rows = sharding.spec[0]
    names = (rows,) if isinstance(rows, str) else tuple(rows or ())
    along = int(np.prod([sharding.mesh.shape[name] for name in names], dtype=int))
    return sharding.num_devices // along
