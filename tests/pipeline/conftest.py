"""Ray for the tests of `prepare`, and Hypothesis without chance."""

import logging
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "tvq",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tvq")


def _short_folder():
    """A folder of Ray's, with a short path because sockets lie in it."""
    folder = tempfile.mkdtemp(prefix="tvq-ray-")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


ray_short_folder = pytest.fixture(_short_folder)
ray_local_folder = pytest.fixture(scope="module")(_short_folder)


@pytest.fixture(scope="module")
def ray_local(ray_local_folder):
    """Ray with 2 CPUs on the loopback device; ends with the module, so others can start theirs."""
    import ray

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 * 2**20,
        _node_ip_address="127.0.0.1",
        _temp_dir=ray_local_folder,
    )
    yield ray
    ray.shutdown()
