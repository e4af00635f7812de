"""Which replica identity a table needs, so that rows in the log are whole [I3] and no statement of the application fails [I1].

FULL sends an out-of-line (TOAST) value that an update left alone; without it capture reads the value again (S7) and the
table is only approximately right. But FULL makes UPDATE and DELETE fail as soon as any publication of the table leaves a
generated column out (18 refuses it, older servers do not, but an upgrade would) or has a column list, be it of all columns: ours
too, for people narrow it. Without FULL they fail where our row filter compares a column that is not in the key. And no identity
at all makes them fail in any publication. What was seen on 15, 17 and 18 is in tests/integration/test_setup_keys.py (S8).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from psycopg import sql

from headrace_capture.catalog import GENERATED, Connection, Leaf, Table, TableColumn, published_tables
from headrace_capture.published import published

DEFAULT, FULL, NOTHING, INDEX = "d", "f", "n", "i"
WORDS = {DEFAULT: "DEFAULT", FULL: "FULL", NOTHING: "NOTHING"}
"""As ALTER TABLE … REPLICA IDENTITY takes them; an index is never set, and replaced only where a published partition has it."""


class Change(NamedTuple):
    """One table or partition whose replica identity (pg_class.relreplident) has to change, or was changed, from `was` to `now`."""

    schema: str
    name: str
    was: str
    now: str


class Limits(NamedTuple):
    """What the publications that send updates say of tables and partitions, by their oids.

    Attributes:
        listed: Those of which one has a column list, ours or another: Postgres takes FULL beside none.
        narrowed: The tables of which another than ours leaves columns out.
        filters: The columns that the row filter of ours compares.
    """

    listed: set[int]
    narrowed: set[int]
    filters: dict[int, set[str]]

    def beyond_key(self, table: Table) -> bool:
        """Whether our row filter compares what only FULL sends of an old row."""
        return not self.filters.get(table.oid, set()) <= {*table.key, *table.unsent}


def limits(connection: Connection, publication: str) -> Limits:
    """Read them; `publication` is ours."""
    listed, narrowed, filters = (
        connection.execute(query, {"ours": publication}).fetchall() for query in (_LISTED, _NARROWED, _FILTERS)
    )
    return Limits({row[0] for row in listed}, {row[0] for row in narrowed}, {oid: set(names) for oid, names in filters})


def listed_elsewhere(connection: Connection, publication: str) -> dict[tuple[str, str], str]:
    """Return the tables and partitions of which another publication than ours has a column list, by schema and name, with its name."""
    found = connection.execute(_LISTED_ELSEWHERE, {"ours": publication})
    return {(schema, name): other for schema, name, other in found}


def changes(table: Table, version: int, limited: Limits) -> list[Change]:
    """Return the replica identities to change before `table`, which has a usable key, is published by a server of `version`."""
    wanted = [(leaf, _wanted(table, leaf, version, limited)) for leaf in table.leaves]
    return [Change(leaf.schema, leaf.name, leaf.identity, want) for leaf, want in wanted if want != leaf.identity]


def approximate(table: Table, version: int, limited: Limits) -> bool:
    """Whether a value of `table` may have to be read again after setup, as FULL would break the application (S7, S8)."""
    return _out_of_line(table) and not _all_full(table, version, limited)


def _all_full(table: Table, version: int, limited: Limits) -> bool:
    return all(_wanted(table, leaf, version, limited) == FULL for leaf in table.leaves)


def _wanted(table: Table, leaf: Leaf, version: int, limited: Limits) -> str:
    if leaf.identity == INDEX and table.kind == "r":  # it is the key; a partition's is not the root's
        return INDEX
    listed = not limited.listed.isdisjoint((table.oid, leaf.oid))
    if leaf.identity == FULL:
        return DEFAULT if listed or _refused(table, version) else FULL
    if listed or table.oid in limited.narrowed or _unsent(table, version):
        return DEFAULT
    return FULL if _out_of_line(table) or limited.beyond_key(table) else DEFAULT


def _refused(table: Table, version: int) -> bool:
    """Whether our own publication makes UPDATE fail under FULL: seen on 18 only."""
    return version >= GENERATED and bool(_unsent(table, version))


def _unsent(table: Table, version: int) -> list[TableColumn]:
    """Return the generated columns that our publication leaves out: from 18 on it sends the stored ones."""
    sent = "s" if version >= GENERATED else "-"
    return [column for column in table.columns if column.generated and column.generated != sent]


def _out_of_line(table: Table) -> bool:
    return any(column.out_of_line for column in table.published)


def failing(connection: Connection, publication: str) -> list[str]:
    """Return the statement that mends each table altered after setup whose UPDATE and DELETE fail, or come without its key [I1]."""
    version, limited = connection.info.server_version, limits(connection, publication)
    found = []
    for table in [table for table in published_tables(connection, publication) if table.key or table.unsent]:
        wrong = [
            change
            for change in changes(table, version, limited)
            if change.was in {FULL, NOTHING, INDEX} or limited.beyond_key(table)
        ]
        found += [alter(change).as_string() for change in wrong] + past_mending(table, version, limited, publication)
        found += _sending_keys(publication) if _keeps_key(table, version, limited) else []
    return list(dict.fromkeys(found))


def _keeps_key(table: Table, version: int, limited: Limits) -> bool:
    """Whether our publication, which has no list for it, leaves a generated key out: from 18 on UPDATE and DELETE fail then."""
    return version >= GENERATED and bool(table.unsent) and table.oid not in limited.listed


def _sending_keys(publication: str) -> list[str]:
    sends = sql.SQL("ALTER PUBLICATION {} SET (publish_generated_columns = stored)")
    return [sends.format(sql.Identifier(publication)).as_string()]


def alter(change: Change) -> sql.Composed:
    """Return the statement that changes a replica identity."""
    table, to = sql.Identifier(change.schema, change.name), sql.SQL(WORDS[change.now])
    return sql.SQL("ALTER TABLE {} REPLICA IDENTITY {}").format(table, to)


def past_mending(table: Table, version: int, limited: Limits, publication: str) -> list[str]:
    """Return the statement that mends a table which fails under every identity that it may have, for what our publication says of it."""
    keyless = table.oid in limited.listed and table.unsent
    if not keyless and (not limited.beyond_key(table) or _all_full(table, version, limited)):
        return []
    drop = (
        "ALTER PUBLICATION {} DROP TABLE {} {}" if table.kind == "p" else "ALTER PUBLICATION {} DROP TABLE ONLY {} {}"
    )
    return [sql.SQL(drop).format(sql.Identifier(publication), table.identifier, sql.SQL(_ADD_AGAIN)).as_string()]


_ADD_AGAIN: Final = "/* then ADD it with its key in the column list, and no other column in the row filter */"

_SENDS: Final = "(p.pubname = %(ours)s OR p.pubupdate OR p.pubdelete)"

# A list, and a filter, is that of the table under whose name the rows are sent.
_LISTED: Final = f"""
SELECT r.prrelid FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid JOIN pg_class c ON c.oid = r.prrelid
WHERE {_SENDS} AND r.prattrs IS NOT NULL AND (c.relkind = 'r' OR p.pubviaroot)
"""

_OTHERS: Final = "p.pubname <> %(ours)s AND (p.pubupdate OR p.pubdelete)"

_LISTED_ELSEWHERE: Final = f"""
SELECT n.nspname, c.relname, min(p.pubname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_publication_rel r ON r.prrelid IN (c.oid, pg_partition_root(c.oid)) JOIN pg_publication p ON p.oid = r.prpubid
WHERE {_OTHERS} AND r.prattrs IS NOT NULL GROUP BY 1, 2
"""

_NARROWED: Final = f"""
WITH RECURSIVE {published(_OTHERS)}
SELECT coalesce(pg_partition_root(r.prrelid), r.prrelid)::oid FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
WHERE {_OTHERS} AND r.prattrs IS NOT NULL
UNION
SELECT coalesce(pg_partition_root(oid), oid)::oid FROM published
WHERE EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = oid AND a.attgenerated <> '')
"""

# Its text (`row_filters`) would wait for a locked table; what Postgres keeps of it names columns by their numbers.
_FILTERS: Final = r"""
SELECT r.prrelid, array_agg(a.attname) FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
CROSS JOIN LATERAL regexp_matches(r.prqual::text, ':varattno ([0-9]+)', 'g') AS found(number)
JOIN pg_attribute a ON a.attrelid = r.prrelid AND a.attnum = found.number[1]::int
WHERE p.pubname = %(ours)s GROUP BY r.prrelid
"""
