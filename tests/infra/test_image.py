"""infra/image: what can be said of images where no engine builds them."""

import os
import re
import shutil
import subprocess
import sysconfig

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sqlalchemy.engine import make_url

from tests.infra.manifests import INFRA
from tests.test_house import PROJECT, locked

IMAGE = INFRA / "image"
DOCKERFILE = (IMAGE / "Dockerfile").read_text()


def stages() -> dict[str, str]:
    parts = re.split(r"^FROM (\S+) AS (\w+)$", DOCKERFILE, flags=re.MULTILINE)
    return {parts[i + 1]: parts[i + 2] for i in range(1, len(parts), 3)}


def test_hadolint_finds_nothing():
    scripts = sysconfig.get_path("scripts")
    hadolint = shutil.which("hadolint", path=f"{scripts}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("the extra `infra` brings hadolint")
    ended = subprocess.run(
        [hadolint, IMAGE / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout
    bad = DOCKERFILE.replace("--no-cache-dir ", "")
    ended = subprocess.run([hadolint, "-"], input=bad, capture_output=True, text=True, check=False)
    assert "DL3042" in ended.stdout


@pytest.mark.parametrize("target", ["cpu", "gpu", "tpu"])
def test_a_target_is_its_lock_and_the_wheel_and_not_root(target: str):
    stage = stages()[target]
    assert f"infra/image/{target}.lock" in stage
    assert "--require-hashes" in stage
    assert "/wheel/*.whl" in stage
    assert re.search(r"^USER 10001$", stage, re.MULTILINE)
    assert "COPY" not in stage


def test_what_all_targets_inherit():
    base = stages()["base"]
    assert "HEALTHCHECK" in base
    assert "useradd --uid 10001" in base
    [image] = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"python:3\.1[123]\.\d+-slim-\w+", image)
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)[:2] == ["${PYTHON_IMAGE}"] * 2


def lock_of(target: str) -> dict[str, Requirement]:
    text = (IMAGE / f"{target}.lock").read_text().replace("\\\n", " ")
    assert "://" not in text
    found = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        requirement, *hashes = re.split(r"\s+--hash=", line)
        assert hashes
        found[canonicalize_name(Requirement(requirement).name)] = Requirement(requirement)
    return found


@pytest.mark.parametrize(
    ("target", "extras", "needs"),
    [
        ("cpu", ("server",), {"psycopg2-binary", "flask-wtf", "opencensus"}),
        ("gpu", ("gpu",), {"jax-cuda13-plugin", "opencensus"}),
        ("tpu", ("tpu",), {"libtpu", "opencensus"}),
    ],
)
def test_a_lock_is_of_the_versions_that_the_tests_ran_with(
    target: str, extras: tuple[str, ...], needs: set[str]
):
    lock = lock_of(target)
    assert needs <= lock.keys()
    # What the tests run with, the image has in the same version; the lock of all Pythons may have
    # several of a package.
    ours: dict[str, set[str]] = {}
    for requirement, _ in locked():
        ours.setdefault(canonicalize_name(requirement.name), set()).add(str(requirement.specifier))
    for name, requirement in lock.items():
        assert name not in ours or str(requirement.specifier) in ours[name], name
    for text in PROJECT["dependencies"] + [
        text for extra in extras for text in PROJECT["optional-dependencies"][extra]
    ]:
        wanted = Requirement(text)
        [version] = lock[canonicalize_name(wanted.name)].specifier
        assert version.version in wanted.specifier


def test_the_mlflow_image_has_the_driver_of_each_address_of_a_database():
    texts = [path.read_text() for path in INFRA.rglob("*") if path.suffix in (".yaml", ".ini")]
    found = [re.findall(r"postgresql[\w+]*://[^\s\"\]]+", text) for text in texts]
    addresses = {address for each in found for address in each}
    assert addresses
    for address in addresses:
        driver = make_url(address).get_driver_name()
        assert {driver, f"{driver}-binary"} & lock_of("cpu").keys(), address
