"""Gives JAX two CPU devices in the tests' own process, and checks `model`'s array signatures."""

import os
from unittest import mock

import jaxtyping

# Fixtures of every test folder.
from tests.services import bucket, object_store  # noqa: F401

# Before the first import of `model`.
jaxtyping.install_import_hook("model", "beartype.beartype")

# XLA reads its flags once, when the devices are first asked for: what tests start later does not
# inherit them. Compilation is what the tests of the model spend their time on: no optimisation
# halves it. A test that starts pytest with flags of its own keeps them.
XLA_FLAGS = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
XLA_FLAGS = os.environ.get("XLA_FLAGS", XLA_FLAGS)
with mock.patch.dict(os.environ, {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS}):
    import jax

    jax.devices()
