"""`headrace wait`: read your own writes, in scripts (S25)."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from headrace.change import Version, format_lsn, parse_lsn
from headrace.cli.show import out, print_json
from headrace.cli.source import source_facts
from headrace.control import Control
from headrace.errors import USAGE, Misconfigured
from headrace.log import Log
from headrace.settings import load
from headrace.waiting import check_epoch, reached


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
    paused or has stopped does not come there: that is said at once.

    Exit codes: 0 they see it; 2 the LSN is none; 3 one does not come there before somebody changes something, no process runs it, or the
    LSN is of an earlier epoch; 5 not in time, or a server does not answer.

    Examples:

        headrace wait search pages

        headrace wait search --lsn 0/17ABA90 --timeout 10 --json
    """
    began = time.monotonic()
    log = Log(load())
    log.require_checkpoints()
    control = Control(log)
    wanted = _wanted(log, lsn)
    found = [reached(control, name, wanted, max(0.0, began + timeout - time.monotonic())) for name in names]
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


def _wanted(log: Log, text: str | None) -> Version:
    """Return the version to wait for; of an LSN alone the epoch is the log's.

    Raises:
        Misconfigured: `nothing-captured`, `token-void`, `no-source`.
    """
    newest = log.newest_checkpoint(complete=True)
    if newest is None:
        said = f"The log of {log.settings.source} has no complete checkpoint."
        raise Misconfigured("nothing-captured", said, "Run: headrace capture")
    wanted = _parsed(text if text is not None else _now(log), newest.version.epoch)
    check_epoch(wanted, newest.version)
    return wanted


def _parsed(text: str, epoch: int) -> Version:
    named, _, lsn = text.rpartition("@")
    try:
        return Version(int(named or epoch), parse_lsn(lsn))
    except ValueError:
        typer.echo(f"{text!r} is no LSN; they look like 0/17ABA90, or with an epoch 1@0/17ABA90.", err=True)
        raise typer.Exit(USAGE) from None


def _now(log: Log) -> str:
    lsn: str | None = source_facts(log.settings).get("lsn")
    if lsn is None:
        said = "Nothing that is installed here can ask Postgres for its LSN."
        raise Misconfigured("no-source", said, "Give --lsn, or install headrace-capture.")
    return lsn
