"""`headrace run`, `plugins`, `settings`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from headrace import plugins as found
from headrace import runner
from headrace.cli.show import out, print_json
from headrace.errors import USAGE
from headrace.settings import load, shown, table

Names = Annotated[
    list[str] | None, typer.Argument(metavar="NAME...", help="Consumers, by the names that `headrace plugins` lists.")
]
Files = Annotated[
    list[str] | None,
    typer.Option("--consumer", metavar="FILE.py:CLASS", help="A consumer in one file; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def run(names: Names = None, consumer: Files = None) -> None:
    """Run consumers in this process until Ctrl-C or SIGTERM.

    Each keeps its view at its own position and goes on where its store says.

    Exit codes: 0 it was asked to stop; 2 no consumer is named; 3 something must be changed; 4 a record cannot be applied;
    5 a server does not answer at the start.

    Examples:

        headrace run search

        headrace run search pages warehouse

        headrace run --consumer ./my_view.py:MyView
    """
    chosen = {name: found.load(name) for name in names or []} | found.load_files(consumer or [], names or [])
    if not chosen:
        typer.echo("Name a consumer (headrace plugins lists them) or give --consumer FILE.py:CLASS.", err=True)
        raise typer.Exit(USAGE)
    runner.run(load(), chosen, typer.echo)


def plugins(json: AsJson = False) -> None:
    """List the consumers that are installed.

    Exit codes: 0 listed.

    Example:

        headrace plugins --json
    """
    rows = [
        {"name": name, "object": entry.value, "package": _package(entry)} for name, entry in found.installed().items()
    ]
    if json:
        print_json(rows)
        return
    shown = Table("consumer", "object", "package")
    for row in rows:
        shown.add_row(row["name"], row["object"], row["package"])
    out.print(shown)


def settings(json: AsJson = False) -> None:
    """List every setting with its value here, its default and its meaning.

    Exit codes: 0 listed; 3 a setting is unknown or has a bad value.

    Example:

        headrace settings
    """
    now = load()
    rows = [
        {"setting": name, "value": shown(name, str(getattr(now, name[9:].lower()))), "default": default, "meaning": doc}
        for name, default, doc in table()
    ]
    if json:
        print_json(rows)
        return
    listed = Table("setting", "value", "default", "meaning")
    listed.columns[0].no_wrap = True  # it is what one looks for, at 80 columns too
    for column in listed.columns:
        column.overflow = "fold"
    for row in rows:
        listed.add_row(
            row["setting"], row["value"], row["default"] if row["default"] != row["value"] else "", row["meaning"]
        )
    out.print(listed)


def _package(entry: object) -> str:
    dist = getattr(entry, "dist", None)
    return f"{dist.name} {dist.version}" if dist else ""
