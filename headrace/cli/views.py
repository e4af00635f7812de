"""`headrace rebuild`, `promote`, `rollback`, `drop`: everything is asked of the process that runs the view [I13]."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.metadata import entry_points
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from headrace.cli.show import err, out, print_json, seconds
from headrace.control import Control, Report
from headrace.errors import CHECK_FAILED, Misconfigured
from headrace.log import Log
from headrace.settings import load

Name = Annotated[str, typer.Argument(help="The consumer.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def rebuild(
    name: Name,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until it has caught up, verify it, and promote it.")
    ] = False,
    verify: Annotated[bool, typer.Option(help="With --wait: promote only if it equals Postgres, row by row.")] = True,
    consumer: Annotated[
        str | None,
        typer.Option(
            "--consumer",
            metavar="FILE.py:CLASS",
            help="Where the consumer is, if it was run from a file: verify asks it.",
        ),
    ] = None,
    json: AsJson = False,
) -> None:
    """Build the view anew from offset 0, beside the live one.

    Readers see nothing of it until it is promoted. Run again, it goes on with the generation that is being built.

    Exit codes: 0 it is being built, with --wait: it is live; 1 it differs from Postgres and was not promoted; 3 something must be
    changed first, or no process runs it; 5 a server or that process does not answer. With --wait 3 and 5 are verify's too: it could
    not be compared, and was not promoted.

    Examples:

        headrace rebuild search --wait

        headrace rebuild search && headrace status --watch

        headrace rebuild my_view --wait --consumer ./my_view.py:MyView
    """
    if wait and verify:
        Log(load()).require_checkpoints()
    control = _control()
    generation = int(control.ask(name, "rebuild")["generation"])
    if not wait:
        _say(
            json,
            {"generation": generation},
            f"building generation {generation} of {name}; then: headrace promote {name}",
        )
        return
    _wait(control, name, generation, quiet=json)
    if verify:
        _verify(name, generation, consumer, quiet=json)
    answer = control.ask(name, "promote", {"generation": generation}, timeout=120)
    _say(json, answer, f"generation {generation} of {name} is live; the one before stays until: headrace drop {name}")


def promote(
    name: Name,
    generation: Annotated[int | None, typer.Argument(help="Which; the newest when left out.")] = None,
    json: AsJson = False,
) -> None:
    """Let readers see another generation: the live one stops, the new one reaches it, the pointer moves.

    Exit codes: 0 it is live; 3 it cannot be, or no process runs it; 5 a server or that process does not answer.

    Example:

        headrace promote search
    """
    answer = _control().ask(name, "promote", {"generation": generation}, timeout=120)
    _say(json, answer, f"generation {answer['generation']} of {name} is live")


def rollback(
    name: Name,
    stale: Annotated[
        bool, typer.Option("--stale", help="Accept a generation that is behind what readers have seen.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Let readers see the generation before again.

    Exit codes: 0 it is live again; 3 there is none, it is behind (see --stale), or no process runs it; 5 a server or that
    process does not answer.

    Example:

        headrace rollback search
    """
    answer = _control().ask(name, "rollback", {"stale": stale}, timeout=120)
    _say(json, answer, f"generation {answer['generation']} of {name} is live again")


def drop(
    name: Name,
    generation: Annotated[int | None, typer.Argument(help="Which; all before the live one when left out.")] = None,
    json: AsJson = False,
) -> None:
    """Remove generations that are not live.

    Exit codes: 0 they are gone; 3 it is the live one, or no process runs it; 5 a server or that process does not answer.

    Examples:

        headrace drop search

        headrace drop search 3
    """
    answer = _control().ask(name, "drop", {"generation": generation}, timeout=120)
    dropped = ", ".join(str(number) for number in answer["dropped"]) or "nothing"
    _say(json, answer, f"{name}: dropped {dropped}")


def _control() -> Control:
    return Control(Log(load()))


def _say(json: bool, facts: dict[str, object], line: str) -> None:
    if json:
        print_json(facts)
    else:
        out.print(line)


def _wait(control: Control, name: str, generation: int, *, quiet: bool) -> None:
    """Wait until a generation has caught up; show how far it is."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"), TimeElapsedColumn())
    with Progress(*columns, console=out, disable=quiet or not out.is_terminal) as progress:
        bar = progress.add_task(f"{name} g{generation}", total=None, left="")
        most = 1
        while True:
            report = next((r for r in control.running(name) if r.generation == generation), None)
            if report is not None and _ready(report):
                progress.update(bar, total=1, completed=1, left="caught up")
                return
            if report is not None:
                most = max(most, report.lag[0])
                done, total = report.progress if report.progress[1] else (most - report.lag[0], most)
                left = f"{report.phase}, {report.lag[0]} records" + (
                    f", {seconds(report.eta)} left" if report.eta >= 0 else ""
                )
                progress.update(bar, total=total, completed=done, left=left)
            time.sleep(0.5)


def _ready(report: Report) -> bool:
    if report.phase == "stopped":
        raise Misconfigured(report.code, f"The build has stopped: {report.reason}", report.remedy)
    return report.phase in {"following", "live"}


def _verify(name: str, generation: int, consumer: str | None, *, quiet: bool) -> None:
    """Have the generation compared with Postgres; exit when it differs, or when that could not be found out."""
    if not entry_points(group="headrace.commands", name="verify"):
        raise Misconfigured(
            "no-verify", "The command `verify` is not installed here.", "Install headrace-verify, or use --no-verify."
        )
    command = [sys.executable, "-m", "headrace", "verify", name, "--generation", str(generation)]
    from_file = ["--consumer", consumer] if consumer else []
    # Its table is for people: with --json this command's stdout is one document.
    code = subprocess.run([*command, *from_file], check=False, stdout=sys.stderr if quiet else None).returncode
    if code:
        why = "differs from Postgres" if code == CHECK_FAILED else "could not be compared with Postgres"
        err.print(f"[red]generation {generation} of {name} {why}; it was not promoted[/red]")
        raise typer.Exit(code)
