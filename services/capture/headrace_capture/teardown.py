"""Take headrace away from a source again: the slot, the publication, and everything that setup changed.

A forgotten slot keeps WAL until the disk is full, so the slot goes first. What setup changed is read from its own
memory in the source; a replica identity is put back only if it is still what setup made it. What another source of the
server found already given, and so does not remember, stays for it: its capture would be refused, and its slot keep WAL.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import psycopg
from psycopg import sql

from headrace.change import Source
from headrace.control import DEAD_SECONDS, Control
from headrace.errors import Misconfigured, Transient
from headrace.log import Log
from headrace.settings import Settings
from headrace_capture import catalog, rights
from headrace_capture.catalog import Connection
from headrace_capture.identities import DEFAULT, FULL, Change, alter, listed_elsewhere
from headrace_capture.identity import check_source, slot_of
from headrace_capture.memory import Memory, recall
from headrace_capture.progress import NAME
from headrace_capture.replication import postgres_errors

_DOING = "taking headrace away"
_GONE = (psycopg.errors.UndefinedObject, psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName)
_LOCK_SECONDS = 3
_Where = tuple[str, str]
"""The schema and the name of a table; without a name the schema; without either the attributes of roles."""


@dataclass(frozen=True, slots=True)
class Removal:
    """What teardown would do: drop the slot, and then run `statements` in one transaction. `kept` says what stays and why."""

    slot: bool
    statements: tuple[str, ...]
    kept: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Return it for `--json`."""
        return asdict(self)


@postgres_errors(_DOING)
def plan(connection: Connection, settings: Settings) -> Removal:
    """Decide what there is to take away.

    Raises:
        Misconfigured: `slot-active`, `postgres-standby`; Transient: `postgres-away`.
    """
    catalog.refuse_standby(connection)
    slot, kept = slot_of(connection, settings.slot), []
    if slot and not slot.fits(_database(connection)):
        kept.append(f"The slot {settings.slot} stays: it is of {slot.plugin} in database {slot.database}.")
        slot = None
    if slot and slot.active_pid is not None:
        raise _active(settings)
    memory = recall(connection, settings.publication)
    if memory is None:
        return Removal(slot is not None, (), (*kept, *_not_ours(connection, settings.publication)))
    statements = [sql.SQL("DROP PUBLICATION IF EXISTS {}").format(sql.Identifier(settings.publication))]
    needed, listed = _needed(connection, settings), listed_elsewhere(connection, settings.publication)
    for where, statement in _restore(connection, memory):
        if where in needed:
            kept.append(
                f"Stays, for {needed[where]} may need it; take it away when that is gone: {statement.as_string()}"
            )
        elif where in listed and statement == alter(Change(*where, DEFAULT, FULL)):
            kept.append(
                f"Stays, or UPDATE and DELETE would fail: a column list of publication {listed[where]} stands against "
                f"{statement.as_string()}"
            )
        else:
            statements.append(statement)
    return Removal(slot is not None, tuple(statement.as_string() for statement in statements), tuple(kept))


def check_unused(log: Log) -> None:
    """Refuse while a capture reports: another slot or database may be set here than there, and none is at its slot amid a snapshot.

    Raises:
        Misconfigured: `slot-active`; Transient: `kafka-away`.
    """
    for report in Control(log).reports().get(NAME, []):
        if not report.gone:
            said = (
                f"A capture of source {log.settings.source} runs: it reported {report.age:.0f} s ago ({report.phase})."
            )
            remedy = (
                f"Stop `headrace capture` first; one that was killed is known to be gone after {DEAD_SECONDS:.0f} s. "
                "If it is another database's, set another HEADRACE_SOURCE."
            )
            raise Misconfigured("slot-active", said, remedy)


@postgres_errors(_DOING)
def check_log(connection: Connection, log: Log) -> None:
    """Refuse to delete the log of another server, database, slot or publication.

    Raises:
        Misconfigured: `other-source`, `postgres-standby`.
    """
    newest, settings = log.newest_checkpoint(), log.settings
    if newest is not None:
        here = catalog.server(connection)
        check_source(newest.source, Source(here.system_id, 0, here.database, settings.slot, settings.publication))


@postgres_errors(_DOING)
def run(connection: Connection, settings: Settings, removal: Removal) -> None:
    """Carry it out. Run again after an error, it goes on where it was.

    Raises:
        Misconfigured: `slot-active`, `teardown-not-allowed`.
        Transient: `table-locked`, `teardown-outrun`, `postgres-away`.
    """
    try:
        if removal.slot:
            connection.execute("SELECT pg_drop_replication_slot(%s)", [settings.slot])
        with connection.transaction():
            connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'".encode())
            for statement in removal.statements:
                connection.execute(statement.encode())
    except psycopg.errors.ObjectInUse as error:
        raise _active(settings) from error
    except psycopg.errors.LockNotAvailable as error:
        said = f"A table was locked for more than {_LOCK_SECONDS} s; the publication is still there."
        raise Transient("table-locked", said, "Run it again when the long transaction is over.") from error
    except psycopg.errors.InsufficientPrivilege as error:
        said = f"The role may not do that: {error.diag.message_primary}."
        raise Misconfigured("teardown-not-allowed", said, "Give --dsn of the role that ran setup.") from error
    except _GONE as error:
        said = f"Somebody took a part of it away meanwhile: {error.diag.message_primary}."
        raise Transient("teardown-outrun", said, "Run it again: it goes on with what is left.") from error


def _active(settings: Settings) -> Misconfigured:
    said = f"The slot {settings.slot} is in use: capture is running."
    return Misconfigured("slot-active", said, "Stop `headrace capture` first.")


def _database(connection: Connection) -> str:
    row = connection.execute("SELECT current_database()").fetchone()
    assert row is not None
    return str(row[0])


def _not_ours(connection: Connection, publication: str) -> tuple[str, ...]:
    row = connection.execute("SELECT count(*) FROM pg_publication WHERE pubname = %s", [publication]).fetchone()
    return (f"The publication {publication} stays: headrace did not make it.",) if row and row[0] else ()


def _needed(connection: Connection, settings: Settings) -> dict[_Where, str]:
    """Return what others rely on, and who: a table, a schema ("" for its name), the attributes of roles ("" for both)."""
    needed: dict[_Where, str] = {}
    for slot, database in connection.execute(_OTHER_SLOTS, [settings.slot]):
        needed["", ""] = f"slot {slot} of database {database}"
    for (name,) in connection.execute("SELECT pubname FROM pg_publication WHERE pubname <> %s", [settings.publication]):
        if recall(connection, name) is None:
            continue
        for table in catalog.published_tables(connection, name):
            at = {(table.schema, table.name), *((leaf.schema, leaf.name) for leaf in table.leaves)}
            spots = at | {(schema, "") for schema, _ in at} | {("", "")}
            needed = dict.fromkeys(spots, f"publication {name}") | needed
    return needed


def _restore(connection: Connection, memory: Memory) -> list[tuple[_Where, sql.Composed]]:
    """Return the statements for what still exists and is still as setup left it, each with what it is of.

    A table or partition is known by its oid, whatever it is called by now; one of which none is noted by its name.
    """
    now = {oid: ((schema, name), identity) for oid, schema, name, identity in connection.execute(_IDENTITIES)}
    oids: dict[_Where, list[int]] = defaultdict(list)
    for oid, full_name in sorted(memory.published | memory.partitions):
        schema, _, name = full_name.partition(".")
        oids[schema, name].append(oid)
    named = {where: [oid] for oid, (where, _) in now.items()} | oids

    def found(schema: str, name: str) -> list[tuple[_Where, str]]:
        known = [now[oid] for oid in named.get((schema, name), []) if oid in now]
        bearing = [each for each in known if each[0] == (schema, name)]
        return bearing or known[-1:]  # of several that were called so, the one that is, or the newest

    schemas = {schema for (schema,) in connection.execute("SELECT nspname FROM pg_namespace")}
    roles = {role for (role,) in connection.execute("SELECT rolname FROM pg_roles")}
    statements: list[tuple[_Where, sql.Composed]] = [
        (where, alter(Change(*where, c.now, c.was)))
        for c in memory.identities
        for where, identity in found(c.schema, c.name)
        if identity == c.now
    ]
    for grant in [grant for grant in memory.grants if grant.role in roles]:
        if grant.name:
            places = [where for where, _ in found(grant.schema, grant.name)]
        else:
            places = [(grant.schema, "")] if not grant.schema or grant.schema in schemas else []
        statements += [(where, rights.take(grant._replace(schema=where[0], name=where[1]))) for where in places]
    return statements


_OTHER_SLOTS = """
SELECT slot_name, database FROM pg_replication_slots
WHERE slot_type = 'logical' AND NOT temporary AND (slot_name, plugin, database) <> (%s, 'pgoutput', current_database())
ORDER BY 1
"""

_IDENTITIES = """
SELECT c.oid, n.nspname, c.relname, c.relreplident::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p')
"""
