"""The command line: `headrace`.

Commands come from two places: this package, and whatever a service adds by the entry-point group `headrace.commands`
(a function becomes one command, a `typer.Typer` a group of them). Exit codes are those of `headrace.errors`.
"""

from __future__ import annotations

import signal
import sys
import traceback
from importlib.metadata import entry_points, version
from typing import Annotated

import typer

from headrace import errors
from headrace.cli import parked, replay, run, scaffold, status, views, wait, why
from headrace.cli.show import out, print_error

app = typer.Typer(
    name="headrace",
    help="Write once to Postgres; keep every view in step.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(asked: bool) -> None:
    if asked:
        out.print(f"headrace {version('headrace')}")
        raise typer.Exit


@app.callback()
def _options(
    _asked: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Take what stands before a command."""


app.command("run")(run.run)
app.command("plugins")(run.plugins)
app.command("settings")(run.settings)
app.command("status")(status.status)
app.command("rebuild")(views.rebuild)
app.command("promote")(views.promote)
app.command("rollback")(views.rollback)
app.command("drop")(views.drop)
app.command("pause")(views.pause)
app.command("resume")(views.resume)
app.command("wait")(wait.wait)
app.command("replay")(replay.replay)
app.command("why")(why.why)
app.add_typer(parked.app, name="parked")
app.add_typer(scaffold.app, name="new")


def add_commands(wanted: str | None) -> None:
    """Add the commands of the installed services: the one that is `wanted`, all of them when it is none of ours (help).

    A service is imported only when its command is run, so that one cannot slow down or break the others; nor for an option before any
    command, such as --version: it ends there.
    """
    own = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    if wanted in own or ((wanted or "").startswith("--") and wanted not in {"--", "--help"}):
        return
    found = sorted(entry_points(group="headrace.commands"), key=lambda e: e.name)
    for entry in [entry for entry in found if entry.name == wanted] or found:
        command = entry.load()
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=entry.name)
        else:
            app.command(entry.name)(command)


def main() -> None:
    """Run the command line; an error of ours is printed in three lines, never as a traceback; a defect is.

    SIGTERM ends a command as Ctrl-C does, so that what it has asked for is taken back.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `capture` and `run` have their own
    try:
        add_commands(next(iter(sys.argv[1:]), None))
        app()
    except errors.HeadraceError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(errors.INTERRUPTED)
    except Exception:  # noqa: BLE001  a defect must not end as a check that failed: a gate would refuse a right build
        traceback.print_exc()
        sys.exit(errors.DEFECT)
