"""`headrace parked`: what could not be done and was set aside. To look needs no process; to try again or give up is asked of it [I13]."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import orjson
import typer
from rich.markup import escape
from rich.table import Table

from headrace.change import NOWHERE, format_lsn
from headrace.cli.show import agree, out, print_json
from headrace.control import Control
from headrace.errors import CHECK_FAILED, USAGE, Misconfigured
from headrace.log import Log
from headrace.parked import Entry, Shelf, pasted
from headrace.settings import load

app = typer.Typer(help="Records that could not be done: look, try again, give up.", no_args_is_help=True)

_SECONDS = 300.0
_WIDE = 70

Name = Annotated[str, typer.Argument(help="The consumer.")]
Key = Annotated[str, typer.Argument(help="What `parked list` shows as key: a row's key, or a document's id.")]
OneKey = Annotated[str | None, typer.Argument(metavar="[KEY]", help="A row's key, or a document's id; or give --all.")]
Everything = Annotated[bool, typer.Option("--all", help="All that is parked of the generation.")]
Collection = Annotated[str | None, typer.Option("--collection", help="The table, where one key is in several.")]
Number = Annotated[int | None, typer.Option("--generation", help="Which; the live one when left out.")]
AnyNumber = Annotated[int | None, typer.Option("--generation", help="Which; all when left out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@app.command("list")
def show_all(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this consumer.")] = None,
    json: AsJson = False,
) -> None:
    """List what is parked: of which view, under which key, and why.

    A record is parked when its consumer cannot do it and says which it is. Later changes of its key wait behind it; everything else goes
    on. Tokens are answered up to the state before it (S25), `verify` refuses, and no build that lacks it is promoted over a live view.

    Exit codes: 0 listed, also when there is nothing; 3 a setting is wrong; 5 Kafka does not answer.

    Examples:

        headrace parked list

        headrace parked list search --json
    """
    entries = Shelf(Log(load())).entries(name)
    if json:
        print_json([_facts(entry) for entry in entries])
    elif not entries:
        out.print("nothing is parked")
    else:
        out.print(_table(entries))
        out.print(
            f"then: headrace parked show {entries[0].name} {pasted(entries[0].key)}", markup=False, soft_wrap=True
        )


@app.command()
def show(
    name: Name, key: Key, collection: Collection = None, generation: AnyNumber = None, json: AsJson = False
) -> None:
    """Show what is parked under a key: what it is, why, where it stands in the log, and what to do.

    Exit codes: 0 shown; 3 nothing is parked under that key; 5 Kafka does not answer.

    Examples:

        headrace parked show search 4711

        headrace parked show warehouse '{"id":4711}' --json
    """
    entries = _chosen(name, key, collection, generation)
    if not entries:
        raise Misconfigured(
            "not-parked", f"{name} has nothing parked under {key}.", f"See: headrace parked list {name}"
        )
    if json:
        print_json([_facts(entry) for entry in entries])
        return
    for entry in entries:
        _show(entry)


@app.command()
def retry(
    name: Name,
    key: OneKey = None,
    everything: Everything = False,
    collection: Collection = None,
    generation: Number = None,
    json: AsJson = False,
) -> None:
    """Try again what is parked, when the cause is gone: a mapping that was changed, a receiver that was mended, a row that is another now.

    Of rows the changes that wait are applied in their order; a document is shown as it is now. What still cannot be done stays parked, and
    so does, with what to run instead, a row of which a change was too large to be kept whole.
    New code is another matter: `headrace rebuild NAME` builds anew with it.

    Exit codes: 0 it is done; 1 something still cannot be done; 2 neither a key nor --all is given; 3 nothing is parked there, or no process
    runs the view; 4 the view has stopped by a record that cannot be set aside; 5 a server or that process does not answer.

    Examples:

        headrace parked retry search 4711

        headrace parked retry search --all
    """
    _check_named(key, everything=everything)
    answer = Control(Log(load())).ask(name, "retry", _args(key, collection, generation), _SECONDS)
    if json:
        print_json({"name": name} | answer)
    else:
        for each in answer["done"]:
            out.print(f"[green]done[/green] {name} {escape(' '.join(each))}")
        for each in answer["left"]:
            said = escape(f"{each['collection']} {each['key']}: {each['reason']} {each.get('remedy', '')}".rstrip())
            out.print(f"[red]still parked[/red] {name} {said}", soft_wrap=True)
    if answer["left"]:
        raise typer.Exit(CHECK_FAILED)


@app.command()
def drop(
    name: Name,
    key: OneKey = None,
    everything: Everything = False,
    collection: Collection = None,
    generation: Number = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: AsJson = False,
) -> None:
    """Give up what is parked: the view stays without it until the row changes again. The row in Postgres and the log are not touched.

    It says what is lost, and asks. With --json it does not ask: without --yes nothing is done, as if nobody agreed. Later changes are
    applied again, so that a row that is read again (`headrace resnapshot`) or changed comes back by itself.

    Exit codes: 0 it is given up; 2 neither a key nor --all is given, or nobody agreed; 3 nothing is parked there, or no process runs the
    view; 4 the view has stopped by a record that cannot be set aside; 5 a server or that process does not answer.

    Examples:

        headrace parked drop search 4711

        headrace parked drop warehouse '{"id":4711}' --yes
    """
    _check_named(key, everything=everything)
    control = Control(Log(load()))
    if not yes:
        live = next((report.generation for report in control.running(name) if report.live), None)
        entries = _chosen(name, key, collection, generation or live)
        if json:
            cursors = list(dict.fromkeys((entry.collection, entry.key) for entry in entries))
            facts = {"generation": generation or live, "dropped": cursors, "records": len(entries)}
            print_json({"name": name} | facts | {"applied": False})
        for entry in [] if json else entries:
            out.print(f"lost: {_lost(entry)}", markup=False, soft_wrap=True)
        agree("Nothing was dropped.", ask=not json)
    answer = control.ask(name, "drop-parked", _args(key, collection, generation), _SECONDS)
    if json:
        print_json({"name": name} | answer | {"applied": True})
        return
    for each in answer["dropped"]:
        out.print(f"dropped {name} {' '.join(each)}", markup=False)


def _check_named(key: str | None, *, everything: bool) -> None:
    if (key is None) != everything:
        typer.echo("Name a KEY, or give --all.", err=True)
        raise typer.Exit(USAGE)


def _args(key: str | None, collection: str | None, generation: int | None) -> dict[str, Any]:
    return {"key": key, "collection": collection, "generation": generation}


def _chosen(name: str, key: str | None, collection: str | None, generation: int | None) -> list[Entry]:
    entries = Shelf(Log(load())).entries(name, generation)
    return [entry for entry in entries if key in {None, entry.key} and collection in {None, entry.collection}]


def _table(entries: Sequence[Entry]) -> Table:
    table = Table("view", "collection", "key", "parked", "why")
    for entry in entries:
        why = f"{entry.code}: {entry.reason}" if entry.code else entry.reason
        short = why if len(why) <= _WIDE else f"{why[:_WIDE]}…"
        view = f"{entry.name} g{entry.generation}"
        table.add_row(*map(escape, (view, entry.collection, entry.key, _when(entry), short)))
    return table


def _show(entry: Entry) -> None:
    lines = {
        "view": f"{entry.name}, generation {entry.generation}",
        "key": f"{entry.collection} {entry.key}",
        "parked": _when(entry),
        "version": _at(entry),
        "where": "; ".join(
            f"{place.topic} partition {place.partition} offset {place.first}"
            + (f" to {place.last}" if place.last > place.first else "")
            for place in entry.where
        ),
        "why": f"{entry.reason} [{entry.code}]" if entry.code else entry.reason,
        "do": entry.remedy,
        "then": f"headrace parked retry {entry.name} --generation {entry.generation} {pasted(entry.key)}",
    }
    for what, said in lines.items():
        if said:
            out.print(f"[bold]{what:>8}[/bold]  {escape(said)}", soft_wrap=True)
    body = entry.body if entry.cut else orjson.dumps(entry.body, option=orjson.OPT_INDENT_2).decode()
    out.print(body, markup=False, soft_wrap=True)
    if entry.cut:
        out.print("… cut here: it is too large to be kept whole", style="yellow")
    out.print()


def _lost(entry: Entry) -> str:
    if not entry.at:
        return f"document {entry.collection} {entry.key} as it is now: the view keeps what it has of it"
    return f"a change of {entry.collection} {entry.key} at {_at(entry)}"


def _at(entry: Entry) -> str:
    return format_lsn(entry.version.lsn) if entry.version != NOWHERE else ""


def _when(entry: Entry) -> str:
    return datetime.fromtimestamp(entry.when / 1000, UTC).isoformat(sep=" ", timespec="seconds")


def _facts(entry: Entry) -> dict[str, Any]:
    return {
        "consumer": entry.name,
        "generation": entry.generation,
        "collection": entry.collection,
        "key": entry.key,
        "code": entry.code,
        "reason": entry.reason,
        "remedy": entry.remedy,
        "epoch": entry.version.epoch,
        "lsn": format_lsn(entry.version.lsn),
        "held": format_lsn(entry.held.lsn),
        "where": [place._asdict() for place in entry.where],
        "parked": _when(entry),
        "cut": entry.cut,
        "body": entry.body,
    }
