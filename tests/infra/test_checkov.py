"""checkov over infra/, with what it is not to look at in infra/checkov.yaml."""

import os
import re
import shutil
import subprocess
import sysconfig

import pytest

from tests.infra.manifests import INFRA, ROOT


@pytest.mark.slow
def test_checkov_finds_nothing():
    # Not in an extra: it pins packages that ours need in other versions.
    places = [str(ROOT / "build/checkov/bin"), sysconfig.get_path("scripts"), os.environ["PATH"]]
    checkov = shutil.which("checkov", path=os.pathsep.join(places))
    if checkov is None:
        pytest.skip(
            "no checkov: python3 -m venv build/checkov && build/checkov/bin/pip install checkov"
        )
    ended = subprocess.run(
        [checkov, "--config-file", INFRA / "checkov.yaml", "--directory", INFRA],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stdout
    counts = re.findall(r"Passed checks: (\d+), Failed checks: (\d+)", ended.stdout)
    assert len(counts) == 3
    assert all(int(passed) > 30 and failed == "0" for passed, failed in counts)
