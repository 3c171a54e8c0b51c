"""What several commands of `tvq` share: options, and the console they print to."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.errors import UserError

if TYPE_CHECKING:
    from jobs.console import Console

Root = str | Path
"""Where the runs are: a folder, or the URL of one in a bucket."""

ROOT_HELP = "Folder of the runs, MLflow's store beside them, or gs://BUCKET/... (or set TVQ_ROOT)."


class OrderedGroup(click.Group):
    """Lists its commands in the order in which a user needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class _Root(click.Path):
    """A folder, or the URL of one in a bucket, which stays a string."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if isinstance(value, str) and "://" in value:
            return value
        return super().convert(value, param, ctx)


def root_option(command: Any) -> Any:
    """--root: where the runs are."""
    return click.option(
        "--root",
        type=_Root(file_okay=False, path_type=Path),
        default=Path("runs"),
        show_default=True,
        envvar="TVQ_ROOT",
        help=ROOT_HELP,
    )(command)


class Dashboard(click.ParamType):
    """The URL of a Ray cluster's dashboard."""

    name = "url"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        if "@" in value:
            raise UserError(
                "--address: holds a user or password, which would be shown; Ray takes a token from"
                " RAY_AUTH_TOKEN_PATH"
            )
        if not re.fullmatch(r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d{1,5})?(/.*)?", value):
            raise UserError(
                f"--address {value}: expected the URL of a Ray cluster's dashboard, such as"
                " http://127.0.0.1:8265"
            )
        return value.rstrip("/")


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def console(quiet: bool = False) -> "Console":
    """The console of this command; `quiet` besides what the user asked for."""
    from jobs.console import Console

    return Console(quiet=quiet or click.get_current_context().obj["quiet"])
