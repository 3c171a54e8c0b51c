"""Several devices compute what one does, and every leaf has its place."""

import functools

import jax
import numpy as np
import pytest

from model.config import ConfigError
from model.sharding import TABLE, batch_sharding, make_mesh, replicated, state_shardings
from model.training import train_step
from tests.model import toy

pytestmark = pytest.mark.compiles


@pytest.mark.parametrize("axes", [{"data": 2}, {"fsdp": 2, "data": 1}, {"tensor": 2, "data": 1}])
def test_two_devices_are_one(float64, axes):
    step = functools.partial(train_step, toy.MODEL64, toy.OPTIMIZER, 8)
    state, batch = toy.state(toy.MODEL64), toy.rows()
    expected, expected_metrics = jax.jit(step)(state, batch)

    mesh = make_mesh(jax.devices()[:2], **axes)
    shardings = state_shardings(mesh, state)
    out = (shardings, replicated(mesh))
    sharded = jax.jit(step, out_shardings=out)(
        jax.device_put(state, shardings), jax.device_put(batch, batch_sharding(mesh))
    )
    for path, actual, leaf in zip(
        jax.tree_util.tree_leaves_with_path(sharded),
        jax.tree.leaves(sharded),
        jax.tree.leaves((expected, expected_metrics)),
        strict=True,
    ):
        # Metrics are float32 whatever the model computes in.
        tolerance = 1e-9 if actual.dtype == np.float64 else 1e-5
        np.testing.assert_allclose(actual, leaf, atol=tolerance, err_msg=str(path[0]))


def test_parameters_and_their_moments_lie_alike():
    mesh = make_mesh(jax.devices()[:2], fsdp=2, data=1)
    state = jax.eval_shape(toy.state)
    leaves = jax.tree_util.tree_leaves_with_path(state_shardings(mesh, state))
    specs = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    for suffix, spec in TABLE:
        names = [name for name in specs if f"/{name}".endswith("/" + suffix)]
        assert len(names) == 3, (suffix, names)  # the parameter and Adam's two moments
        assert all(specs[name].spec == spec for name in names)
    whole = [name for name, leaf in specs.items() if leaf.is_fully_replicated]
    assert {name for name in whole if "codebook" in name} == {
        "codebooks/layers/codebook/counts",
        "codebooks/layers/codebook/sums",
    }


def test_a_mesh_that_does_not_fit_is_refused():
    devices = jax.devices()[:2]
    assert make_mesh(devices).shape == {"data": 2, "fsdp": 1, "tensor": 1}
    with pytest.raises(ConfigError, match=r"must make 2 devices, got 3 x 1 x 1"):
        make_mesh(devices, data=3)
    mesh = make_mesh(devices, tensor=2, data=1)
    state = {"layers": {"value": jax.ShapeDtypeStruct((2, 16, 11), np.float32)}}
    with pytest.raises(ConfigError, match=r"^cluster\.tensor: must divide 11 .*got 2"):
        state_shardings(mesh, state)
