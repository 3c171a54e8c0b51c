"""A flow's file: what is prepared, trained, compared and promoted, again and again.

    name: nightly
    prepare: ~/books --include '**/*.txt' --output corpora/books
    train: small training.steps=4000
    begin_from: champion
    promote: {metric: eval/bits_per_byte, min_delta: 0.0}

`prepare` and `train` are what a user would type after `tvq prepare` and `tvq train`.
"""

import contextlib
import dataclasses
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from jobs import recipe as recipes
from jobs.errors import UserError
from jobs.metric_names import DECIDING, EVAL_BITS
from jobs.recipe import Recipe
from jobs.recipe_yaml import dump_yaml, nearest, parse_sections, refuse_credentials
from pipeline.storage import is_url, open_store

BeginFrom = Literal["scratch", "champion"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Flow:
    """What a flow's file says."""

    name: str
    prepare: tuple[str, ...]
    """The arguments of `tvq prepare`."""
    train: tuple[str, ...]
    """The recipe, and overrides."""
    begin_from: BeginFrom = "scratch"
    """scratch: every training begins with random parameters. champion: with the champion's."""
    metric: str = EVAL_BITS
    """Of the validation split; lower is better."""
    min_delta: float = 0.0
    """By so much the champion must be beaten, at the least."""

    @property
    def corpus(self) -> str:
        """Folder that is prepared, or its URL."""
        return self.prepare_options()["output"]

    def prepare_options(self) -> dict[str, Any]:
        """The arguments of `tvq prepare`, read as the command reads them."""
        import click

        from jobs.cli.corpora import prepare

        try:
            with prepare.make_context("prepare", list(self.prepare)) as context:
                return dict(context.params)
        except click.ClickException as error:
            message = " ".join(error.format_message().split())
            raise UserError(f"flow {self.name}: prepare: {message}") from None
        except click.exceptions.Exit:  # --help
            raise UserError(
                f"flow {self.name}: prepare: expected the arguments of `tvq prepare`"
            ) from None

    def recipe(self, init_from: str | None = None) -> Recipe:
        """The recipe, on this flow's corpus.

        Raises:
            UserError: no such recipe or field, or an override of what the flow decides.
        """
        name, *overrides = self.train
        decided = ("data.corpus", "data.mixture", "training.init_from")
        for override in overrides:
            if override.startswith(tuple(f"{field}=" for field in decided)):
                raise UserError(
                    f"flow {self.name}: train: {override}: the flow decides this; leave it out"
                )
        overrides.append(f"data.corpus={self.corpus}")
        if init_from is not None:
            overrides.append(f"training.init_from={init_from}")
        return recipes.load(name, tuple(overrides))

    def absolute(self) -> "Flow":
        """The same flow from any working folder."""
        options = self.prepare_options()
        paths = {*options["sources"], options["output"]}

        def absolute(argument: str) -> str:
            name, equals, value = argument.partition("=")
            if name == "--output" and equals:
                return f"--output={_absolute(value)}"
            is_path = argument in paths or argument.endswith(".model")
            return _absolute(argument) if is_path else argument

        recipe, *overrides = self.train
        if "/" in recipe or recipe.endswith((".yaml", ".yml")):
            recipe = _absolute(recipe)
        prepare = tuple(absolute(argument) for argument in self.prepare)
        return dataclasses.replace(self, prepare=prepare, train=(recipe, *overrides))

    def to_yaml(self) -> str:
        """A file that `load_flow` reads as this flow."""
        return dump_yaml(
            {
                "name": self.name,
                "prepare": list(self.prepare),
                "train": list(self.train),
                "begin_from": self.begin_from,
                "promote": {"metric": self.metric, "min_delta": self.min_delta},
            }
        )


def load_flow(location: str | Path) -> Flow:
    """Reads and checks a flow's file, in a folder or in a bucket.

    Raises:
        UserError: there is none, or a field is wrong; names it.
    """
    where = f"flow {location}"
    flow = _flow(read_tree(location, where), Path(location).stem, where)
    with named(where):
        flow.recipe()  # refuses what is wrong with it now and not at two in the night
    return flow


@contextlib.contextmanager
def named(where: str) -> Iterator[None]:
    """What is wrong with the recipe that a file names is said of the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}", error.code) from None


def read_tree(location: str | Path, where: str) -> dict[str, Any]:
    """The fields of a YAML file, in a folder or in a bucket, without credentials."""
    folder, _, name = str(location).rpartition("/")
    try:
        text = open_store(folder or ("/" if str(location).startswith("/") else ".")).read(name)
        tree = parse_sections(text.decode("utf-8"), where)
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not a text file in UTF-8: {error}") from None
    refuse_credentials(tree, where)
    return tree


def _flow(tree: dict[str, Any], stem: str, where: str) -> Flow:
    known = ["name", "prepare", "train", "begin_from", "promote"]
    refuse_unknown(tree, known, where)
    promote = tree.get("promote") or {}
    if not isinstance(promote, dict):
        raise UserError(f"{where}: promote: expected metric and min_delta, got {promote!r}")
    refuse_unknown(promote, ["metric", "min_delta"], f"{where}: promote")
    begin_from = tree.get("begin_from", "scratch")
    if begin_from not in get_args(BeginFrom):
        raise UserError(f"{where}: begin_from: expected scratch or champion, got {begin_from!r}")
    metric, min_delta = promote.get("metric", EVAL_BITS), promote.get("min_delta", 0.0)
    if metric not in DECIDING:
        raise UserError(
            f"{where}: promote.metric: expected {' or '.join(DECIDING)}, got {metric!r}; the test"
            " split never decides"
        )
    if isinstance(min_delta, bool) or not isinstance(min_delta, int | float) or min_delta < 0:
        raise UserError(f"{where}: promote.min_delta: expected 0 or more, got {min_delta!r}")
    return Flow(
        name=name_of(tree, stem, where),
        prepare=words(tree, "prepare", where),
        train=words(tree, "train", where),
        begin_from=begin_from,
        metric=metric,
        min_delta=float(min_delta),
    )


def name_of(tree: dict[str, Any], stem: str, where: str) -> str:
    """The file's `name`, by default the file's own: folders, jobs and runs are called after it."""
    name = tree.get("name", stem)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(
            f"{where}: name: expected letters, digits, '.', '_', '-', beginning with a letter or"
            f" digit, at most 63, got {name!r}"
        )
    return name


def words(tree: dict[str, Any], field: str, where: str) -> tuple[str, ...]:
    """What follows a command on a command line: a text, or a list of words."""
    value = tree.get(field)
    if isinstance(value, str):
        try:
            value = shlex.split(value)
        except ValueError as error:
            raise UserError(f"{where}: {field}: {error}") from None
    if not isinstance(value, list) or not value or not all(isinstance(w, str) for w in value):
        raise UserError(
            f"{where}: {field}: expected what follows `tvq {field}` on a command line, got"
            f" {value!r}"
        )
    return tuple(value)


def refuse_unknown(tree: dict[str, Any], known: list[str], where: str) -> None:
    """Raises UserError for a field that is not known; names the nearest one."""
    for name in tree:
        if name not in known:
            close = nearest(str(name), known)
            raise UserError(f"{where}: {name}: no such field{close}; expected {', '.join(known)}")


def _absolute(path: str) -> str:
    return path if is_url(path) else os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111
