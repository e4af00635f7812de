"""`headrace why`: what readers see under a key, and what it was made from."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.text import Text
from rich.tree import Tree

from headrace import codec
from headrace.change import format_lsn
from headrace.cli.show import out, print_json
from headrace.consumer import ALL, ViewRow
from headrace.control import Control
from headrace.errors import CHECK_FAILED, USAGE
from headrace.log import Log
from headrace.parked import Shelf, pasted
from headrace.settings import load

_WIDE = 200
_TIMEOUT = 60.0
_READ = {
    None: "from the stream",
    "snapshot": "from the snapshot",
    "resnapshot": "read again beside the stream",
    "reread": "from the stream, a large value read again",
}

Facts = dict[str, Any]


def why(
    name: Annotated[str, typer.Argument(help="The consumer.")],
    key: Annotated[str, typer.Argument(help="The document's id; of a view of tables the log's key: '{\"id\":1}'.")],
    table: Annotated[str, typer.Option("--table", metavar="SCHEMA.TABLE", help="Of a view of tables: whose row.")] = "",
    generation: Annotated[
        int | None, typer.Option("--generation", help="Look in this one; else in the live one.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Of joined rows show the first so many.")] = 5,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts, nothing shortened.")] = False,
) -> None:
    """Show a document as readers see it, with its version, and the rows that it was made from, level by level.

    Of each row it is told which change brought it (commit LSN, transaction, its number in that), where the change stands in the log (topic,
    partition, offset), how it was read (stream, snapshot, read again), and when it was applied here. The rows are the ones that the view's
    process keeps, as they are now: where the document does not show them yet, or not at all, that is said.

    Exit codes: 0 shown; 1 neither readers nor the view's process know the key; 2 of a view of tables --table names none that it has;
    3 there is no such generation, or no process runs the view; 5 a server or that process does not answer.

    Examples:

        headrace why search 17

        headrace why warehouse '{"id":17}' --table public.orders

        headrace why search 17 --generation 3 --limit 100 --json
    """
    log = Log(load())
    args = {"key": (table, key), "generation": generation, "limit": limit}
    answer, rows = _asked(log, name, args)
    shown, origins = rows[: answer["found"]], [row.value for row in rows[answer["found"] :]]
    parked = _parked(log, name, answer["generation"], table, key)
    facts = {
        "consumer": name,
        "generation": answer["generation"],
        "version": _version(answer["version"]),
        "stale": answer.get("stale", False),
        "key": key,
        "waits": parked is None and any(origin["waits"] for origin in origins),
        "parked": parked,
        "document": _document(shown),
        "made_from": _nested(log, origins),
    }
    if json:
        print_json(facts)
    else:
        out.print(_tree(facts))
    if not rows:
        raise typer.Exit(CHECK_FAILED)


def _asked(log: Log, name: str, args: Facts) -> tuple[Facts, list[ViewRow]]:
    """Return the answer and its rows; of a view of tables it must have been asked for a row of one that it has."""
    with Control(log).stream(name, "why", args, _TIMEOUT) as (answer, sent):
        rows = list(sent)
    tables = answer.get("tables", []) if not answer["found"] else []
    known = {table for table, _ in log.schemas()} if tuple(tables) == ALL else set(tables)
    if known and args["key"][0] not in known:
        typer.echo(f"{name} has rows of {', '.join(sorted(known))}: name one by --table.", err=True)
        raise typer.Exit(USAGE)
    return answer, rows


def _document(shown: list[ViewRow]) -> Facts | None:
    return {"version": _version(shown[0].version), "value": shown[0].value} if shown else None


def _parked(log: Log, name: str, generation: int, table: str, key: str) -> Facts | None:
    """Return why the key is parked: of a row, what the first of its changes is parked for."""
    for entry in Shelf(log).entries(name, generation, bodies=False):
        if entry.key == key and table in {"", entry.collection}:
            return {"code": entry.code, "reason": entry.reason}
    return None


def _version(version: Iterable[int]) -> Facts:
    epoch, lsn = version
    return {"epoch": epoch, "lsn": format_lsn(lsn)}


def _nested(log: Log, origins: list[Facts]) -> Facts | None:
    """Return origins, in which a row comes before what is joined to it, as a tree: rows have joins, and joins have rows."""
    top: Facts | None = None
    rows: dict[tuple[str, ...], Facts] = {}
    joins: dict[tuple[str, ...], Facts] = {}
    for origin in origins:
        place = tuple(origin["place"])
        if origin["change"] is None:
            made = {"table": origin["table"], "count": origin["rows"], "values": origin["values"], "rows": []}
            joins[place] = made
            if place:
                rows[place[:-1]]["joins"][place[-1]] = made
        else:
            made = rows[place] = _row(log, origin)
            if place in joins:
                joins[place]["rows"].append(made)
        top = top or made
    return top


def _row(log: Log, origin: Facts) -> Facts:
    change = origin["change"]
    return {
        "table": origin["table"],
        "key": codec.loads(change["key"]),
        "row": change["row"],
        "commit": _version(change["version"]),
        "xid": change["xid"],
        "ordinal": change["ordinal"],
        "topic": log.topic_of(origin["table"]),
        "partition": change["partition"],
        "offset": change["offset"],
        "read": change["read"] or "stream",
        "applied": origin["applied"],
        "joins": {},
    }


# For people


def _tree(facts: Facts) -> Tree:
    at = f"generation {facts['generation']}, at {_at(facts['version'])}"
    tree = Tree(Text.assemble((f"{facts['consumer']} {facts['key']}", "bold"), (f"  {at}", "dim")))
    document, origin = facts["document"], facts["made_from"]
    if document:
        branch = tree.add(Text.assemble(("what readers see", "green"), f", of version {_at(document['version'])}"))
        for name, value in document["value"].items():
            branch.add(Text(_short(f"{name}: {codec.dumps(value).decode()}")))
    else:
        tree.add(Text("readers see nothing under this key", style="yellow"))
    if facts["parked"]:
        show = f"headrace parked show {facts['consumer']} --generation {facts['generation']} {pasted(facts['key'])}"
        tree.add(Text(f"parked: {_short(facts['parked']['reason'])}\n{show}", style="red"))
    if facts["waits"]:
        tree.add(Text("the rows below have changed since, and wait to be shown", style="yellow"))
    if facts["stale"]:
        said = f"the rows it was made from are kept by other code than runs: headrace rebuild {facts['consumer']}"
        tree.add(Text(said, style="yellow"))
    elif origin is None:
        tree.add(Text("no rows of it are kept by the view's process", style="dim"))
    else:
        _grow(tree, "made from" if document else "the rows that are kept", origin)
        if not document and not facts["waits"] and not facts["parked"] and "row" in origin:
            tree.add(Text("render returned no document for them", style="yellow"))
    return tree


def _grow(tree: Tree, name: str, origin: Facts) -> None:
    if "row" in origin:
        branch = tree.add(Text.assemble((f"{name}: ", "cyan") if name else "", _told(origin)))
        for join, below in origin["joins"].items():
            _grow(branch, join, below)
        return
    count, rows = origin["count"], origin["rows"]
    said = f"{count} row{'s' * (count != 1)} of {origin['table']}" if count else f"no row of {origin['table']}"
    values = f"  {_short(codec.dumps(origin['values']).decode())}" if origin["values"] is not None else ""
    branch = tree.add(Text.assemble((f"{name}: ", "cyan"), said, values))
    for row in rows:
        _grow(branch, "", row)
    if count > len(rows):
        branch.add(Text(f"… and {count - len(rows)} more (--limit)", style="dim"))


def _told(row: Facts) -> Text:
    at = datetime.fromtimestamp(row["applied"] / 1000).astimezone().isoformat(" ", "milliseconds")
    where = f"{row['topic']} partition {row['partition']} offset {row['offset']}"
    commit = f"commit {_at(row['commit'])}, transaction {row['xid']}, change {row['ordinal']}"
    key = codec.dumps(row["key"]).decode()
    return Text.assemble(
        (f"{row['table']} {key}", "bold"),
        f"\n{_short(codec.dumps(row['row']).decode())}",
        (f"\n{commit}; {_READ.get(row['read'], _READ[None])}\n{where}; applied {at}", "dim"),
    )


def _at(version: Facts) -> str:
    return f"{version['epoch']}@{version['lsn']}"


def _short(text: str) -> str:
    return text if len(text) <= _WIDE else f"{text[:_WIDE]}…"
