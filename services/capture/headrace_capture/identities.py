"""Which replica identity a table needs, so that rows in the log are whole [I3] and no statement of the application fails [I1].

FULL sends an out-of-line (TOAST) value that an update left alone; without it capture reads the value again (S7) and the
table is only approximately right. But FULL makes UPDATE and DELETE fail as soon as any publication of the table leaves a
column out: a generated column (18 refuses it, older servers do not, but an upgrade would) or a column list. And no identity
at all makes them fail in any publication. What was seen on 15 and 18 is in tests/integration/test_setup.py (S8).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from psycopg import sql

from headrace_capture.catalog import GENERATED, Connection, Table, TableColumn, published_tables
from headrace_capture.published import published

DEFAULT, FULL, NOTHING, INDEX = "d", "f", "n", "i"
WORDS = {DEFAULT: "DEFAULT", FULL: "FULL", NOTHING: "NOTHING"}
"""As ALTER TABLE … REPLICA IDENTITY takes them; an index is never set, and replaced only where a published partition has it."""


class Change(NamedTuple):
    """One table or partition whose replica identity has to change, from `was` to `now`."""

    schema: str
    name: str
    was: str
    now: str


def changes(table: Table, version: int, *, narrowed: bool) -> list[Change]:
    """Return the replica identities to change before `table` is published.

    Args:
        table: A table with a usable key.
        version: The server's.
        narrowed: Whether another publication leaves columns of it out, see `narrowed_elsewhere`.
    """
    wanted = [(leaf, _wanted(table, leaf.identity, version, narrowed)) for leaf in table.leaves]
    return [Change(leaf.schema, leaf.name, leaf.identity, want) for leaf, want in wanted if want != leaf.identity]


def approximate(table: Table, version: int, *, narrowed: bool) -> bool:
    """Whether a value of `table` may have to be read again after setup, as FULL would break the application (S7, S8)."""
    after = (_wanted(table, leaf.identity, version, narrowed) for leaf in table.leaves)
    return _out_of_line(table) and any(identity != FULL for identity in after)


def _wanted(table: Table, identity: str, version: int, narrowed: bool) -> str:
    if identity == INDEX and table.kind == "r":  # it is the key; a partition's is not the root's
        return INDEX
    if identity == FULL:
        return DEFAULT if _refused(table, version) else FULL
    if _out_of_line(table) and not narrowed and not _unsent(table, version):
        return FULL
    return DEFAULT


def _refused(table: Table, version: int) -> bool:
    """Whether our own publication makes UPDATE fail under FULL: seen on 18 only."""
    return version >= GENERATED and bool(_unsent(table, version))


def _unsent(table: Table, version: int) -> list[TableColumn]:
    """Return the generated columns that our publication leaves out: from 18 on it sends the stored ones."""
    sent = "s" if version >= GENERATED else "-"
    return [column for column in table.columns if column.generated and column.generated != sent]


def _out_of_line(table: Table) -> bool:
    return any(column.out_of_line for column in table.columns)


def failing(connection: Connection, publication: str) -> list[str]:
    """Return the statement that mends each table altered after setup whose UPDATE and DELETE fail, or come without its key [I1]."""
    version, narrowed = connection.info.server_version, narrowed_elsewhere(connection, publication)
    wrong = [
        change
        for table in published_tables(connection, publication)
        if table.key
        for change in changes(table, version, narrowed=table.oid in narrowed)
        if change.was in {FULL, NOTHING, INDEX}
    ]
    return [
        sql.SQL("ALTER TABLE {} REPLICA IDENTITY {}")
        .format(sql.Identifier(schema, name), sql.SQL(WORDS[now]))
        .as_string()
        for schema, name, _, now in wrong
    ]


def narrowed_elsewhere(connection: Connection, publication: str) -> set[int]:
    """Return the oids of tables of which another publication that sends updates leaves columns out."""
    return {row[0] for row in connection.execute(_NARROWED, {"ours": publication})}


_OTHERS: Final = "p.pubname <> %(ours)s AND (p.pubupdate OR p.pubdelete)"

_NARROWED = f"""
WITH RECURSIVE {published(_OTHERS)}
SELECT coalesce(pg_partition_root(r.prrelid), r.prrelid)::oid FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
WHERE {_OTHERS} AND r.prattrs IS NOT NULL
UNION
SELECT coalesce(pg_partition_root(oid), oid)::oid FROM published
WHERE EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = oid AND a.attgenerated <> '')
"""
