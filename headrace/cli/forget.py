"""`headrace drop NAME --all` of a consumer that nobody can run any more: what Kafka has of it goes, its store is not touched [I13]."""

from __future__ import annotations

from typing import Any

import typer

from headrace import plugins
from headrace.cli.show import agree, out
from headrace.control import Control
from headrace.errors import USAGE, Misconfigured
from headrace.log import Log
from headrace.parked import Shelf

_KINDS = ("request", "answer", "standing", "shown", "report")
"""All that control has of a consumer; the reports last, so that one of which a part is left is known yet."""


def left(log: Log, control: Control, name: str) -> dict[str, Any] | None:
    """Return what Kafka has of a consumer that nobody runs, nor can run from here: its generations, and how much is parked.

    None where it must be asked itself: it runs or is installed here, is a service, or nothing was ever said of it.
    """
    try:
        control.running(name)
    except Misconfigured:
        generations = [report.generation for report in control.reports().get(name, []) if report.generation]
        parked = len(Shelf(log).entries(name, bodies=False))
        known = parked or any(control.kept(name, *_KINDS, committed=False))
        if known and name != "capture" and name not in plugins.installed():
            return {"forgotten": generations, "parked": parked}
    return None


def forget(log: Log, control: Control, name: str, found: dict[str, Any], *, ask: bool, json: bool) -> None:
    """Take it away, when somebody agrees where that is to be asked. Run again after an error, it goes on where it was.

    Raises:
        typer.Exit: 2, when nobody agrees, or it came back while somebody thought it over; Transient: `kafka-away`.
    """
    if ask and not json:
        out.print(f"No process runs {name}, and it is not installed here. Forgotten would be: {_told(found)}.")
        out.print(
            "Its store is not touched: should it run again it goes on from there, but not without what was parked."
        )
    if ask:
        agree("Nothing was forgotten.", ask=not json)
        if left(log, control, name) is None:
            typer.echo(f"{name} is there again, on another host perhaps. Nothing was forgotten.", err=True)
            raise typer.Exit(USAGE)
    Shelf(log).clear(name, lambda _: True)
    for kind, records in zip(_KINDS, control.kept(name, *_KINDS, committed=False), strict=True):
        for id_ in records:
            control.keep(name, kind, None, id_)


def said(name: str, found: dict[str, Any]) -> str:
    """Return what was done, and what was not."""
    store = "the index, keys or file that its class named, and its local rows below HEADRACE_STATE where it ran"
    return f"{name} is forgotten: {_told(found)}. Its store was not touched; remove by hand what is left of it: {store}"


def _told(found: dict[str, Any]) -> str:
    generations = ", ".join(map(str, found["forgotten"])) or "none"
    return f"generations {generations}; records parked: {found['parked']}"
