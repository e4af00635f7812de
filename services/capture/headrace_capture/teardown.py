"""Take headrace away from a source again: the slot, the publication, and everything that setup changed.

A forgotten slot keeps WAL until the disk is full, so the slot goes first. What setup changed is read from its own
memory in the source; a replica identity is put back only if it is still what setup made it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import psycopg
from psycopg import sql

from headrace.errors import Misconfigured, Transient
from headrace.settings import Settings
from headrace_capture import rights
from headrace_capture.catalog import Connection
from headrace_capture.identities import WORDS
from headrace_capture.memory import Memory, recall

_LOCK_SECONDS = 3


@dataclass(frozen=True, slots=True)
class Removal:
    """What teardown would do: drop the slot, and then run `statements` in one transaction. `kept` says what stays and why."""

    slot: bool
    statements: tuple[str, ...]
    kept: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Return it for `--json`."""
        return asdict(self)


def plan(connection: Connection, settings: Settings) -> Removal:
    """Decide what there is to take away.

    Raises:
        Misconfigured: `slot-active`.
    """
    row = connection.execute(_SLOT, [settings.slot]).fetchone()
    if row and row[0]:
        raise _active(settings)
    memory = recall(connection, settings.publication)
    if memory is None:
        return Removal(row is not None, (), _not_ours(connection, settings.publication))
    statements = [sql.SQL("DROP PUBLICATION {}").format(sql.Identifier(settings.publication))]
    statements += _restore(connection, memory)
    return Removal(row is not None, tuple(statement.as_string() for statement in statements), ())


def run(connection: Connection, settings: Settings, removal: Removal) -> None:
    """Carry it out. Run again after an error, it goes on where it was.

    Raises:
        Misconfigured: `slot-active`, `teardown-not-allowed`.
        Transient: `table-locked`.
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


def _active(settings: Settings) -> Misconfigured:
    said = f"The slot {settings.slot} is in use: capture is running."
    return Misconfigured("slot-active", said, "Stop `headrace capture` first.")


def _not_ours(connection: Connection, publication: str) -> tuple[str, ...]:
    row = connection.execute("SELECT count(*) FROM pg_publication WHERE pubname = %s", [publication]).fetchone()
    return (f"The publication {publication} stays: headrace did not make it.",) if row and row[0] else ()


def _restore(connection: Connection, memory: Memory) -> list[sql.Composed]:
    """Return the statements for what still exists and is still as setup left it."""
    now = {(schema, name): identity for schema, name, identity in connection.execute(_IDENTITIES)}
    schemas = {schema for (schema,) in connection.execute("SELECT nspname FROM pg_namespace")}
    roles = {role for (role,) in connection.execute("SELECT rolname FROM pg_roles")}
    statements = [
        sql.SQL("ALTER TABLE {} REPLICA IDENTITY {}").format(sql.Identifier(c.schema, c.name), sql.SQL(WORDS[c.was]))
        for c in memory.identities
        if now.get((c.schema, c.name)) == c.now
    ]
    for grant in memory.grants:
        there = not grant.schema or (grant.schema in schemas and (not grant.name or (grant.schema, grant.name) in now))
        if grant.role in roles and there:
            statements.append(rights.take(grant))
    return statements


_SLOT = "SELECT active FROM pg_replication_slots WHERE slot_name = %s"

_IDENTITIES = """
SELECT n.nspname, c.relname, c.relreplident::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p')
"""
