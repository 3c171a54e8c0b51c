"""Double precision for the tests of the model."""

import jax
import pytest


@pytest.fixture
def float64():
    """Everything in double precision inside the test."""
    with jax.enable_x64(True):
        yield
