"""Prepare a source: the publication, replica identities, rights. First a plan, which can be printed; then one transaction.

Everything is decided from the catalogue, so a second run finds nothing to do. What is changed is remembered in the source
(see `memory`) in the same transaction. Locks are waited for briefly: a queue behind an ALTER TABLE would stop the application.
The slot is not made here: capture makes it at its first start, because the initial snapshot needs the one it exports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from headrace.errors import Misconfigured, Transient
from headrace.log import Log
from headrace.settings import Settings
from headrace_capture import append_only, catalog, identities, rights, standby
from headrace_capture.catalog import Connection, Server, Table
from headrace_capture.connection import silent_joins
from headrace_capture.memory import Memory, database, recall
from headrace_capture.named import named_tables
from headrace_capture.replication import postgres_errors

LOCK_SECONDS = 3
LONGEST_TOPIC = 249
"""Kafka takes no longer name; other characters than `A-Z a-z 0-9 _ -` take six or more of it each (docs/formats.md)."""


class LeftOut(NamedTuple):
    """A table that is not captured, why, and what to do about it."""

    table: str
    reason: str
    remedy: str


@dataclass(slots=True)
class Plan:
    """What setup would do.

    Attributes:
        statements: In the order in which they run, as text.
        tables: What is captured afterwards.
        append_only: Those of them that have no key.
        left_out: What is not.
        warnings: What somebody should know or decide.
    """

    server: Server
    statements: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    append_only: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """Return the plan for `--json`."""
        tables = [
            {"table": table.full_name, "key": list(table.key), "append_only": table.full_name in self.append_only}
            for table in self.tables
        ]
        left_out = [entry._asdict() for entry in self.left_out]
        return {"tables": tables, "left_out": left_out, "warnings": self.warnings, "statements": self.statements}


@postgres_errors("looking at the source")
def plan(
    connection: Connection, settings: Settings, names: list[str], role: str = "", appended: Sequence[str] = ()
) -> Plan:
    """Decide what has to be done so that the tables can be captured.

    Args:
        connection: As a role that may read the catalogue.
        settings: For the names of publication and slot.
        names: Tables to add; when empty all with a usable key, but for those that somebody took out of the publication. One that
            was captured may be gone or have lost its key.
        role: The role that capture will connect as; when empty the one that setup gave rights last, or else the connected one.
        appended: Tables without a key to add, to be captured as append-only.

    Raises:
        Misconfigured: `wal-level`, `no-free-slot`, `no-usable-key`, `no-such-table`, `publication-foreign`, `no-such-role`,
            `append-only-key`, `append-only-full`.
    """
    server = catalog.server(connection)
    _check_server(connection, server, settings)
    made = Plan(server)
    memory = recall(connection, settings.publication)
    present = _present(connection, settings.publication, memory)
    before = {name for _, name in memory.published} if memory else set()
    loose = _loose(connection, made, memory, appended, present)
    found = _found(connection, made, before, names, present) if names else catalog.all_tables(connection)
    there = {table.oid: table for table in present}
    taken = {_counted(table, settings): table.full_name for table in present}
    out = {oid for oid, _ in (memory.published if memory and not names else ())} - there.keys()
    wanted = []
    for table in [*loose, *(there.get(t.oid, t) for t in found if t.full_name not in made.append_only)]:
        appends = table.full_name in made.append_only
        reason = (None if appends else unusable(table, settings)) or _same_topic(table, settings, taken)
        spared = table.oid in there or (table.full_name in before and not appends)
        if reason and (names or appends) and not spared:
            raise Misconfigured(
                "no-usable-key", f"{table.full_name} cannot be captured: {reason.reason}.", reason.remedy
            )
        if table.oid in out and not appends:
            reason = reason or _taken_out(table, settings)
        made.left_out += [reason] if reason else []
        wanted += [] if reason else [table]
    made.tables = sorted({t.oid: t for t in [*wanted, *present]}.values(), key=lambda t: t.full_name)
    _fill(connection, settings, made, memory, set(there), role)
    return made


def _found(connection: Connection, made: Plan, before: set[str], names: list[str], present: list[Table]) -> list[Table]:
    """Return the tables that are named. What was captured and is gone is left out: it must not keep capture of the others from starting."""
    found, gone = named_tables(connection, names, present, before)
    for name, hint in gone.items():
        made.left_out.append(LeftOut(name, f"it was captured and is gone ({hint})", "Name it no more."))
    return found


def _loose(
    connection: Connection, made: Plan, memory: Memory | None, appended: Sequence[str], present: list[Table]
) -> list[Table]:
    """Return the tables to capture as append-only, now or already, and warn of what that does."""
    known = memory.append_only if memory else []
    before = [table for table in present if table.full_name in known]
    there = {table.full_name for table in before}
    new = [table for table in named_tables(connection, appended)[0] if table.full_name not in there]
    for table in [*before, *new]:
        append_only.check(table)
        made.append_only.append(table.full_name)
        made.warnings.append(append_only.failing(connection, table))
    return [*before, *new]


def unusable(table: Table, settings: Settings) -> LeftOut | None:
    """Return why a table cannot be captured now, None when it can."""
    if table.keyless:
        return _keyless(table)
    if "." in table.schema:
        why = "its schema has a dot in its name, and tables are named schema.table"
        return LeftOut(table.full_name, why, f"ALTER SCHEMA {sql.Identifier(table.schema).as_string()} RENAME TO …")
    long = len(Log(settings).topic_of(table.full_name)) - LONGEST_TOPIC
    if long > 0:
        why = f"the name of its topic would be {long} characters too long for Kafka"
        return LeftOut(table.full_name, why, "Rename it, or choose a shorter HEADRACE_SOURCE.")
    if table.kind == "p" and any(leaf.identity == identities.INDEX for leaf in table.leaves):
        why = "a partition names its old rows by another index than the primary key"
        return LeftOut(table.full_name, why, "ALTER TABLE that partition REPLICA IDENTITY DEFAULT.")
    return None


def _keyless(table: Table) -> LeftOut:
    name = table.identifier.as_string()
    if table.keyless == "deferrable":
        why = "its key is deferrable, so two rows may share it for a while (S9)"
        return LeftOut(table.full_name, why, f"Make the constraint of {name} NOT DEFERRABLE.")
    if table.unsent:
        return LeftOut(table.full_name, *table.hidden())
    why = "it has no usable key (S10)"
    index = sql.Identifier(table.unique).as_string()
    use = (
        f"ALTER TABLE {name} REPLICA IDENTITY USING INDEX {index}"
        if table.unique
        else f"ALTER TABLE {name} ADD PRIMARY KEY (…); if its rows are only ever added, say also: --append-only {table.full_name}"
    )
    return LeftOut(table.full_name, why, f"Run: {use}")


def _same_topic(table: Table, settings: Settings, taken: dict[str, str]) -> LeftOut | None:
    """Return why the table's topic is another table's for Kafka, whose is in `taken`; None when it is not: then it is taken."""
    other = taken.setdefault(_counted(table, settings), table.full_name)
    if other == table.full_name:
        return None
    why = f'in the names of topics Kafka takes "." and "_" for one, so its topic would be that of {other}'
    return LeftOut(table.full_name, why, "Rename it or its schema.")


def _taken_out(table: Table, settings: Settings) -> LeftOut:
    why = f"somebody took it out of publication {settings.publication}"
    return LeftOut(table.full_name, why, f"To capture it again: headrace setup --table {table.full_name} --apply")


def _counted(table: Table, settings: Settings) -> str:
    """Return the name by which Kafka tells the table's topic from others."""
    return Log(settings).topic_of(table.full_name).replace(".", "_")


def apply(connection: Connection, made: Plan) -> None:
    """Run the plan's statements in one transaction: all or none.

    Raises:
        Transient: `table-locked`.
        Misconfigured: `setup-not-allowed`, `setup-failed`.
    """
    statement = ""
    try:
        with connection.transaction():
            connection.execute(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")
            for statement in made.statements:
                connection.execute(statement.encode())
    except psycopg.errors.LockNotAvailable as error:
        said = f"A table was locked for more than {LOCK_SECONDS} s; nothing was changed: {statement}."
        raise Transient("table-locked", said, "Run it again when the long transaction is over.") from error
    except psycopg.errors.InsufficientPrivilege as error:
        said = f"{made.server.role} may not run: {statement} ({_first_line(error)}); nothing was changed."
        raise Misconfigured(
            "setup-not-allowed", said, "Give --dsn of the tables' owner or an administrator."
        ) from error
    except psycopg.Error as error:
        said = f"Postgres refused: {statement} ({_first_line(error)}); nothing was changed."
        raise Misconfigured("setup-failed", said, "Mend what it says and run setup again.") from error


def _first_line(error: psycopg.Error) -> str:
    return str(error).partition("\n")[0]


def _check_server(connection: Connection, server: Server, settings: Settings) -> None:
    if server.wal_level != "logical":
        raise Misconfigured(
            "wal-level",
            f"The server runs with wal_level={server.wal_level}; capture needs logical.",
            "Run: ALTER SYSTEM SET wal_level = 'logical'; then restart Postgres.",
        )
    row = connection.execute(_ROOM, {"slot": settings.slot}).fetchone()
    assert row is not None
    ours, slots, most_slots, senders, most_senders = row
    if not ours and slots >= most_slots:
        said = f"All of max_replication_slots={most_slots} are taken."
        raise Misconfigured(
            "no-free-slot", said, "Raise max_replication_slots and restart, or drop a slot nobody uses."
        )
    if not ours and senders >= most_senders:
        said = f"All of max_wal_senders={most_senders} are taken."
        raise Misconfigured("no-free-slot", said, "Raise max_wal_senders and restart.")


def _present(connection: Connection, publication: str, memory: Memory | None) -> list[Table]:
    """Return what our publication has already."""
    row = connection.execute("SELECT count(*) FROM pg_publication WHERE pubname = %s", [publication]).fetchone()
    if not row or not row[0]:
        return []
    if memory is None:
        said = f"There is a publication {publication} that headrace did not make."
        raise Misconfigured("publication-foreign", said, "Name another in HEADRACE_PUBLICATION, or drop it.")
    return catalog.published_tables(connection, publication)


def _fill(
    connection: Connection, settings: Settings, made: Plan, memory: Memory | None, present: set[int], role: str
) -> None:
    """Write the statements: rights, identities, and then the publication, so that nothing is published too early."""
    after = memory or Memory()
    before = after.statement(settings.publication).as_string() if memory else ""
    after.append_only = made.append_only
    after.published |= {(table.oid, table.full_name) for table in made.tables}
    after.database = database(connection)
    role = role or rights.given_last(connection, after.grants) or made.server.role
    given = rights.missing(connection, made.tables, rights.role_of(connection, role))
    after.grants += [grant for grant in given if grant not in after.grants]
    statements = [rights.give(grant) for grant in given]
    limited = identities.limits(connection, settings.publication)
    for table in [table for table in made.tables if table.key or table.unsent]:
        if table.key:
            _identities(made, table, after, statements, limited)
        made.warnings += [
            f"UPDATE and DELETE of {table.full_name} fail as it is published (S8); run: {mend}"
            for mend in identities.past_mending(table, made.server.version, limited, settings.publication)
        ]
    touched = {(c.schema, c.name) for c in after.identities} | {(grant.schema, grant.name) for grant in after.grants}
    leaves = {(leaf.oid, leaf.schema, leaf.name) for table in made.tables if table.kind == "p" for leaf in table.leaves}
    after.partitions |= {(oid, f"{schema}.{name}") for oid, schema, name in leaves if (schema, name) in touched}
    statements += _publication(connection, settings.publication, made, present, exists=memory is not None)
    if after.statement(settings.publication).as_string() != before:
        statements.append(after.statement(settings.publication))
    made.statements = [statement.as_string() for statement in statements]
    made.warnings += [
        f"Changes of {leaf.schema}.{leaf.name} are not in the WAL: {table.full_name} stays inexact (S12) until: {leaf.unlogged}"
        for table in made.tables
        for leaf in table.leaves
        if leaf.unlogged
    ]
    made.warnings += _standby_warnings(connection, made.server)
    made.warnings += filter(None, [silent_joins(made.server.version)])
    if not made.tables and memory is None:  # a publication that has lost its tables may stay without
        reasons = "; ".join(f"{left.table}: {left.reason}" for left in made.left_out[:3])
        said = f"There is no table with a usable key{reasons and f' ({reasons})'}."
        remedy = made.left_out[0].remedy if made.left_out else "Make a table with a primary key first."
        raise Misconfigured("no-usable-key", said, remedy)


def _identities(
    made: Plan, table: Table, memory: Memory, statements: list[sql.Composed], limited: identities.Limits
) -> None:
    version = made.server.version
    for change in identities.changes(table, version, limited):
        statements.append(identities.alter(change))
        if change.was != identities.INDEX:  # which index is not kept: teardown leaves what is set here
            memory.changed(*change)
    if identities.approximate(table, version, limited):
        made.warnings.append(
            f"{table.full_name} keeps its replica identity, as FULL could make UPDATE and DELETE fail (S8): a large "
            "value that an update leaves alone may have to be read again, and the table counts as approximate (S7)."
        )


def _publication(
    connection: Connection, name: str, made: Plan, present: set[int], *, exists: bool
) -> list[sql.Composed]:
    options = {"publish": "'insert, update, delete, truncate'", "publish_via_partition_root": "true"}
    if made.server.version >= catalog.GENERATED:
        options["publish_generated_columns"] = "stored"
    told = sql.SQL(", ".join(f"{option} = {value}" for option, value in options.items()))
    publication = sql.Identifier(name)
    # A root is named, and not present, where somebody had the publication send its partitions under their own names.
    there = present | {oid for (oid,) in connection.execute(_NAMED, [name])}
    new = sql.SQL(", ").join(_alone(table) for table in made.tables if table.oid not in there)
    if not exists:
        return [sql.SQL("CREATE PUBLICATION {} FOR TABLE {} WITH ({})").format(publication, new, told)]
    statements = []
    if not _options_hold(connection, name, made.server.version):
        statements.append(sql.SQL("ALTER PUBLICATION {} SET ({})").format(publication, told))
    if new.as_string():
        statements.append(sql.SQL("ALTER PUBLICATION {} ADD TABLE {}").format(publication, new))
    return statements


_NAMED = "SELECT r.prrelid FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid WHERE p.pubname = %s"


def _alone(table: Table) -> sql.Composed:
    """Return the table without those that inherit from it: they have no key of its, and their statements would fail [I1]."""
    return sql.SQL("{}" if table.kind == "p" else "ONLY {}").format(table.identifier)


def _options_hold(connection: Connection, name: str, version: int) -> bool:
    generated = "pubgencols = 's'" if version >= catalog.GENERATED else "true"
    told = f"pubinsert AND pubupdate AND pubdelete AND pubtruncate AND pubviaroot AND {generated}"
    row = connection.execute(f"SELECT {told} FROM pg_publication WHERE pubname = %s".encode(), [name]).fetchone()
    return bool(row and row[0])


def _standby_warnings(connection: Connection, server: Server) -> list[str]:
    """Say when commits would wait for capture [I1], and when a failover could promote a standby that lacks what was published (S2).

    Servers before 17 cannot help the latter.
    """
    row = connection.execute(_STANDBYS).fetchone()
    assert row is not None
    return [*filter(None, [standby.told(row[2], standby.NAME)]), *(_lacking(server) if row[0] and not row[1] else [])]


def _lacking(server: Server) -> list[str]:
    if server.version < _FAILOVER_SLOTS:
        return ["There are standbys, and slots of this server do not survive a failover: use 17 or newer (S2)."]
    return [
        "There are standbys, and synchronized_standby_slots is empty: after a failover a standby may lack changes that are in the log (S2)."
    ]


_FAILOVER_SLOTS = 170000

_ROOM = """
SELECT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = %(slot)s),
       (SELECT count(*) FROM pg_replication_slots), current_setting('max_replication_slots')::int,
       (SELECT count(*) FROM pg_stat_replication), current_setting('max_wal_senders')::int
"""

_STANDBYS = """
SELECT EXISTS (SELECT FROM pg_replication_slots WHERE slot_type = 'physical') OR EXISTS (
         SELECT FROM pg_stat_replication s WHERE NOT EXISTS (
           SELECT FROM pg_replication_slots r WHERE r.active_pid = s.pid AND r.slot_type = 'logical')
         AND s.application_name <> 'pg_basebackup'),
       coalesce(current_setting('synchronized_standby_slots', true), '') <> '', current_setting('synchronous_standby_names')
"""
