"""`headrace status`: the source and every generation, from Kafka and the slot alone [I13]."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from typing import Annotated, Any, NoReturn

import typer
from rich.box import SIMPLE
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from headrace.change import NOWHERE, format_lsn
from headrace.cli.show import out, print_json, seconds, size
from headrace.cli.source import source_facts
from headrace.consumer import ALL
from headrace.control import Control, Report, command_of
from headrace.errors import CHECK_FAILED, HeadraceError, Misconfigured, Transient
from headrace.log import Log
from headrace.settings import load

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_CLOCK_SECONDS = 2.0
_PATIENCE_SECONDS = 10.0
_READING = frozenset({"live", "following", "catching up", "loading"})
_KEPT = frozenset({"reserved", "extended"})
_LOSING = {
    "unreserved": "unreserved: Postgres is about to remove its WAL",
    "lost": "lost: it can no longer be read from",
}
_COLOURS = {
    "live": "green",
    "following": "green",
    "streaming": "green",
    "dead": "red",
    "stopped": "red",
    "waiting": "yellow",
    "stale": "yellow",
    "paused": "yellow",
    "dropped": "yellow",
}

Facts = dict[str, Any]


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every second until Ctrl-C.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit 1 with one line when something is wrong; for health checks.")
    ] = False,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this consumer (or `capture`).")] = None,
    max_lag: Annotated[
        str,
        typer.Option(
            "--max-lag", help="How far behind is wrong to --check, and how old a state is noted, e.g. 500ms, 60s, 5m."
        ),
    ] = "60s",
) -> None:
    """Show the source (slot, WAL held back, LSN) and each consumer's generations: phase, lag, applied LSN, rate.

    A table that is inexact (DDL changed its rows without events) is named by every form, and is no failure: the views go on.

    Exit codes: 0 shown, or nothing is wrong; 1 with --check, and something is stopped, dead, stale, paused, parked, not to be promoted, too
    far behind or loads while no capture runs, the first snapshot waits, a table could not be read or is captured no more, the heartbeat or
    the look at the catalogue fails, or Kafka does not answer; 2 --check and --json are given; 3 a setting is wrong; 5 without --check, and
    Kafka does not answer: with --watch at the start only.

    Examples:

        headrace status --watch

        headrace status --json

        headrace status --check search --max-lag 60s
    """
    if check and json:
        raise typer.BadParameter("--check and --json exclude each other.")
    log = Log(load())
    control = Control(log)
    most = _span(max_lag)
    look = partial(_facts, log, control, name, most)
    if check:
        _check(_reports(control), log.settings.source, name, most)
    elif json:
        print_json(look())
    elif watch:
        _watch(look)
    else:
        out.print(_view(look()))


def _watch(look: Callable[[], Facts]) -> NoReturn:
    """Show it every second; where Kafka does not answer, say so below what was known: one looks at this while things are away."""
    known = _view(look())
    with Live(known, console=out, auto_refresh=False) as live:
        while True:
            try:
                shown = known = _view(look())
            except Transient as error:
                shown = Group(known, f"[red]not as of now[/red]: {escape(str(error))}")
            live.update(shown, refresh=True)
            time.sleep(1)


def _facts(log: Log, control: Control, name: str | None, most: float) -> Facts:
    reports = control.reports()
    wanted = {n: found for n, found in reports.items() if name in {None, n}}
    captures = reports.get("capture", [])
    source = captures[-1] if captures else None

    def said(report: Report) -> Facts:
        told = {
            "unwritten": _unwritten(report, captures, log.settings.source),
            "frozen": frozen(report, captures),
            "outdated": _outdated(report, captures, most) if report.live else "",
        }
        return _said(report, source) | {name: text for name, text in told.items() if text}

    return {
        "source": {"name": log.settings.source, "clock_ahead_seconds": round(control.ahead, 1)} | _slot(log),
        "capture": [_said(report, source) for report in captures],
        "consumers": {n: [said(report) for report in found] for n, found in wanted.items() if n != "capture"},
    }


def _slot(log: Log) -> Facts:
    if log.settings.feed == "debezium":
        return {"feed": "debezium"}
    try:
        return source_facts(log.settings, log.newest_checkpoint())
    except HeadraceError as error:
        return {"error": error.message, "remedy": error.remedy}


def _said(report: Report, source: Report | None) -> Facts:
    records, wal, behind = report.lag
    epochs = source.version.epoch - report.version.epoch if source and report.version != NOWHERE else 0
    if source is not None and source.version.epoch == report.version.epoch:
        # Who died, stands still or hangs says what was missing when it last read: that is counted to what is captured now. Not so for
        # one that reads, which knows better: a version may be held back by what is delayed or parked.
        reads = not report.dead and report.phase in _READING and behind < _PATIENCE_SECONDS
        wal = wal if reads else max(wal, source.version.lsn - report.version.lsn)
    return {
        "generation": report.generation,
        "fingerprint": report.fingerprint,
        "live": report.live,
        "phase": "dead" if report.dead else report.phase,
        "epoch": report.version.epoch,
        "lsn": report.version.lsn,
        "applied": format_lsn(report.version.lsn),
        "lag": {"records": records, "wal_bytes": wal, "seconds": round(behind, 3), "epochs": max(0, epochs)},
        "shows_seconds": round(report.shows + report.age, 1) if "written_ms" in report.facts else None,
        "rate": report.rate,
        "eta_seconds": report.eta if report.eta >= 0 else None,
        "progress": list(report.progress),
        "reason": report.reason,
        "code": report.code,
        "remedy": report.remedy,
        "age_seconds": round(report.age, 1),
        **report.facts,
    }


def _view(facts: Facts) -> Group:
    notes = [note for name, report in _named(facts) for note in _notes(name, report)]
    if abs(ahead := facts["source"]["clock_ahead_seconds"]) > _CLOCK_SECONDS:
        said = "ahead of" if ahead > 0 else "behind"
        notes.append(
            f"[yellow]clock[/yellow]: here it is {seconds(abs(ahead))} {said} the broker's; let both follow NTP"
        )
    return Group(_source_line(facts), _table(facts), *notes)


def _named(facts: Facts) -> list[tuple[str, Facts]]:
    everyone = [("capture", facts["capture"]), *facts["consumers"].items()]
    return [(name, report) for name, reports in everyone for report in reports]


def _source_line(facts: Facts) -> str:
    source = facts["source"]
    if "error" in source:
        return f"source [bold]{source['name']}[/bold]: [red]{escape(source['error'])}[/red] {escape(source.get('remedy', ''))}"
    if source.get("feed") == "debezium":
        return f"source [bold]{source['name']}[/bold]: fed by Debezium, no checkpoints"
    if not source.get("exists", True):
        told = "" if any(report["reason"] for report in facts["capture"]) else "; run: headrace capture"
        return f"source [bold]{source['name']}[/bold]: [red]no slot[/red]{told}"
    if "confirmed_flush_lsn" not in source:
        return f"source [bold]{source['name']}[/bold]"
    said = ["slot active" if source["active"] else "slot [red]not active[/red]"]
    if source["wal_status"] not in _KEPT:
        said.append(f"[red]{_LOSING.get(source['wal_status'], source['wal_status'])}[/red]")
    said.append(f"at {source['confirmed_flush_lsn']}")
    if source["wal_held_bytes"] is not None:
        said.append(f"{size(source['wal_held_bytes'])} of WAL held back")
    return f"source [bold]{source['name']}[/bold]: {', '.join(said)}"


def _table(facts: Facts) -> Table:
    table = Table("name", "phase", "applied", "behind", "rate", "left", box=SIMPLE, pad_edge=False)
    for name, report in _named(facts):
        table.add_row(*_row(name, report))
    return table


def _row(name: str, report: Facts) -> list[str]:
    done, total = report["progress"]
    phase = report["phase"] + (f" {100 * done // total}%" if total else "")
    colour = _COLOURS.get(report["phase"], "cyan")
    return [
        _called(name, report),
        f"[{colour}]{phase}[/{colour}]",
        "no checkpoints" if report.get("checkpoints") == "none" else report["applied"],
        _behind(report["lag"]),
        f"{report['rate']:.0f}/s",
        seconds(report["eta_seconds"]) if report["eta_seconds"] is not None else "",
    ]


def _called(name: str, report: Facts) -> str:
    return f"{name} g{report['generation']}" if report["generation"] else name


def _behind(lag: Facts) -> str:
    epochs = lag["epochs"]
    parts = [
        f"{epochs} epoch{'s' if epochs > 1 else ''}" if epochs else "",
        f"{lag['records']} records" if lag["records"] else "",
        size(lag["wal_bytes"]) if lag["wal_bytes"] else "",
        seconds(lag["seconds"]) if lag["seconds"] else "",
    ]
    return ", ".join(part for part in parts if part) or "nothing"


def _notes(name: str, report: Facts) -> Iterator[str]:
    if report["phase"] == "dead":
        yield f"[red]{name}[/red]: no word for {seconds(report['age_seconds'])}; run: {command_of(name)}"
    elif reason := f"{report['reason']} {report['remedy']}".strip():
        yield f"[yellow]{_called(name, report)}[/yellow]: {escape(reason)}"
    for trouble in [*_troubles(report), *filter(None, map(report.get, ("unwritten", "frozen", "outdated")))]:
        yield f"[red]{name}[/red]: {escape(trouble)}"
    if parked := report.get("parked"):
        yield f"[yellow]{_called(name, report)}[/yellow]: {_parked(name, parked)}"
    if inexact := report.get("inexact"):
        tables = escape(", ".join(inexact))
        yield f"[yellow]{_called(name, report)}[/yellow]: {tables} may differ from Postgres until read again: inexact (S12)"
    for what in ("resnapshot", "approximate"):
        if told := report.get(what):
            yield f"[yellow]{name}[/yellow]: {what}: {escape(told)}"


def _reports(control: Control) -> dict[str, list[Report]]:
    try:
        return control.reports()
    except HeadraceError as error:
        _wrong(str(error))


def _check(reports: dict[str, list[Report]], source: str, name: str | None, most: float) -> None:
    wanted = {who: found for who, found in reports.items() if name in {None, who}}
    if not wanted:
        _wrong(f"{name or 'capture'}: nobody has ever reported; run: {command_of(name or 'capture')}")
    captures = reports.get("capture", [])
    inexact: set[str] = set()
    for who, found in wanted.items():
        for report in [report for report in found if report.live] or found[-1:]:
            if name is None and report.phase == "dropped" and (report.dead or report.ended):
                continue  # it was given up, and its process too
            _check_one(who, report, most)
            _check_written(report, captures, source)
            if told := _outdated(report, captures, most):
                _wrong(f"{who}: {told}; see: headrace status")
            inexact.update(report.facts.get("inexact", ()))
        for build in _builds(found):
            if build.phase == "stopped":
                _check_one(f"{who} g{build.generation}", build, most)
    typer.echo(f"ok, but inexact (S12): {', '.join(sorted(inexact))}" if inexact else "ok")


def _builds(found: list[Report]) -> list[Report]:
    """Return the generations beside the live one that may follow it; what was live before is kept, and nobody waits for it."""
    live = max((report.generation for report in found if report.live), default=None)
    after = [report for report in found if live is not None and report.generation > live]
    return [report for report in after if not report.facts.get("left")]


def _check_one(name: str, report: Report, most: float) -> None:
    if report.dead or report.phase == "off":
        _wrong(f"{name}: no process reports (last {seconds(report.age)} ago); run: {command_of(name)}")
    held_up = (
        report.phase in {"following", "snapshot"} and report.code
    )  # it is not to be promoted, or waits for the application
    if report.phase in {"stopped", "stale", "waiting", "paused", "dropped"} or held_up:
        _wrong(f"{name}: {report.phase}: {report.reason} {report.remedy}")
    for trouble in _troubles(report.facts):
        _wrong(f"{name}: {trouble}")
    if parked := report.facts.get("parked"):
        _wrong(f"{name}: {_parked(name, parked)}")
    if report.lag[2] > most:
        _wrong(f"{name}: {seconds(report.lag[2])} behind ({report.lag[0]} records); see: headrace status --watch")


def _check_written(report: Report, captures: list[Report], source: str) -> None:
    for told in filter(None, [_unwritten(report, captures, source), frozen(report, captures)]):
        _wrong(f"{report.name}: {told}")


def _unwritten(report: Report, captures: list[Report], source: str) -> str:
    """Return why a view that has come to no state yet waits in vain: nobody writes the log of that source. "" when it does not."""
    waits = report.phase == "loading" and not report.dead and "checkpoints" not in report.facts
    if not waits or not all(capture.gone for capture in captures):
        return ""
    return f"loading, and no capture of source {source} runs; run: {command_of('capture')}"


def _outdated(report: Report, captures: list[Report], most: float) -> str:
    """Return how old the state is that a view shows, where that is more than `most` seconds and a heartbeat; "" when it is not (S17)."""
    heartbeat = max((int(each.facts.get("heartbeat_ms", 0)) for each in captures), default=0) / 1000
    if not heartbeat or report.shows <= most + heartbeat:
        return ""
    return f"shows a state {seconds(report.shows)} old, no heartbeat has come since (S17)"


def frozen(report: Report, captures: list[Report]) -> str:
    """Return which tables a view shows as they were, for they are captured no more; "" when it follows all that it reads."""
    reads = report.facts.get("reads", [])
    gone = {table for capture in captures for table in capture.facts.get("unpublished", [])}
    found = sorted(gone if tuple(reads) == ALL else gone.intersection(reads))
    return f"shows {', '.join(found)} as of before {_mend(found, report.name)}" if found else ""


def _mend(tables: list[str], name: str = "NAME") -> str:
    named = [shlex.quote(table) for table in tables]
    return (
        "it was renamed, dropped, made a partition or taken out of the publication. To capture it again: "
        f"headrace setup {' '.join(f'--table {table}' for table in named)} --apply. If it has another name, let the view read that, and "
        f"headrace rebuild {name}. Then, and if nobody wants it any more: headrace resnapshot {' '.join(named)}"
    )


def _troubles(facts: Facts) -> Iterator[str]:
    """Return what capture finds wrong in the source."""
    if failing := facts.get("failing"):
        yield f"UPDATE and DELETE of a captured table fail in the source, or come without its key (S8); run: {failing}"
    yield from (str(told) for name in ("standby", "blocked") if (told := facts.get(name)))
    yield from facts.get("unread", [])
    if gone := facts.get("unpublished"):
        yield f"the log has {', '.join(gone)} as of before {_mend(gone)}"
    if (told := str(facts.get("heartbeat", ""))).startswith("failed") or _hangs(told):
        yield f"the heartbeat {told}"  # an idle source no longer shows that it lives, nor how much WAL it holds (S17)
    if (told := str(facts.get("catalogue", ""))).startswith("failed"):
        yield f"the look at the catalogue {told}"  # until it succeeds, DDL that changes rows without events is not found (S12)


def _hangs(told: str) -> bool:
    """Whether the heartbeat waits, and not just for a moment: for a synchronous standby that is away, as every commit does then."""
    since = re.match(r"waits since (\S+)", told)
    return since is not None and time.time() - datetime.fromisoformat(since[1]).timestamp() > _PATIENCE_SECONDS


def _parked(name: str, count: int) -> str:
    said = "records are" if count > 1 else "record is"
    return f"{count} {said} parked, and no token is answered beyond; run: headrace parked list {name}"


def _wrong(line: str) -> NoReturn:
    typer.echo(" ".join(line.split()))  # a reason may have several
    raise typer.Exit(CHECK_FAILED)


def _span(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|min|h)?", text)
    if not match:
        raise Misconfigured(
            "bad-option", f"--max-lag {text!r} is not a time span.", "Use for example 500ms, 60s or 5m."
        )
    return float(match[1]) * _UNITS[match[2] or "s"]
