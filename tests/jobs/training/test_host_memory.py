"""A step's memory is there already when the next one begins."""

import platform
import subprocess
import sys

import pytest

_PAGES_OF_A_STEP = 100 * 2**20 // 4096

_PROGRAM = """
import resource

from jobs.training.host_memory import keep_freed_memory

keep_freed_memory()

import jax
import jax.numpy as jnp


@jax.jit
def step(x):  # the square, 100 MiB, is written and read back: it has to be somewhere
    square = lambda x: jax.lax.optimization_barrier(x[:, None] * x)
    return jnp.sum(square(x) @ x)


x = jnp.ones(5120)
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_steps_take_no_fresh_pages() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True
    )
    faults = [int(word) for word in done.stdout.split()]
    assert sum(faults[4:]) < _PAGES_OF_A_STEP, faults
