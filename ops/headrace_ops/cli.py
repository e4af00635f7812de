"""`headrace stack`: the servers on this machine, as ordinary processes, or as containers with HEADRACE_STACK=docker."""

from __future__ import annotations

import json
import os
import shlex
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from headrace.errors import CHECK_FAILED, Misconfigured
from headrace_ops.docker_stack import DockerStack
from headrace_ops.server import ALL, NAMES, Report, silent
from headrace_ops.stack import Stack

app = typer.Typer(
    help="Postgres, Kafka, Elasticsearch and Redis on this machine: as processes, or containers by HEADRACE_STACK=docker.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Folder = Annotated[Path, typer.Option("--dir", help="Folder of data, logs and state.")]
Only = Annotated[
    str, typer.Option("--only", help="Servers, separated by commas; all but the optional ones when not given.")
]
Ports = Annotated[list[str], typer.Option("--port", help="A port that must be used, as `postgres=5433`. Repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]
Server = Annotated[str, typer.Argument(help=", ".join(ALL))]
Remove = Annotated[
    bool, typer.Option("--remove", help="Remove the data of all servers too; what else is in the folder stays.")
]
Lines = Annotated[int, typer.Option(help="How many lines.")]
_DIR = Path(".stack")
_BACKENDS: dict[str, type[Stack | DockerStack]] = {"processes": Stack, "docker": DockerStack}


@app.command()
def up(folder: Folder = _DIR, only: Only = "", port: Ports = [], json_: Json = False) -> None:  # noqa: B006 -- typer copies it
    """Start the servers and wait until they answer. What runs already stays as it is.

    Optional, so only where it is named: `registry`, the schema registry for HEADRACE_CODEC=avro.

    Example: `headrace stack up --only postgres,kafka --port postgres=5433`

    Exit codes: 0 all answer; 3 something is missing or in the way; 5 a download failed or a server is too slow.
    """
    with _bars() as report:
        stack = _stack(folder, ports=_ports(port), report=report)
        stack.up(_names(only))
    _print(stack.status(), json_=json_)


@app.command()
def down(folder: Folder = _DIR, only: Only = "", remove: Remove = False, json_: Json = False) -> None:
    """Stop the servers; their data stays, in the folder or in the volumes of the containers.

    Example: `headrace stack down --dir .stack`

    Exit codes: 0 none of them runs any more; 2 wrong use; 3 with --remove it is not a stack's folder; with
    HEADRACE_STACK=docker no engine answers.
    """
    if only and remove:
        raise typer.BadParameter("--remove removes everything; --only names some.")
    stopped = _stack(folder).down(_names(only, ALL), remove=remove)
    if json_:
        typer.echo(json.dumps({"stopped": stopped}))
    else:
        typer.echo(f"stopped {', '.join(stopped)}" if stopped else "nothing was running")


@app.command()
def status(folder: Folder = _DIR, json_: Json = False) -> None:
    """Show which servers run and where.

    Example: `headrace stack status --json`

    Exit codes: 0 at least one server was ever started here and all of those answer; 1 else.
    """
    facts = _stack(folder).status()
    _print(facts, json_=json_)
    if not facts or any(fact["state"] != "running" for fact in facts):
        raise typer.Exit(CHECK_FAILED)


@app.command()
def logs(server: Server, folder: Folder = _DIR, lines: Lines = 40) -> None:
    """Print the end of a server's log.

    Example: `headrace stack logs kafka --lines 100`

    Exit codes: 0 printed; 3 it has never run in this folder.
    """
    stack = _stack(folder)
    if isinstance(stack, DockerStack):
        typer.echo(stack.server(server).said(lines), nl=False)
        return
    path = stack.server(server).log
    if not path.exists():
        raise Misconfigured("stack-down", f"{server} has never run in {folder}.", _up(folder))
    with path.open(errors="replace") as text:
        typer.echo("".join(deque(text, maxlen=lines)), nl=False)


@app.command()
def env(folder: Folder = _DIR, json_: Json = False) -> None:
    """Print the settings that lead to the servers that run, as a shell reads them.

    Example: `eval "$(headrace stack env)"`

    Exit codes: 0 printed; 3 no server of this folder runs.
    """
    settings = _stack(folder).environment()
    if not settings:
        raise Misconfigured("stack-down", f"No server of {folder} is running.", _up(folder))
    if json_:
        typer.echo(json.dumps(settings))
    else:
        typer.echo("\n".join(f"export {name}={shlex.quote(value)}" for name, value in settings.items()))


def _stack(folder: Path, *, ports: Mapping[str, int] | None = None, report: Report = silent) -> Stack | DockerStack:
    """Return the stack of `folder` in the backend that HEADRACE_STACK names. Raises Misconfigured: `bad-setting`."""
    wanted = os.environ.get("HEADRACE_STACK", "processes")
    if wanted not in _BACKENDS:
        known = " or ".join(_BACKENDS)
        raise Misconfigured("bad-setting", f"HEADRACE_STACK={wanted!r} is not {known}.", "Change HEADRACE_STACK.")
    return _BACKENDS[wanted](folder, ports=ports, report=report)


def _up(folder: Path) -> str:
    return f"Run: headrace stack up --dir {shlex.quote(str(folder))}"


def _names(only: str, default: Sequence[str] = NAMES) -> list[str]:
    return [name.strip() for name in only.split(",") if name.strip()] or list(default)


def _ports(given: list[str]) -> dict[str, int]:
    """Read `server=port`, or raise typer's own error."""
    ports = {}
    for text in given:
        name, _, port = text.partition("=")
        if name not in ALL or not port.isdigit():
            raise typer.BadParameter(f"{text!r} is not SERVER=PORT with a server of {', '.join(ALL)}.")
        ports[name] = int(port)
    return ports


def _print(facts: list[dict[str, Any]], *, json_: bool) -> None:
    if json_:
        typer.echo(json.dumps(facts))
        return
    table = Table("server", "state", Column("address", overflow="fold"), "pid")
    for fact in facts:
        table.add_row(fact["server"], fact["state"], fact["address"], str(fact["pid"] or ""))
    Console().print(table)


@contextmanager
def _bars() -> Iterator[Report]:
    """Show one bar for each download and each start, on standard error."""
    name, percent = TextColumn("{task.description:<22}"), TextColumn("{task.percentage:>3.0f}%")
    with Progress(name, BarColumn(), percent, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        tasks: dict[str, TaskID] = {}

        def report(task: str, done: float, total: float) -> None:
            if task not in tasks:
                tasks[task] = progress.add_task(task)
            progress.update(tasks[task], completed=done, total=total)

        yield report
