"""Tables without a key (S10): captured when `headrace setup --append-only` names them, and only ever added to.

A published table without a replica identity takes INSERT and TRUNCATE; Postgres refuses UPDATE and DELETE, for everybody, as
soon as it is published. So its rows need no key of their own: a row's key in the log is its position, which no other row can
have and which a resumed stream gives again. Rows of a snapshot are numbered downwards from -1 at its consistent point, since a
transaction may commit at exactly that LSN. Which tables are named is kept in the source (see `memory`).
"""

from __future__ import annotations

from headrace.errors import Misconfigured
from headrace_capture.catalog import Connection, Leaf, Table
from headrace_capture.identities import FULL, INDEX
from headrace_capture.memory import recall

_FULL = "An update would come with an old row that names no row of the log."


def position_key(lsn: int, ordinal: int) -> bytes:
    """Return the key of a row without one: where it was committed (docs/formats.md)."""
    return b'{"lsn":%d,"ordinal":%d}' % (lsn, ordinal)


def named(connection: Connection, publication: str) -> set[str]:
    """Return the tables (``schema.name``) that setup was told to capture so."""
    memory = recall(connection, publication)
    return set(memory.append_only) if memory else set()


def check(table: Table) -> None:
    """Refuse to capture as append-only what is not.

    Raises:
        Misconfigured: `append-only-key`, `append-only-full`.
    """
    name = table.identifier.as_string()
    if table.unsent:
        why, mend = table.hidden()
        raise Misconfigured(
            "append-only-key", f"{table.full_name} has a key, so updates of it are not refused, and {why}.", mend
        )
    if table.key or table.keyless == "deferrable":
        why = (
            f"has the key ({', '.join(table.key)})"
            if table.key
            else "has a deferrable key: updates of it are not refused"
        )
        by = "its key" if table.key else "its key, made NOT DEFERRABLE"
        use = f"Capture it by {by}: headrace setup --table {table.full_name} --apply"
        again = "if it was append-only before, start again from zero: headrace teardown --topics first."
        raise Misconfigured("append-only-key", f"{table.full_name} {why}.", f"{use}; {again}")
    other: list[Leaf] = [leaf for leaf in table.leaves if leaf.identity in {FULL, INDEX}]
    if other:
        said = (
            f"{other[0].schema}.{other[0].name} has a replica identity, so UPDATE and DELETE are not refused. {_FULL}"
        )
        raise Misconfigured(
            "append-only-full", said, f"ALTER TABLE {name} REPLICA IDENTITY DEFAULT, or give it a primary key."
        )


def check_identity(table: str, identity: str) -> None:
    """Refuse a table that was append-only and, by what a Relation message says, no longer is.

    Raises:
        Misconfigured: `append-only-full`.
    """
    if identity in {FULL, INDEX}:
        said = f"{table} is captured as append-only and now has a replica identity. {_FULL}"
        raise Misconfigured(
            "append-only-full", said, f"ALTER TABLE {table} REPLICA IDENTITY DEFAULT, then start capture again."
        )


def failing(connection: Connection, table: Table) -> str:
    """Return the sentence that says which statements fail once the table is published."""
    rows = connection.execute(_CASCADES, {"oids": [leaf.oid for leaf in table.leaves] + [table.oid]})
    parents = [f"{what} of {parent}, which cascades to it" for parent, what in rows]
    fail = ", ".join(["UPDATE, DELETE, MERGE and ON CONFLICT DO UPDATE of it", *parents])
    return (
        f"{table.full_name} is captured as append-only: from now on Postgres refuses, whoever runs them: {fail}. "
        "INSERT, COPY and TRUNCATE go on (S10)."
    )


_CASCADES = """
SELECT DISTINCT confrelid::regclass::text,
       CASE WHEN confdeltype IN ('c', 'n', 'd') THEN 'DELETE' || CASE WHEN confupdtype IN ('c', 'n', 'd') THEN ' and UPDATE' ELSE '' END
            ELSE 'UPDATE' END
FROM pg_constraint
WHERE contype = 'f' AND conrelid = ANY(%(oids)s) AND (confdeltype IN ('c', 'n', 'd') OR confupdtype IN ('c', 'n', 'd')) ORDER BY 1
"""
