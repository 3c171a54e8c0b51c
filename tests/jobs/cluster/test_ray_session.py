"""Ray where users have it: in a folder with spaces, and for nobody else to reach."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cluster.ray_session import ray_session
from jobs.errors import UserError

PROGRAM = """
from jobs.cluster.ray_session import ray_session

with ray_session(None, cpus=1):
    import ray

    @ray.remote
    class Worker:
        def variable(self):
            import os
            return os.environ["MARK"]

    worker = Worker.options(runtime_env={"env_vars": {"MARK": "set"}}).remote()
    print(ray.get(worker.variable.remote(), timeout=60), ray.nodes()[0]["NodeManagerAddress"])
"""


@pytest.mark.ray
@pytest.mark.timeout(150)
def test_worker_with_its_own_environment_starts_in_a_path_with_spaces(tmp_path):
    environment = tmp_path / "a place with spaces"
    environment.symlink_to(Path(sys.prefix), target_is_directory=True)
    python = environment / "bin" / "python"
    run = subprocess.run(
        [python, "-c", PROGRAM], capture_output=True, text=True, timeout=140, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["set", "127.0.0.1"]


def test_address_at_which_nothing_answers_is_told_at_once():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"  # bound, and nobody listens
        with (
            pytest.raises(UserError, match=rf"no Ray cluster answers at {address} "),
            ray_session(address, cpus=1),
        ):
            pass
