"""`headrace wait`: read your own writes, in scripts (S25)."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Annotated, Any

import typer

from headrace import plugins
from headrace.change import Checkpoint, Version, format_lsn, parse_lsn
from headrace.cli.show import Telling, out, print_json
from headrace.cli.source import source_facts
from headrace.cli.status import frozen
from headrace.control import DEAD_SECONDS, Control, Report
from headrace.errors import USAGE, HeadraceError, Misconfigured, Transient
from headrace.log import Log
from headrace.settings import load
from headrace.waiting import check_epoch, check_server, reached

_LOOK_SECONDS = 0.5


def wait(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="One consumer, or several.")],
    lsn: Annotated[
        str | None,
        typer.Option(
            metavar="LSN", help="Up to where, as 0/17ABA90 or 1@0/17ABA90; what Postgres has now when left out."
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0, help="Longest wait, s.")] = 60.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Wait until readers of views see everything that is committed, by now or up to an LSN.

    The LSN of a write is what `SELECT pg_current_wal_insert_lsn()` says on its connection after COMMIT has returned; without --lsn Postgres
    is asked here. A view says once a second how far it is, so the wait ends that much later. One of which records are parked, that is
    paused or has stopped does not come there: that is said at once. While capture takes the first snapshot, that is waited for too;
    so is the process of a view that is installed here or has run before, which may have been started just now. Of a table that is captured
    no more nothing comes: that is noted. Where it stands is said on stderr, when that changes and about once a minute.

    Exit codes: 0 they see it; 2 the LSN is none; 3 one does not come there before somebody changes something, no process runs it, the LSN
    is of an earlier epoch, or Postgres has lost commits that the log has; 5 not in time, or a server does not answer.

    Examples:

        headrace wait search pages

        headrace wait search --lsn 0/17ABA90 --timeout 10 --json
    """
    began = time.monotonic()
    log = Log(load())
    log.require_checkpoints()
    control = Control(log)
    telling = Telling()
    wanted = _wanted(log, control, names, lsn, timeout, telling)
    _await_processes(control, names, began + timeout, telling)
    found = [_reached(control, name, wanted, began + timeout, telling) for name in names]
    _note(control, found)
    if json:
        at = {"epoch": wanted.epoch, "lsn": format_lsn(wanted.lsn)}
        print_json(
            [
                at
                | {"consumer": report.name, "generation": report.generation, "applied": format_lsn(report.version.lsn)}
                for report in found
            ]
        )
        return
    for report in found:
        out.print(f"{report.name} shows {report.version}, and so {wanted}", markup=False)


def _reached(control: Control, name: str, wanted: Version, until: float, telling: Telling) -> Report:
    def told(report: Report) -> None:
        telling.tell(name, report.phase, f"at {report.version}, not at {wanted}")

    return reached(control, name, wanted, max(0.0, until - time.monotonic()), told=told)


def _note(control: Control, found: list[Report]) -> None:
    """Say which views come to that state without a table that they read."""
    captures: list[Report] = []
    with suppress(HeadraceError):  # what was asked is answered
        captures = control.reports().get("capture", [])
    for report in found:
        if told := frozen(report, captures):
            typer.echo(f"note: {report.name} {told}", err=True)


def _wanted(log: Log, control: Control, names: list[str], lsn: str | None, timeout: float, telling: Telling) -> Version:
    """Return up to where to wait.

    Raises:
        Misconfigured: `token-void`; where Postgres is asked, `other-source` if it is not the log's, `source-behind-log` if it was.
    """
    before = log.newest_checkpoint(complete=True)
    facts = _now(log) if lsn is None else {"lsn": lsn}
    named, at_lsn = _parsed(facts["lsn"])
    newest = before or _first_state(log, control, names, timeout, telling)
    wanted = Version(newest.version.epoch if named is None else named, at_lsn)
    if lsn is None:
        check_server(newest.source, facts["system_id"], facts["database"])
        _check_not_gone_back(at_lsn, before)
    check_epoch(wanted, newest.version)
    return wanted


def _check_not_gone_back(lsn: int, before: Checkpoint | None) -> None:
    """Refuse an LSN of Postgres below what the log had before it was asked: views that show what it has lost seem to be there (S2)."""
    if before is not None and lsn < before.version.lsn:
        raise Misconfigured(
            "source-behind-log",
            f"Postgres is at {format_lsn(lsn)}, and the log was at {before.version} before: the server has lost commits.",
            "See: headrace status capture. If HEADRACE_DSN names the right server: headrace resnapshot --recover",
        )


def _first_state(log: Log, control: Control, names: list[str], seconds: float, telling: Telling) -> Checkpoint:
    """Wait for the first snapshot while a capture runs. What was started just now has not reported yet: it has ten seconds.

    Raises:
        Misconfigured: `nothing-captured`; Transient: `view-behind`.
    """
    began = time.monotonic()
    while True:
        waited = time.monotonic() - began
        reports = control.reports()  # before the log, in which a capture that has ended has all that it will ever write
        newest = log.newest_checkpoint(complete=True)
        silent = any(all(r.gone or r.ended for r in reports.get(name, [])) for name in ("capture", *names))
        starting = silent and waited < min(seconds, DEAD_SECONDS)
        if newest is not None and not starting:
            return newest
        if newest is None and not starting and all(capture.gone for capture in reports.get("capture", [])):
            said = f"The log of {log.settings.source} has no complete checkpoint."
            raise Misconfigured("nothing-captured", said, "Run: headrace capture")
        if newest is None and waited > seconds:
            said = f"The first snapshot of {log.settings.source} is not complete, after {seconds:.0f} s."
            raise Transient("view-behind", said, "See: headrace status")
        for capture in reports.get("capture", []):
            done, total = capture.progress
            telling.tell("capture", capture.phase, f"{100 * done // total}%" if total else "")
        time.sleep(_LOOK_SECONDS)


def _await_processes(control: Control, names: list[str], until: float, telling: Telling) -> None:
    """Wait for what runs the views: what was started just now has not reported yet, also where the process before it had stopped.

    A name that nobody knows is refused at once.

    Raises:
        Misconfigured: `consumer-not-running`, or what stopped a process.
    """
    began = time.monotonic()
    known = control.reports().keys() | plugins.installed().keys()
    for name in sorted(names, key=known.__contains__):
        while True:
            try:
                control.running(name)
                break
            except Misconfigured as error:
                ends = until if error.code == "consumer-not-running" else min(until, began + DEAD_SECONDS)
                if name not in known or time.monotonic() > ends:
                    raise
            telling.tell(name, "no process yet")
            time.sleep(_LOOK_SECONDS)


def _parsed(text: str) -> tuple[int | None, int]:
    """Return epoch and LSN; of an LSN alone the epoch is the log's."""
    named, _, lsn = text.rpartition("@")
    try:
        return int(named) if named else None, parse_lsn(lsn)
    except ValueError:
        typer.echo(f"{text!r} is no LSN; they look like 0/17ABA90, or with an epoch 1@0/17ABA90.", err=True)
        raise typer.Exit(USAGE) from None


def _now(log: Log) -> dict[str, Any]:
    facts = source_facts(log.settings)
    if not facts:
        said = "Nothing that is installed here can ask Postgres for its LSN."
        raise Misconfigured("no-source", said, "Give --lsn, or install headrace-capture.")
    return facts
