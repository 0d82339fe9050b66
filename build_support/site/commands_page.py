"""The page commands.md, made from the command line's own parsers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer

from stream_r1.cli import app

_LIST = re.compile(r"<list\[(.+)\]>")  # of an option that may be given several times
_HEAD = """# Commands

Each takes `-h`. Errors are one line on stderr and exit code 2; `--debug` shows the traceback. Ctrl-C ends a
command with 130.
"""


def page() -> str:
    parts = [_HEAD]
    for name, command in _commands("stream-r1", typer.main.get_command(app)):
        parts.append(_section(name, command))
    return "\n".join(parts)


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its whole name."""
    below = getattr(command, "commands", None)
    if below is None:
        yield name, command
        return
    for key, child in below.items():
        if not child.hidden:
            yield from _commands(f"{name} {key}", child)


def _section(name: str, command: Any) -> str:
    context = command.context_class(command, info_name=name)
    usage = " ".join(command.get_usage(context).removeprefix("Usage:").split())
    lines = [f"## {name.removeprefix('stream-r1 ')}", "", f"    {usage}", "", command.help.strip(), ""]
    rows = [_row(parameter, context) for parameter in command.params]
    if rows:
        lines += ["| | |", "|---|---|", *rows]
    return "\n".join([*lines, ""])


def _row(parameter: Any, context: Any) -> str:
    names, text = parameter.get_help_record(context)
    names = _LIST.sub(r"<\1>", names)
    if parameter.param_type_name == "argument":
        names = names.split(" <")[0]  # without the type: the text says what it is
    return f"| `{names}` | {_cell(text)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("[", "\\[")
