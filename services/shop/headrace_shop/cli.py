"""The commands of the shop: `headrace shop …`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Literal

import orjson
import typer
from rich.console import Console

from headrace import settings
from headrace_shop import database
from headrace_shop import work as workload
from headrace_shop.database import Amounts
from headrace_shop.writes import LogWrites

app = typer.Typer(
    help="The shop: the example application.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Dsn = Annotated[str | None, typer.Option(envvar="SHOP_DSN", help="The shop's database; HEADRACE_DSN when not given.")]
Json = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same rows and edits.")]
WriteMode = Annotated[
    Literal["log", "dual"], typer.Option("--writes", help="Write once, or to every store from the request.")
]


@app.command()
def load(
    *,
    products: Annotated[int, typer.Option(min=0, help="Products to add; the first 3201 are the real films.")] = 3201,
    reviews: Annotated[int, typer.Option(min=0, help="Reviews to add.")] = 8000,
    customers: Annotated[int, typer.Option(min=0, help="Customers to add.")] = 500,
    orders: Annotated[int, typer.Option(min=0, help="Orders to add, of one to three lines.")] = 2000,
    seed: Seed = 1,
    if_empty: Annotated[
        bool, typer.Option("--if-empty", help="Do nothing when the shop has products already.")
    ] = False,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Make the shop's tables and add rows to them.

    Example: `headrace shop load --products 10000 --reviews 50000`

    Exit codes: 0 the rows are there; 3 there is nothing that they could belong to; 5 the database does not answer.
    """
    with database.connect(dsn or settings.load().dsn) as connection:
        database.create(connection)
        counts = database.counts(connection)
        if not (if_empty and counts["products"]):
            counts = database.load(connection, Amounts(products, reviews, customers, orders), seed)
    if json:
        typer.echo(orjson.dumps(counts))
    else:
        Console().print(
            "The shop holds "
            + ", ".join(f"{count:,} {table.replace('_', ' ')}" for table, count in counts.items())
            + "."
        )


@app.command()
def work(
    *,
    rate: Annotated[str, typer.Option(help="Transactions a second: 50 or 50/s.")] = "50/s",
    seconds: Annotated[float | None, typer.Option(min=0, help="Stop after so long; else at Ctrl-C.")] = None,
    seed: Seed = 1,
    journal: Annotated[
        Path | None, typer.Option(help="Append the numbers of each committed transaction to this file.")
    ] = None,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Edit the shop steadily: prices, reviews, orders, moves, renames, deletes; some transactions are rolled back.

    Every committed change has a number, and the table `ledger` lists them.

    Example: `headrace shop work --rate 50/s --seconds 60`

    Exit codes: 0 its time is over, or it was asked to stop; 5 the database does not answer.
    """
    address = dsn or settings.load().dsn
    writes = LogWrites(address, connections=1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with database.connect(address) as connection:
        done = workload.work(workload.Load(connection, seed), writes, workload.paced(_rate(rate), seconds), journal)
    writes.close()
    if json:
        typer.echo(orjson.dumps(done))
    else:
        Console().print(
            f"{done.committed:,} transactions committed with {done.changes:,} changes, "
            f"the highest number {done.highest:,}; "
            f"{done.rolled_back:,} rolled back on purpose, {done.refused:,} refused."
        )


@app.command()
def serve(
    *,
    writes: WriteMode = "log",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8080,
    dsn: Dsn = None,
) -> None:
    """Serve the shop's pages until Ctrl-C.

    With `--writes dual` it keeps stores of its own, filled at the start, and writes each of them from the request.

    Example: `headrace shop serve --port 8080`

    Exit codes: 0 it was asked to stop; 3 the port is taken, or a setting is wrong; 5 a server does not answer.
    """
    from headrace_shop import serving  # noqa: PLC0415 - the web server is loaded only to serve

    found = settings.load()
    serving.serve(found, dsn or found.dsn, writes, host, port)


@app.command()
def replay(
    *,
    writes: WriteMode = "log",
    seed: Seed = 1,
    part: Annotated[Literal["", "race", "death"], typer.Option(hidden=True)] = "",
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Replay a race of two editors and the death of a process between two writes.

    With `--writes dual` the dual writer's stores are filled anew first and compared with Postgres afterwards. With
    `--writes log` the consumers' views follow by themselves: compare them by `headrace verify`.

    Example: `headrace shop replay --writes dual --json`

    Exit codes: 0 replayed, whatever the comparison says; 3 the shop is empty; 5 a server does not answer.
    """
    from headrace_shop import replay as accidents  # noqa: PLC0415 - the stores' clients are loaded only when needed

    found = settings.load()
    address = dsn or found.dsn
    if part:
        play = accidents.play_race if part == "race" else accidents.play_death
        play(found, address, writes, seed)
        return
    compared = accidents.replay(found, address, writes, seed, say=(lambda _: None) if json else typer.echo)
    if json:
        typer.echo(
            orjson.dumps({view: {"rows": rows, "differing": differing} for view, (rows, differing) in compared.items()})
        )
    for view, (rows, differing) in compared.items() if not json else ():
        typer.echo(f"{view}: {rows} rows, {differing} differ from Postgres")


def _rate(text: str) -> float:
    try:
        rate = float(text.removesuffix("/s"))
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise typer.BadParameter(f"{text!r} is not a rate such as 50/s.", param_hint="--rate")
    return rate
