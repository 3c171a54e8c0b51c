"""`tvq doctor`: looks at everything that a training needs, and says what mends what is wrong."""

import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jobs import recipe as recipes
from jobs.console import Console
from jobs.errors import UserError
from jobs.recipe import Recipe
from jobs.tracking.store import without_credentials
from pipeline.storage import Location


class Finding(NamedTuple):
    """What was looked at, and what was found."""

    what: str
    found: str
    mend: str = ""
    """The command or setting that mends it; empty: it is well."""

    @property
    def ok(self) -> bool:
        """Whether there is nothing to mend."""
        return not self.mend


def doctor_command(
    recipe_name: str | None,
    overrides: tuple[str, ...],
    *,
    address: str | None,
    root: Location,
    tracking_uri: str | None,
    console: Console,
    as_json: bool,
) -> None:
    """Prints a line for each finding.

    Args:
        recipe_name: whose workers the cluster is to have room for; None: any.
        address: of Ray; None: it is not looked at.
        tracking_uri: of MLflow; None: that beside the runs.

    Raises:
        UserError: something is to be mended.
    """
    recipe = recipes.load(recipe_name, overrides) if recipe_name else None
    findings = []
    for finding in examine(recipe, address, root, tracking_uri):
        clean = Finding(*map(redacted, finding))
        findings.append(clean)
        if not as_json:
            mark = "ok  " if clean.ok else "MEND"
            console.result(f"{mark}  {clean.what:<10}  {clean.found}")
            if not clean.ok:
                console.result(f"                  -> {clean.mend}")
    if as_json:
        console.json([finding._asdict() | {"ok": finding.ok} for finding in findings])
    if sick := [finding.what for finding in findings if not finding.ok]:
        raise UserError(f"to be mended: {', '.join(dict.fromkeys(sick))}")


def examine(
    recipe: Recipe | None, address: str | None, root: Location, tracking_uri: str | None
) -> Iterator[Finding]:
    """The findings, one after the other; a defect of an examination is a finding too."""
    from jobs.doctor import machine_checks, service_checks

    cluster = recipe.cluster if recipe else None
    uri = (recipe.tracking.uri if recipe else None) or tracking_uri
    examinations: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", machine_checks.versions),
        ("devices", machine_checks.devices),
        ("disk", lambda: machine_checks.disk(root)),
        ("time zone", machine_checks.time_zone),
        ("runs", lambda: service_checks.store(root)),
        ("mlflow", lambda: service_checks.mlflow(uri, root)),
        ("clock", lambda: service_checks.clock(uri, root)),
        ("ray", lambda: service_checks.ray(address, cluster)),
    ]
    for what, examination in examinations:
        try:
            yield from examination()
        except Exception as error:
            yield Finding(what, f"could not be examined: {error!r}", "report it: a defect of tvq")


_SECRET_NAME = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN(?!_PATH)|API_?KEY|CREDENTIALS_JSON")


def redacted(text: str) -> str:
    """`text` without passwords in URLs and without what the environment keeps secret."""
    for name, value in os.environ.items():
        if len(value) >= 4 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return without_credentials(text)
