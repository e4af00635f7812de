"""`headrace replay`: what would new code change in a view?"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from headrace import codec, plugins
from headrace.change import format_lsn
from headrace.cli.show import out, print_json
from headrace.control import Control
from headrace.effects import EffectConsumer
from headrace.errors import CHECK_FAILED, USAGE, HeadraceError, Misconfigured, Transient
from headrace.log import Log
from headrace.runner.comparing import Changed, Comparison, Held, compare
from headrace.runner.scratch import Scratch
from headrace.settings import load
from headrace.waiting import check_not_paused, check_not_stopped

_KINDS = {"added": "green", "removed": "red", "changed": "yellow"}
_SIGNS = {"added": "+", "removed": "-", "changed": "~"}
_WIDE = 60
_KEEPER = """
import shutil, sys, tempfile
folder = tempfile.mkdtemp(prefix="headrace-replay-")
print(folder, flush=True)
sys.stdin.read()
shutil.rmtree(folder, ignore_errors=True)
"""


def replay(
    name: Annotated[str | None, typer.Argument(help="The consumer with the new code, if it is installed.")] = None,
    against: Annotated[str | None, typer.Option(metavar="LIVE", help="The view that runs; NAME by default.")] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="Show each document that would change, not only how many.")
    ] = False,
    consumer: Annotated[
        str | None,
        typer.Option("--consumer", metavar="FILE.py:CLASS", help="The new code, as `headrace run` takes it."),
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="With --diff: show at most so many documents.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Build a view with the code at hand, and show what differs from the one that runs: for use in a pull request.

    It is built from the log into a scratch generation of the same store, which never becomes live and is dropped at the end. Both are
    compared at one LSN: so the live view stands still, readable, while it is read, and goes on afterwards; within a minute also when this
    command is killed. What a killed one leaves in the store the next one drops: one replay of a NAME at a time.

    Exit codes: 0 nothing would change; 1 something would; 2 no consumer is named; 3 something must be changed first, or no process runs
    the live view; 4 the new code cannot apply a record; 5 a server or that process does not answer.

    Examples:

        headrace replay search --against search --diff

        headrace replay --consumer ./search.py:ProductSearch --against search --diff --json --limit 100
    """
    if not name and not consumer:
        typer.echo("Name a consumer (headrace plugins lists them) or give --consumer FILE.py:CLASS.", err=True)
        raise typer.Exit(USAGE)
    named, made = plugins.load_file(consumer) if consumer else (name or "", plugins.load(name or ""))
    name = name or named
    if issubclass(made, EffectConsumer):
        said = f"{name} keeps no view that could be compared, and what it does would be done twice."
        raise Misconfigured("replay-no-view", said, "Test its code by headrace.testing.")
    log = Log(load())
    log.require_checkpoints()
    live = against or name
    control = Control(log)
    _check_goes_on(control, live)
    found = _compared(log, Held(control, live), name, made, limit if diff else 0)
    _show(name, live, found, json=json)
    if found.differs:
        raise typer.Exit(CHECK_FAILED)


def _check_goes_on(control: Control, live: str) -> None:
    """Refuse a live view that will not come to where a replay is built to."""
    found = [report for report in control.running(live) if report.live]
    if not found:
        said = f"{live} has no live generation yet."
        raise Misconfigured("no-live-generation", said, "Wait for its first build: headrace status --watch")
    check_not_stopped(found[0])
    check_not_paused(found[0])


def _compared(log: Log, held: Held, name: str, made: Any, limit: int) -> Comparison:
    with _folder() as folder:
        scratch = Scratch(log, name, made, folder)
        try:
            least = _built(scratch)
            return compare(held, scratch, least, limit)
        finally:
            with suppress(HeadraceError):
                held.release()
            scratch.drop()


@contextmanager
def _folder() -> Iterator[Path]:
    """Give a new folder. A process beside us makes it, and removes it when we end, also when we are killed."""
    command = [sys.executable, "-c", _KEEPER]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        made = keeper.stdout.readline().rstrip("\n")
        if not made:
            said = f"No folder can be made in {tempfile.gettempdir()}."
            raise Transient("local-state", said, "Free that disk, or name another folder by TMPDIR.")
        yield Path(made)


def _built(scratch: Scratch) -> Any:
    columns = (TextColumn("{task.description}"), BarColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(scratch.name, total=None)

        def told(state: Any) -> None:
            done, total = state.progress
            what = f"{scratch.name}: {state.phase} {state.error.message if state.error else ''}"
            progress.update(bar, description=what, completed=done, total=total or None)

        return scratch.build(told)


def _show(name: str, live: str, found: Comparison, *, json: bool) -> None:
    counts = {kind: found.counts[kind] for kind in (*_KINDS, "same")}
    if json:
        facts = {
            "consumer": name,
            "against": live,
            "generation": found.generation,
            "lsn": format_lsn(found.version.lsn),
        }
        print_json(facts | counts | {"documents": [changed._asdict() for changed in found.shown]})
        return
    for changed in found.shown:
        what = escape(f"{changed.collection} {changed.key}".strip())
        out.print(f"[{_KINDS[changed.kind]}]{_SIGNS[changed.kind]}[/] {what}", soft_wrap=True)
        for line in _lines(changed):
            out.print(f"    {escape(line)}", soft_wrap=True)
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    at = f"{live} g{found.generation}, at {format_lsn(found.version.lsn)}"
    out.print(f"{name} with the code at hand against {at}: {told}", soft_wrap=True)


def _lines(changed: Changed) -> Iterator[str]:
    """Yield what changes in a document, in short."""
    before, after = changed.before or {}, changed.after or {}
    if changed.kind == "changed":
        for name in {**before, **after}:
            yield f"{name}: {_short(before, name)} → {_short(after, name)}"


def _short(row: dict[str, Any], name: str) -> str:
    text = codec.dumps(row[name]).decode() if name in row else "nothing"
    return text if len(text) <= _WIDE else f"{text[:_WIDE]}…"
