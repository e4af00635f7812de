"""`headrace setup` and `headrace teardown`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table as Shown

from headrace.cli.show import agree, out, print_json
from headrace.errors import USAGE, HeadraceError
from headrace.log import Log
from headrace.settings import Settings, load
from headrace_capture import setup as making
from headrace_capture import teardown as removing
from headrace_capture.catalog import Connection, connect

Dsn = Annotated[
    str | None, typer.Option("--dsn", metavar="DSN", help="Connect as this role; HEADRACE_DSN when not given.")
]
Tables = Annotated[
    list[str] | None,
    typer.Option(
        "--table",
        metavar="SCHEMA.TABLE",
        help="Capture this table, or several by commas; may be repeated. All with a key if none, or *.",
    ),
]
AppendOnly = Annotated[
    list[str] | None,
    typer.Option(
        "--append-only",
        metavar="SCHEMA.TABLE",
        help="Capture this table though it has no key; may be repeated. UPDATE and DELETE of it fail from then on.",
    ),
]
RoleName = Annotated[
    str,
    typer.Option(
        "--role",
        metavar="ROLE",
        help="The role that capture and verify will use; else the one that setup gave rights last, or the connected one.",
    ),
]
Apply = Annotated[bool, typer.Option("--apply", help="Run the statements; without it they are only printed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
WithTopics = Annotated[
    bool, typer.Option("--topics", help="Delete the source's topics too: every view must be rebuilt.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def setup(
    dsn: Dsn = None,
    table: Tables = None,
    append_only: AppendOnly = None,
    role: RoleName = "",
    apply: Apply = False,
    json: AsJson = False,
) -> None:
    """Prepare Postgres for capture: publication, replica identities, rights. Prints every statement; runs them with --apply.

    Tables without a usable key are left out, with what to do about it; one that --table names is refused, but for those that are
    or were captured. Running it again adds what is new; what somebody took out of the publication stays out, until --table
    names it. Nothing that it does makes a statement of the application fail, but for tables named by --append-only: it says which.

    Exit codes: 0 printed, or with --apply done; 3 something must be changed first; 5 Postgres does not answer, or a table is locked.

    Examples:

        headrace setup

        headrace setup --apply

        headrace setup --dsn postgresql://admin@db/shop --table public.products --table public.orders --role headrace --apply
    """
    settings = _settings(dsn)
    names = [name.strip() for name in table or []]
    with connect(settings.dsn, name="headrace setup", setting=_where(dsn)) as connection:
        made = making.plan(connection, settings, [] if names == ["*"] else names, role, append_only or [])
        if not json:
            _show(made, applied=apply)
        if apply:
            making.apply(connection, made)
        runs = connection.execute(_RUNS, [settings.slot]).fetchone() is not None
    if json:
        print_json(made.facts() | {"applied": apply})
    else:
        _next(made, applied=apply, runs=runs)


def teardown(dsn: Dsn = None, topics: WithTopics = False, yes: Yes = False, json: AsJson = False) -> None:
    """Take headrace away from Postgres: slot, publication, and everything that setup changed is put back.

    What another source of the server may need stays: it says so, with the statement that takes it away later.
    It says what it would do, and asks. With --json it does not ask: without --yes nothing is done, as if nobody agreed.
    Views and their stores stay: see `headrace drop`.

    Exit codes: 0 it is gone; 2 nobody agreed, nothing was changed; 3 capture is still running, the topics are of another
    server, database, slot or publication than these settings, the server is a standby, or the role may not do it;
    5 Postgres, or Kafka for --topics, does not answer, a table is locked, or somebody has dropped what it was to take away.

    Examples:

        headrace teardown

        headrace teardown --topics --yes
    """
    settings = _settings(dsn)
    log = Log(settings)
    with connect(settings.dsn, name="headrace teardown", setting=_where(dsn)) as connection:
        _check(connection, log, topics=topics)
        removal = removing.plan(connection, settings)
        own = log.own_topics() if topics else []
        facts = removal.facts() | {"topics": own, "applied": yes}
        if not json:
            _tell(settings, removal, own, topics=topics)
            if not yes:
                agree("Nothing was changed.")
        elif not yes:
            print_json(facts)
            raise typer.Exit(USAGE)
        removing.run(connection, settings, removal)
    log.delete_topics(own)
    if json:
        print_json(facts)
    else:
        typer.echo(f"headrace is gone from source {settings.source}.")


def _check(connection: Connection, log: Log, *, topics: bool) -> None:
    try:
        removing.check_unused(log)
    except HeadraceError as error:
        if topics or error.code == "slot-active":
            raise
        typer.echo(f"Whether capture runs was not looked at: {error.message}", err=True)
    if topics:
        removing.check_log(connection, log)


def _settings(dsn: str | None) -> Settings:
    settings = load()
    return replace(settings, dsn=dsn) if dsn else settings


def _where(dsn: str | None) -> str:
    return "--dsn" if dsn else "HEADRACE_DSN"


def _show(made: making.Plan, *, applied: bool) -> None:
    shown = Shown("captured table", "key")
    for table in made.tables:
        none = "none: append-only" if table.full_name in made.append_only else "none"
        shown.add_row(escape(table.full_name), escape(", ".join(table.key) or none))
    out.print(shown)
    for left in made.left_out:
        out.print(f"[yellow]left out[/yellow] {escape(left.table)}: {escape(left.reason)}. {escape(left.remedy)}")
    for warning in made.warnings:
        out.print(f"[yellow]note[/yellow] {escape(warning)}")
    if made.statements:
        typer.echo("-- running" if applied else "-- would run")
    for statement in made.statements:
        typer.echo(f"{statement};")


def _next(made: making.Plan, *, applied: bool, runs: bool) -> None:
    then = "Capture runs, and finds it by itself." if runs else "Next: headrace capture"
    if not made.statements:
        typer.echo(f"Nothing to do: the source is ready. {then}")
    elif applied:
        typer.echo(f"Done. {'' if runs else 'The slot is made by capture at its first start. '}{then}")
    else:
        typer.echo("Nothing was changed. Run them yourself, or again with --apply.")


_RUNS = "SELECT FROM pg_replication_slots WHERE slot_name = %s AND active"


def _tell(settings: Settings, removal: removing.Removal, own: list[str], *, topics: bool) -> None:
    lines = [f"-- drop the replication slot {settings.slot}"] if removal.slot else []
    lines += [f"{statement};" for statement in removal.statements]
    lines = [*(lines or ["-- nothing of headrace is left in Postgres"]), *removal.kept]
    lines += [f"-- delete the topic {topic}" for topic in own]
    if topics and not own:
        lines.append(f"-- Kafka has no topic of source {settings.source}")
    for line in lines:
        typer.echo(line)
