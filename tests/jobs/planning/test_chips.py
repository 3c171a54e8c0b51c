"""What a chip has, by the words of the compiler that will compile for it."""

import importlib.util
import re
import subprocess
import sys

import pytest

from jobs.planning.chips import CHIPS, GIB

TOO_LARGE = """
import os, sys
from jobs.planning.compiler import _devices, tpu_environment
version, topology = sys.argv[1:]
os.environ |= tpu_environment(version) | {"JAX_PLATFORMS": "cpu"}
import jax
where = jax.sharding.SingleDeviceSharding(_devices(f"{version}:{topology}")[0])
array = jax.ShapeDtypeStruct((300_000, 300_000), "float32", sharding=where)
jax.jit(lambda x: (x + 1).sum(0)).lower(array).compile()
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: `pip install 'tvq[plan]'`",
)
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("version", "topology"), [("v4", "2x2x1"), ("v5e", "2x4"), ("v5p", "2x2x1"), ("v6e", "2x4")]
)
def test_a_chips_memory_is_what_libtpu_hands_out(version: str, topology: str):
    ended = subprocess.run(
        [sys.executable, "-P", "-c", TOO_LARGE, version, topology],
        capture_output=True,
        text=True,
    )
    said = re.search(r"exceeds available HBM \(([\d.]+)G\)", ended.stderr)
    assert said, ended.stderr
    assert CHIPS[version].memory == int(float(said[1]) * GIB)
