"""What publications send, and which tables hold a table's rows: SQL that waits for no lock on any of these tables.

`pg_publication_tables` and `pg_partition_tree` open the tables that they tell of, so they wait for as long as a transaction of the
application holds one of them (seen on 15, 17 and 18), and capture would stand still with it. The system's own tables say the same,
and as of the caller's snapshot, like everything else in `catalog`. A test holds the two against each other on each version.
"""

from __future__ import annotations

from typing import Final, LiteralString

from headrace_capture.connection import Connection

LEAVES: Final = """
above(oid, ancestor) AS (
  SELECT i.inhrelid, i.inhparent FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
  WHERE c.relispartition AND NOT i.inhdetachpending
  UNION ALL
  SELECT a.oid, i.inhparent FROM above a JOIN pg_inherits i ON i.inhrelid = a.ancestor JOIN pg_class c ON c.oid = i.inhrelid
  WHERE c.relispartition AND NOT i.inhdetachpending
), leaf(root, oid) AS (
  SELECT oid, oid FROM pg_class WHERE relkind = 'r'
  UNION ALL
  SELECT a.ancestor, a.oid FROM above a JOIN pg_class c ON c.oid = a.oid WHERE c.relkind <> 'p'
)"""
"""Goes after WITH RECURSIVE: each partition with each of its ancestors; each table with each of those that hold rows of it."""

UNLOGGED: Final = """
CASE WHEN {0}.relkind = 'f' THEN (SELECT concat('ALTER TABLE ', inhparent::regclass, ' DETACH PARTITION ', {0}.oid::regclass)
                                  FROM pg_inherits WHERE inhrelid = {0}.oid)
     WHEN {0}.relpersistence <> 'p' THEN concat('ALTER TABLE ', {0}.oid::regclass, ' SET LOGGED') ELSE '' END"""
"""Of an entry of pg_class that holds rows of a captured table, the statement that mends it if its changes are not in the WAL: it is
unlogged, or foreign, which Postgres takes for a partition of what is published as well. Empty if they are."""

_PUBLISHED: Final = """
{leaves}, named(pub, via_root, oid) AS (
  SELECT p.oid, p.pubviaroot, c.oid
  FROM pg_publication p JOIN pg_class c ON c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND c.oid >= 16384
  WHERE {which} AND (p.puballtables
    OR EXISTS (SELECT FROM pg_publication_rel r WHERE r.prpubid = p.oid AND r.prrelid = c.oid)
    OR EXISTS (SELECT FROM pg_publication_namespace s WHERE s.pnpubid = p.oid AND s.pnnspid = c.relnamespace))
), published(pub, oid) AS (
  (SELECT pub, oid FROM named WHERE via_root EXCEPT SELECT n.pub, a.oid FROM named n JOIN above a ON a.ancestor = n.oid)
  UNION
  SELECT n.pub, l.oid FROM named n JOIN leaf l ON l.root = n.oid WHERE NOT n.via_root
)"""


def published(which: LiteralString) -> str:
    """Return `LEAVES` and then ``published(pub, oid)``: the tables that publications send, where `which` holds for the publication `p`.

    A partition stands there under the name by which it is sent: its root's where the publication says so.
    """
    return _PUBLISHED.format(leaves=LEAVES, which=which)


def row_filters(connection: Connection, publication: str, only: int | None = None) -> dict[int, str]:
    """Return the row filters of a publication, in Postgres's own text, by the oid of the table; of one table (`only`), or of all.

    Unlike the rest this waits for a locked table: it is for who reads the table's rows next.
    """
    return dict(connection.execute(_FILTERS, {"publication": publication, "only": only}).fetchall())


_FILTERS: Final = """
SELECT c.oid, pg_get_expr(r.prqual, r.prrelid)
FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid JOIN pg_class c ON c.oid = r.prrelid
WHERE p.pubname = %(publication)s AND r.prqual IS NOT NULL AND c.oid = coalesce(%(only)s::oid, c.oid)
  AND NOT EXISTS (SELECT FROM pg_publication_namespace s WHERE s.pnpubid = p.oid AND s.pnnspid = c.relnamespace)
"""
