"""Fingerprints of captured tables: what the catalogue must still say if no row changed without an event (S12).

The stream does not mention ATTACH, DETACH, DROP and TRUNCATE of a partition at all, and other DDL only with the next row that changes. So
the catalogue is read now and then, and with every chunk that is read again, and held against what was written down in the log. The
signs are chosen so that daily work is not taken for a change of rows:

- a column keeps its number for ever: another name or type at the same number is a rename or a change of type;
- a new column changes rows if old ones show a value for it (`atthasmissing`, of a partitioned table that of its partitions; virtual) or the
  table was written anew for it;
- a table's file changes when it is written anew. VACUUM FULL and CLUSTER do that too and touch no column, so an ordinary table is suspected
  only when a column's entry changed as well; TRUNCATE of an ordinary table is in the stream. For a partition no such difference
  can be seen: it is suspected always;
- a new partition that is empty changes nothing; one with rows may have brought them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from psycopg import sql

from headrace_capture.catalog import Connection


class ColumnPrint(NamedTuple):
    """A column: its number, name and type, whether rows from before it show a value, and which transaction touched its entry."""

    number: int
    name: str
    type: str
    filled: bool
    touched: str


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What the catalogue says of a table.

    Attributes:
        kind: ``r`` ordinary, ``p`` partitioned.
        columns: By number.
        leaves: (oid, file) of each table that holds its rows.
        empty: Leaves that were new to who asked, and empty. Not part of the print.
    """

    kind: str
    columns: tuple[ColumnPrint, ...]
    leaves: tuple[tuple[int, int], ...]
    empty: frozenset[int] = field(default=frozenset(), compare=False)

    def plain(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {"kind": self.kind, "columns": [list(c) for c in self.columns], "leaves": [list(x) for x in self.leaves]}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Fingerprint:
        """Undo `plain`."""
        columns = tuple(ColumnPrint(*column) for column in plain["columns"])
        return cls(plain["kind"], columns, tuple((oid, file) for oid, file in plain["leaves"]))


def read(
    connection: Connection, publication: str, known: Collection[int] = (), table: str | None = None
) -> dict[str, Fingerprint]:
    """Return the fingerprints of the published tables, or of one; leaves that are not `known` are asked whether they are empty."""
    found: dict[str, Fingerprint] = {}
    for name, kind, columns, leaves in connection.execute(_PRINTS, {"publication": publication, "table": table}):
        files = tuple((oid, file) for oid, file, _, _ in leaves)
        new = [(oid, schema, leaf) for oid, _, schema, leaf in leaves if kind == "p" and oid not in known]
        empty = frozenset(oid for oid, schema, leaf in new if known and _is_empty(connection, schema, leaf))
        found[name] = Fingerprint(kind, tuple(ColumnPrint(*column) for column in columns), files, empty)
    return found


def silent(before: Fingerprint, after: Fingerprint) -> str:
    """Return why rows may have changed without an event between two fingerprints; empty when they did not."""
    return _columns(before, after) or _leaves(before, after)


def _columns(before: Fingerprint, after: Fingerprint) -> str:
    old = {column.number: column for column in before.columns}
    for column in after.columns:
        was = old.get(column.number)
        if was is None:
            if column.filled:
                return f"column {column.name} was added with a default"
        elif was.name != column.name:
            return f"column {was.name} was renamed to {column.name}"
        elif not widened(was.type, column.type):
            return f"the type of {column.name} changed from {was.type} to {column.type}"
    return ""


def _leaves(before: Fingerprint, after: Fingerprint) -> str:
    old, new = dict(before.leaves), dict(after.leaves)
    if before.kind != "p" or after.kind != "p":
        rewritten = old != new and before.columns != after.columns
        return "it was written anew with other columns" if rewritten else ""
    if old.keys() - new.keys():
        return "a partition was detached or dropped"
    if new.keys() - old.keys() - after.empty:
        return "a partition with rows was attached"
    rewritten = any(new[leaf] != file for leaf, file in old.items())
    return "a partition was truncated or written anew" if rewritten else ""


def widened(old: str, new: str) -> bool:
    """Whether every value of type `old` is the same value, and the same text, under `new`."""
    before, after = old.partition("("), new.partition("(")
    if old == new:
        return True
    if before[0] != "character varying":
        return False
    return new == "text" or (after[0] == before[0] and _length(after[2]) >= _length(before[2]))


def _length(text: str) -> int:
    return int(text.rstrip(")")) if text else 1 << 30


def _is_empty(connection: Connection, schema: str, name: str) -> bool:
    query = sql.SQL("SELECT NOT EXISTS (SELECT FROM {})").format(sql.Identifier(schema, name))
    row = connection.execute(query).fetchone()
    return row is not None and bool(row[0])


_PRINTS = """
SELECT n.nspname || '.' || c.relname, c.relkind::text,
       (SELECT coalesce(json_agg(json_build_array(a.attnum, a.attname, format_type(a.atttypid, a.atttypmod),
                                                  a.atthasmissing OR a.attgenerated = 'v' OR EXISTS (
                                                    SELECT FROM pg_partition_tree(c.oid) t JOIN pg_attribute l ON l.attrelid = t.relid
                                                    WHERE c.relkind = 'p' AND l.attname = a.attname AND l.atthasmissing),
                                                  a.xmin::text) ORDER BY a.attnum), '[]')
        FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
       (SELECT coalesce(json_agg(json_build_array(l.oid::bigint, l.relfilenode::bigint, ln.nspname, l.relname) ORDER BY l.oid), '[]')
        FROM (SELECT c.oid AS oid WHERE c.relkind <> 'p'
              UNION ALL SELECT relid FROM pg_partition_tree(c.oid) WHERE isleaf AND c.relkind = 'p') x
        JOIN pg_class l ON l.oid = x.oid JOIN pg_namespace ln ON ln.oid = l.relnamespace WHERE l.relkind <> 'p')
FROM pg_publication_tables p
JOIN pg_namespace n ON n.nspname = p.schemaname JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
WHERE p.pubname = %(publication)s AND (%(table)s::text IS NULL OR %(table)s::text = n.nspname || '.' || c.relname)
"""
