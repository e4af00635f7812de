"""`headrace resnapshot`: asks the running capture to read tables or rows again, and shows how far it is."""

from __future__ import annotations

import time
from json import dumps, loads
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table as Shown

from headrace.change import format_lsn
from headrace.cli.show import Telling, out, print_json
from headrace.control import Control
from headrace.errors import USAGE, Misconfigured
from headrace.log import Log
from headrace.settings import load
from headrace_capture import recovery
from headrace_capture.jobs import CANCELLED, FAILED, LEFT, PAUSED, Job, Jobs
from headrace_capture.progress import NAME
from headrace_capture.tables import newest

Tables = Annotated[
    list[str] | None, typer.Argument(metavar="[TABLE]...", help="schema.table; without a schema, public.")
]
All = Annotated[bool, typer.Option("--all", help="Every captured table.")]
Key = Annotated[
    str, typer.Option("--key", metavar="K", help="""Only this row: its key, as 5, or {"id":5} as the log writes it.""")
]
Wait = Annotated[bool, typer.Option("--wait", help="Wait until it is done.")]
Status = Annotated[bool, typer.Option("--status", help="Show what is read again, and how far that is.")]
Pause = Annotated[bool, typer.Option("--pause", help="Pause all of it, or these tables.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what is paused.")]
Cancel = Annotated[bool, typer.Option("--cancel", help="Give it up; what was read stays.")]
Recover = Annotated[
    bool,
    typer.Option(
        "--recover", help="Log and source have parted: a new slot, a new epoch, every table. Capture must be stopped."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def resnapshot(
    tables: Tables = None,
    everything: All = False,
    key: Key = "",
    wait: Wait = False,
    status: Status = False,
    pause: Pause = False,
    resume: Resume = False,
    cancel: Cancel = False,
    recover: Recover = False,
    json: AsJson = False,
) -> None:
    """Read tables, or one row, again from Postgres into the log, while the stream runs.

    The running capture does it, in chunks; rows that are gone get their deletes. An append-only table is written anew in one step, for
    which the stream stands still. The progress is in the log, so it survives capture's end. With --recover capture must be stopped: see
    the runbook's entry of the code that it stopped with. A key that neither Postgres nor the log has is told by --wait and --status.

    Exit codes: 0 it will be done, or with --wait is; 2 no table was named; 3 capture does not run, or does not know the table, or could not
    read it, with --wait also: it is paused or cancelled; 5 a server does not answer.

    Examples:

        headrace resnapshot products --wait

        headrace resnapshot public.orders --key 17

        headrace resnapshot --all && headrace resnapshot --status

        headrace resnapshot --pause

        headrace resnapshot --recover && headrace capture
    """
    verb = _verb(status=status, pause=pause, resume=resume, cancel=cancel, recover=recover)
    if recover and (tables or key or everything):
        raise typer.BadParameter(
            "--recover begins a new epoch and reads every table again: it takes no TABLE, --key or --all."
        )
    log = Log(load())
    if recover:
        _recover(log, json=json)
        return
    named = [table if "." in table else f"public.{table}" for table in tables or []]
    if status:
        _show(log, named, json=json)
        return
    if verb == "resnapshot" and not named and not everything:
        typer.echo("Name tables, or say --all.", err=True)
        raise typer.Exit(USAGE)
    _carry_out(log, verb, named, key, wait=wait, json=json)


def _recover(log: Log, *, json: bool) -> None:
    begun = recovery.recover(log.settings, lambda line: typer.echo(line, err=json))
    snapshot, lsn = begun.snapshot == "running", format_lsn(begun.version.lsn)
    if json:
        print_json({"epoch": begun.version.epoch, "lsn": lsn, "snapshot": snapshot})
        return
    streams = f"streams from {lsn} and reads all tables beside that"
    typer.echo(f"Next: headrace capture. It {'takes the initial snapshot again' if snapshot else streams}.")


def _carry_out(log: Log, verb: str, named: list[str], key: str, *, wait: bool, json: bool) -> None:
    args: dict[str, Any] = {"tables": named}
    if key:
        args["key"] = _key(log, named, key)
    answer = _ask(log, verb, args)
    if wait and verb == "resnapshot":
        _wait(log, answer["jobs"], forgotten=bool(key))
    if json:
        print_json(answer)
    else:
        out.print(f"{verb}: {escape(', '.join(answer['jobs']) or 'nothing')}")


def _verb(**given: bool) -> str:
    verbs = [verb for verb, said in given.items() if said]
    if len(verbs) > 1:
        raise typer.BadParameter(f"--{verbs[0]} and --{verbs[1]} exclude each other.")
    return verbs[0] if verbs else "resnapshot"


def _ask(log: Log, verb: str, args: dict[str, Any]) -> dict[str, Any]:
    control = Control(log)
    _check_running(control, log.settings.source)
    return control.ask(NAME, verb, args)


def _check_running(control: Control, source: str) -> None:
    reports = control.reports().get(NAME, [])
    if not reports or reports[-1].gone:
        why = (
            f" It stopped: {reports[-1].reason} {reports[-1].remedy}".rstrip() if reports and reports[-1].reason else ""
        )
        raise Misconfigured("capture-not-running", f"No capture of source {source} runs.{why}", "Run: headrace capture")


def _key(log: Log, tables: list[str], text: str) -> dict[str, str]:
    """Return the key's columns as texts."""
    shape = newest(log.schemas().values()).get(tables[0]) if len(tables) == 1 else None
    if shape is None or not shape.key:
        said = "--key wants one captured table, and that it is not append-only: its rows have no key then."
        raise Misconfigured("bad-key", said, "headrace resnapshot TABLE [--key K]")
    try:
        given, written = loads(text), loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except ValueError:
        given = written = text
    if not isinstance(given, dict):
        given, written = (dict.fromkeys(shape.key[:1], value) for value in (given, written))
    if given.keys() != set(shape.key):
        raise Misconfigured(
            "bad-key", f"The key of {tables[0]} is ({', '.join(shape.key)}), not {text}.", "See --key in --help."
        )
    return {name: _text(given[name], written[name]) for name in shape.key}


def _text(given: Any, written: Any) -> str:
    """Return a value's text; a number's is as it was `written`: 1.10 is not the text 1.1."""
    return written if isinstance(written, str) else dumps(given, ensure_ascii=False)


def _wait(log: Log, names: list[str], *, forgotten: bool) -> None:
    """Wait until the jobs are done, and say how far they are. Nobody waits for what nobody does: capture has ended, for example.

    A row that was read is `forgotten`; a table that is not among the jobs any more was not read.
    """
    control, telling = Control(log), Telling()
    while True:
        jobs = Jobs(log).all
        waited = [jobs[name] for name in names if name in jobs]
        _check_done(waited, [] if forgotten else [name for name in names if name not in jobs])
        if not any(job.open for job in waited):
            for job in waited:
                if job.reason:
                    typer.echo(f"note: {job.name}: {job.reason}", err=True)
            return
        _check_running(control, log.settings.source)
        for job in waited:
            telling.tell(job.name, job.phase, f"{job.rows} rows read" if job.rows else "")
        time.sleep(0.5)


def _check_done(waited: list[Job], gone: list[str]) -> None:
    """Refuse jobs that are not done and that nobody does: one has failed, is cancelled or is paused."""
    failed = [job for job in waited if job.phase == FAILED]
    if failed and not any(job.open for job in waited):
        raise Misconfigured("resnapshot-failed", f"{failed[0].name}: {failed[0].reason}", "Mend that, ask again.")
    cancelled = gone + [job.name for job in waited if job.phase in {CANCELLED, LEFT}]
    if cancelled:
        said = f"{', '.join(cancelled)}: not read again: cancelled, or left out of the publication."
        raise Misconfigured("resnapshot-cancelled", said, "Ask again if it is still to be read.")
    paused = [job.name for job in waited if job.phase == PAUSED]
    if paused:
        said = f"{', '.join(paused)}: paused, to be read again once that ends."
        raise Misconfigured("resnapshot-paused", said, "Run: headrace resnapshot --resume")


def _show(log: Log, tables: list[str], *, json: bool) -> None:
    jobs = [job for job in Jobs(log).all.values() if not tables or job.table in tables]
    if json:
        print_json([_facts(job) for job in jobs])
        return
    shown = Shown("what", "phase", "rows read", "removed", "why", "")
    for job in jobs:
        texts = (job.name, job.phase, str(job.rows), str(job.removed), job.why, job.reason)
        shown.add_row(*map(escape, texts))
    out.print(shown if jobs else "nothing is read again")


def _facts(job: Job) -> dict[str, Any]:
    names = ("name", "table", "key", "phase", "rows", "removed", "why", "reason")
    return {name: getattr(job, name) for name in names}
