"""The command line: `headrace`.

Commands come from two places: this package, and whatever a service adds by the entry-point group `headrace.commands`
(a function becomes one command, a `typer.Typer` a group of them). Exit codes are those of `headrace.errors`.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import typer
from rich.console import Console

from headrace import errors

app = typer.Typer(
    name="headrace",
    help="Write once to Postgres; keep every view in step.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def add_commands() -> None:
    """Add the commands of every installed service."""
    for entry in sorted(entry_points(group="headrace.commands"), key=lambda e: e.name):
        command = entry.load()
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=entry.name)
        else:
            app.command(entry.name)(command)


def main() -> None:
    """Run the command line; print an error of ours in three lines, never as a traceback."""
    add_commands()
    try:
        app()
    except errors.HeadraceError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(errors.INTERRUPTED)


def print_error(error: errors.HeadraceError) -> None:
    """Print what was seen, what to do, and where to read more."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[red]error:[/red] {error.message}", markup=True)
    if error.remedy:
        console.print(f"  [bold]do:[/bold] {error.remedy}")
    console.print(f"  [dim]code {error.code}: see ops/runbook.md[/dim]")
