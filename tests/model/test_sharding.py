"""Several devices compute what one does, and every leaf has its place."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from model.config import ConfigError
from model.sharding import AXES, TABLE, abstract_state, make_mesh, state_shardings
from model.training import initial_state
from tests.model import toy

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

WIDE = replace(toy.MODEL, d_model=128, d_key=128, d_value=160)
HEADS = replace(toy.MODEL, d_feed_forward=24, n_heads=4, n_kv_heads=2)


@pytest.mark.compiles
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_on_eight_devices():
    """Runs the tests of `on_eight_devices.py`: this process has two."""
    # The second halves the time of compilation, which is most of it.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        [*program, HERE / "on_eight_devices.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]


def specs(model, optimizer=toy.OPTIMIZER, **axes):
    """The PartitionSpecs of a train state on two devices, by the names of its leaves."""
    mesh = make_mesh(jax.devices()[:2], **{"data": 1, **axes})
    state = abstract_state(mesh, model, lambda: initial_state(model, optimizer, 0))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def test_parameters_and_their_moments_lie_alike():
    found = {**specs(toy.MODEL, fsdp=2), **specs(HEADS, fsdp=2)}
    for suffix, spec in TABLE:
        names = [name for name in found if f"/{name}".endswith("/" + suffix)]
        # The parameter and Adam's two moments; codebooks are outside the optimizer.
        assert len(names) == (1 if "codebook" in suffix else 3), (suffix, names)
        assert len({found[name] for name in names}) == 1
        if not {"query_heads", "kv_heads"} & set(spec):
            assert found[names[0]] == spec
    assert found["updates"] == found["optimizer/adam/count"] == P()
    assert found["params/layers/feed_forward/norm/gain"] == P()


def test_heads_are_split_where_the_axis_divides_them():
    one, grouped = specs(toy.MODEL, tensor=2), specs(HEADS, tensor=2)
    multi_query = specs(replace(HEADS, n_kv_heads=1), tensor=2)
    odd = specs(replace(HEADS, n_heads=3, n_kv_heads=3), tensor=2)
    for name in ("params/layers/query", "optimizer/adam/mu/layers/query"):
        assert one[name] == odd[name] == P(None, "fsdp", None)
        assert grouped[name] == multi_query[name] == P(None, "fsdp", "tensor")
    for name in ("params/layers/key", "params/layers/distance"):
        assert one[name] == multi_query[name] == P(None, "fsdp", None)
        assert grouped[name] == P(None, "fsdp", "tensor")
    for name in ("params/layers/content_bias", "params/layers/position_bias"):
        assert one[name] == P(None, None)
        assert grouped[name] == multi_query[name] == P(None, "tensor")
    assert grouped["codebooks/layers/codebook/sums"] == P(None, "tensor", None, None)
    assert grouped["codebooks/layers/codebook/counts"] == P(None, "tensor", None)
    assert multi_query["codebooks/layers/codebook/sums"] == P(None, None, None, None)


def test_factored_moments_lie_as_the_axes_that_they_keep():
    found = specs(WIDE, replace(toy.OPTIMIZER, name="adafactor"), fsdp=2)
    expected = {
        # [2, 128, 160]: the means over the longest axis lie along the other one.
        "v_row/layers/value": P(None, "fsdp"),
        "v_col/layers/value": P(None, "tensor"),
        "v/layers/value": P(),
        # [2, 160, 128]
        "v_row/layers/output": P(None, "fsdp"),
        "v_col/layers/output": P(None, "tensor"),
        # [2, 128, 128]: of two of one length, the last counts as the longest.
        "v_row/layers/key": P(None, "fsdp"),
        "v_col/layers/key": P(None, None),
        # Not factored: 24 ids.
        "v/embedding/table": P(None, "fsdp"),
        "v_row/embedding/table": P(),
        "v_col/embedding/table": P(),
        "v/layers/content_bias": P(None, None),
        "v_row/layers/content_bias": P(),
        "v_col/layers/content_bias": P(),
    }
    moments = {name: found[f"optimizer/factored/{name}"] for name in expected}
    assert moments == expected


def test_a_mesh_that_does_not_fit_is_refused():
    devices = jax.devices()[:2]
    assert make_mesh(devices).shape == {"data": 2, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert AXES == ("data", "fsdp", "tensor", "sequence")
    with pytest.raises(ConfigError, match=r"must make 2 devices, got 3 x 1 x 1"):
        make_mesh(devices, data=3)
    mesh = make_mesh(devices, tensor=2, data=1)
    state = {"layers": {"value": jax.ShapeDtypeStruct((2, 16, 11), np.float32)}}
    with pytest.raises(ConfigError, match=r"^cluster\.tensor: must divide 11 .*got 2"):
        state_shardings(mesh, toy.MODEL, state)
