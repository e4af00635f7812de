"""What setup changed in a source, kept in the source: a comment on the publication, as JSON.

It is written in the transaction that makes the changes, so whoever finds the publication can take everything away again,
from any machine. It holds facts, never SQL: whoever may comment on a publication must not choose what an administrator runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import orjson
from psycopg import sql

from headrace_capture.catalog import Connection
from headrace_capture.identities import Change

_BY = "headrace setup"


class Grant(NamedTuple):
    """One right that a role was given: ``REPLICATION``, ``BYPASSRLS``, ``USAGE`` of a schema, ``SELECT`` from a table."""

    role: str
    right: str
    schema: str = ""
    name: str = ""


@dataclass(slots=True)
class Memory:
    """What setup changed, over all its runs.

    Attributes:
        grants: Rights that were given.
        identities: Replica identities that were changed; the first `was` of each table is kept.
        append_only: Tables without a key that somebody named (see `append_only`).
        published: What was in the publication, by oid and name, each name that setup saw: a table that is there and no longer in it
            was taken out by somebody.
        partitions: Those of which something was changed, in the same way.
        database: Whose oids these are: a dump takes them to another server or database, where they mean other tables.
    """

    grants: list[Grant] = field(default_factory=list)
    identities: list[Change] = field(default_factory=list)
    append_only: list[str] = field(default_factory=list)
    published: set[tuple[int, str]] = field(default_factory=set)
    partitions: set[tuple[int, str]] = field(default_factory=set)
    database: str = ""

    def changed(self, schema: str, name: str, was: str, now: str) -> None:
        """Remember a changed replica identity; one that is put back is forgotten."""
        known = {(c.schema, c.name): c for c in self.identities}
        before = known.pop((schema, name), None)
        first = before.was if before and before.now == was else was
        if first != now:
            known[schema, name] = Change(schema, name, first, now)
        self.identities = list(known.values())

    def statement(self, publication: str) -> sql.Composed:
        """Return the statement that writes it down."""
        facts: dict[str, object] = {"by": _BY, "grants": [*map(list, self.grants)]}
        facts["identities"] = [*map(list, self.identities)]
        facts["append_only"] = self.append_only
        facts |= {"database": self.database, "captured": sorted(self.published), "partitions": sorted(self.partitions)}
        text = orjson.dumps(facts).decode()
        return sql.SQL("COMMENT ON PUBLICATION {} IS {}").format(sql.Identifier(publication), sql.Literal(text))


def recall(connection: Connection, publication: str) -> Memory | None:
    """Return what setup changed; None when the publication is missing or somebody else's."""
    query = "SELECT obj_description(oid, 'pg_publication') FROM pg_publication WHERE pubname = %s"
    row = connection.execute(query, [publication]).fetchone()
    try:
        said = orjson.loads(row[0] if row and row[0] else "{}")
    except orjson.JSONDecodeError:
        return None
    if not isinstance(said, dict) or said.get("by") != _BY:
        return None
    identities = [Change(*changed) for changed in said["identities"]]
    grants = [Grant(*grant) for grant in said["grants"]]
    of = said.get("database", "")
    same = of == database(connection)
    published, partitions = (_found(connection, said.get(name, []), same) for name in ("captured", "partitions"))
    return Memory(grants, identities, said.get("append_only", []), published, partitions, of)


def _found(connection: Connection, noted: list[tuple[int, str]], same: bool) -> set[tuple[int, str]]:
    """Return tables by oid and name. From a dump only the names still tell which they are; 0 is of one that was not there by then."""
    known = {(oid, name) for oid, name in noted if same and oid}
    unknown = [name for oid, name in noted if not (same and oid)]
    return known | set(connection.execute(_BY_NAMES, [unknown]).fetchall())


def database(connection: Connection) -> str:
    """Return what tells the server and the database from any other, also from one of the same name that was made anew."""
    row = connection.execute(_DATABASE).fetchone()
    assert row is not None
    return str(row[0])


_DATABASE = """
SELECT concat_ws('/', system_identifier, (SELECT oid FROM pg_database WHERE datname = current_database())) FROM pg_control_system()
"""

_BY_NAMES = """
SELECT coalesce(c.oid, 0), name FROM unnest(%s::text[]) name LEFT JOIN (pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace)
  ON c.relkind IN ('r', 'p') AND n.nspname || '.' || c.relname = name
"""
