"""Command lines as the help and the README show them."""

import re
import shlex

import click

from jobs.cli.main import cli


def shown_in(text: str) -> list[list[str]]:
    """The words behind `tvq` of each command shown; a long one goes on after a backslash.

    What stands behind two spaces explains the command.
    """
    lines = re.sub(r"\\\n\s+", "", text).splitlines()
    return [
        shlex.split(command)[1:]
        for line in lines
        if (shown := line.strip().split("  ")[0]).startswith("tvq ")
        for command in shown.split(" && ")
    ]


def parse(words: list[str]) -> None:
    """Has click read a command, and runs nothing.

    Raises:
        click.ClickException: there is no such command, option or choice, or an argument is missing.
    """
    command: click.Command = cli
    context = click.Context(cli, info_name="tvq")
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, words)
        assert found is not None
        command = found
        if isinstance(command, click.Group):
            context = click.Context(command, context, name)
        else:
            command.make_context(name, words, parent=context)


def commands_of(group: click.Group, *names: str) -> dict[tuple[str, ...], click.Command]:
    """Every command that the help lists, groups included, by the words that call it."""
    found: dict[tuple[str, ...], click.Command] = {}
    for name, command in group.commands.items():
        if not command.hidden:
            found[*names, name] = command
        if isinstance(command, click.Group):
            found |= commands_of(command, *names, name)
    return found
