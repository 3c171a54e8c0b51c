"""The code of this tvq as one wheel, for a cluster that is to run the same."""

import io
import json
import subprocess
import sys
import tempfile
import urllib.parse
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import NamedTuple

from jobs.errors import UserError

PACKAGES = ("pipeline", "model", "jobs", "infra")
MOST_BYTES = 8 * 2**20
"""A wheel beyond this holds something that is no code; ours has 1 MiB."""


class Wheel(NamedTuple):
    """A wheel in memory. The same code gives the same bytes."""

    name: str
    data: bytes
    files: int


def built_wheel() -> Wheel:
    """The wheel of the tvq that is running: of its checkout as it is now, or as it is installed.

    Raises:
        UserError: it cannot be built, or holds what a wheel of tvq has no reason to.
    """
    ours = distribution("tvq")
    checkout = _checkout(ours)
    wheel = _of_checkout(checkout) if checkout else _of_installation(ours)
    if len(wheel.data) > MOST_BYTES:
        raise UserError(
            f"{wheel.name}: has {len(wheel.data) / 2**20:.1f} MiB, expected under"
            f" {MOST_BYTES / 2**20:.0f} of code; its largest file is {_largest(wheel.data)}; remove"
            " it from the package"
        )
    return wheel


def _checkout(ours: Distribution) -> Path | None:
    """The folder that an editable installation points to."""
    origin = json.loads(ours.read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return None
    return Path(urllib.parse.unquote(urllib.parse.urlsplit(origin["url"]).path))


def _of_checkout(checkout: Path) -> Wheel:
    with tempfile.TemporaryDirectory(prefix="tvq-wheel-") as folder:
        built = subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
            cwd=checkout,
            capture_output=True,
            text=True,
            check=False,
        )
        paths = list(Path(folder).glob("*.whl"))
        if built.returncode or len(paths) != 1:
            last = (built.stderr.strip() or built.stdout.strip()).splitlines()[-1:]
            raise UserError(
                f"{checkout}: no wheel can be built of it ({''.join(last)}); run"
                f" `{sys.executable} -m hatchling build -t wheel` there"
            )
        data = paths[0].read_bytes()
        return Wheel(paths[0].name, data, len(zipfile.ZipFile(io.BytesIO(data)).namelist()))


def _of_installation(ours: Distribution) -> Wheel:
    """Packed again from the files that pip put there."""
    stored = io.BytesIO()
    names = []
    with zipfile.ZipFile(stored, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(ours.files or [], key=str):
            top = file.parts[0]
            if top not in PACKAGES and not top.endswith(".dist-info"):
                continue  # the console script
            if file.suffix == ".pyc" or file.name in ("INSTALLER", "REQUESTED", "direct_url.json"):
                continue
            # A fixed date: equal code is one upload.
            info = zipfile.ZipInfo(str(file), (2020, 2, 2, 0, 0, 0))
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(info, file.read_binary())
            names.append(str(file))
    return Wheel(f"tvq-{ours.version}-py3-none-any.whl", stored.getvalue(), len(names))


def _largest(data: bytes) -> str:
    infos = zipfile.ZipFile(io.BytesIO(data)).infolist()
    return max(infos, key=lambda info: info.compress_size).filename
