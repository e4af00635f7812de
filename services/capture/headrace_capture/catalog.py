"""What Postgres's catalogue says: the server, the tables and their keys.

One query for each kind of fact, over all tables at once; the rules (which key is a key, which column may be out of line)
are stated here once, for setup, snapshot and stream. Everything is read as of the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from psycopg import sql

from headrace.change import Column, TableSchema, parse_lsn
from headrace.errors import Misconfigured
from headrace_capture.connection import SESSION, SETUP, Connection, connect, connect_replication
from headrace_capture.published import LEAVES, UNLOGGED, published

__all__ = [
    "GENERATED",
    "OLDEST",
    "SESSION",
    "Connection",
    "Identity",
    "Leaf",
    "Server",
    "Table",
    "TableColumn",
    "all_tables",
    "connect",
    "connect_replication",
    "identify",
    "published_tables",
    "server",
]

OLDEST = 150000
"""The oldest server that is supported: 15 is the first whose publications tell their columns."""

GENERATED = 180000
"""The first server that can publish generated columns (stored ones), and that has virtual ones."""


@dataclass(frozen=True, slots=True)
class Server:
    """The server behind a connection. `version` is like 180001; `system_id` and `timeline` tell it from any other [I12]."""

    version: int
    wal_level: str
    system_id: str
    timeline: int
    database: str
    role: str


class Identity(NamedTuple):
    """What IDENTIFY_SYSTEM says; `lsn` is the flush position."""

    system_id: str
    timeline: int
    lsn: int
    database: str


@dataclass(frozen=True, slots=True)
class TableColumn:
    """One column, in the table's order.

    Attributes:
        type: As `format_type` gives it, with modifiers; names outside pg_catalog are qualified.
        oid: The type's oid, as a Relation message names it.
        base: The type's own name below all domains: ``int4``, ``_text`` for ``text[]``; qualified if it is not built in.
        element: The same for the elements of an array, with what separates them where that is no comma (``box;``); empty
            for other types.
        below: The type below the domains in `type`, spelled as that but without modifiers; empty where no domain is in it.
        generated: ``s`` stored, ``v`` virtual, empty for an ordinary column.
        out_of_line: Whether Postgres may keep the value out of line (TOAST) and leave it out of an update's record.
        published: Whether the publication asked about sends it.
    """

    name: str
    type: str
    oid: int
    base: str
    element: str
    below: str
    nullable: bool
    generated: str
    out_of_line: bool
    published: bool = True


class Leaf(NamedTuple):
    """A table that holds rows: the table itself, or one partition. Replica identities are theirs, not the root's.

    `unlogged` is the statement that mends it if its changes are not in the WAL.
    """

    oid: int
    schema: str
    name: str
    identity: str
    unlogged: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """One table, a partitioned one under its root.

    Attributes:
        key: The key's columns in the key's order; empty when no key is usable, and then `keyless` says why.
        keyless: One of the empty string, ``none``, ``deferrable``, ``unsent``.
        unsent: The columns of its key that the publication does not send: such a key names no row of the stream, so it is not in `key`.
        unique: An index that could serve as replica identity if there is no key, empty if there is none.
        kind: ``r`` ordinary, ``p`` partitioned.
        identity: pg_class.relreplident: ``d f i n``; a partitioned table's own is without effect, see `leaves`.
    """

    oid: int
    schema: str
    name: str
    kind: str
    identity: str
    columns: tuple[TableColumn, ...] = ()
    key: tuple[str, ...] = ()
    keyless: str = "none"
    unsent: tuple[str, ...] = ()
    unique: str = ""
    leaves: tuple[Leaf, ...] = ()

    @property
    def full_name(self) -> str:
        """Return ``schema.name``, as everything else in headrace names the table."""
        return f"{self.schema}.{self.name}"

    @property
    def published(self) -> tuple[TableColumn, ...]:
        """Return the columns that the stream and therefore the snapshot carry."""
        return tuple(column for column in self.columns if column.published)

    @property
    def identifier(self) -> sql.Identifier:
        """Return the quoted, qualified name."""
        return sql.Identifier(self.schema, self.name)

    def hidden(self) -> tuple[str, str]:
        """Return why its key is not all sent, and what to do (see `unsent`)."""
        names = ", ".join(self.unsent)
        if any(column.generated for column in self.columns if column.name in self.unsent):
            why = f"{names} of its key is generated, which Postgres sends from 18 on, where the publication says so"
            other = "Give it a primary key of other columns, or: ALTER TABLE … REPLICA IDENTITY USING INDEX … (unique, NOT NULL)"
            return why, f"{other}. On 18 or newer: headrace setup --table {self.full_name} --apply"
        why = f"the publication's column list leaves out {names} of its key"
        return why, f"ALTER PUBLICATION … DROP TABLE {self.full_name}, then ADD it with its key in the list."

    def shape(self, version: int) -> TableSchema:
        """Return the table's shape as a version of the schemas topic."""
        columns = tuple(Column(column.name, column.type, column.nullable, column.below) for column in self.published)
        return TableSchema(self.full_name, version, columns, self.key)


def server(connection: Connection) -> Server:
    """Read the facts about the server. The timeline is the one that is written now.

    Raises:
        Misconfigured: `postgres-too-old`, `postgres-standby`.
    """
    version = connection.info.server_version
    if version < OLDEST:
        raise Misconfigured(
            "postgres-too-old", f"The server is Postgres {version // 10000}.", f"Use {OLDEST // 10000} or newer."
        )
    refuse_standby(connection)
    row = _one(connection, _SERVER)
    return Server(version, row[0], row[1], int(row[2], 16), row[3], row[4])


def refuse_standby(connection: Connection) -> None:
    """Raise Misconfigured: `postgres-standby`."""
    if _one(connection, "SELECT pg_is_in_recovery()")[0]:
        raise Misconfigured("postgres-standby", "The server is a standby.", "Let HEADRACE_DSN name the primary.")


def identify(replication: Connection) -> Identity:
    """Ask a replication connection which server it speaks to."""
    row = _one(replication, "IDENTIFY_SYSTEM")
    return Identity(str(row[0]), int(row[1]), parse_lsn(row[2]), row[3])


def published_tables(connection: Connection, publication: str, only: str = "", holding: int = 0) -> list[Table]:
    """Return the tables of a publication by name, each column with whether the publication sends it.

    With `only` that one; with `holding` those that hold the rows of the table with this oid: itself, and what it is a partition of.

    Raises:
        Misconfigured: `publication-missing`.
    """
    if connection.execute("SELECT FROM pg_publication WHERE pubname = %s", [publication]).fetchone() is None:
        raise Misconfigured("publication-missing", f"There is no publication {publication}.", SETUP)
    asked = {"publication": publication, "only": only, "holding": holding}
    sent = {row[0]: set(row[1]) for row in connection.execute(_PUBLISHED, asked)}
    return [_published(table, sent[table.oid]) for table in _read(connection, list(sent))]


def partitioned(connection: Connection, publication: str) -> tuple[dict[int, str], int]:
    """Return the names of the partitioned tables of a publication by their oids, and an LSN before which they got these names."""
    names: dict[int, str] = dict(connection.execute(_PARTITIONED, {"publication": publication}).fetchall())
    return names, parse_lsn(_one(connection, "SELECT pg_current_wal_insert_lsn()::text")[0])


def check_operations(connection: Connection, publication: str) -> None:
    """Refuse a publication that does not send every operation.

    Raises:
        Misconfigured: `publication-incomplete`.
    """
    row = connection.execute(_LEFT_OUT, [publication]).fetchone()
    if row is not None and row[0]:
        name = sql.Identifier(publication).as_string()
        raise Misconfigured(
            "publication-incomplete",
            f"Publication {publication} does not send {row[0]}: such changes would never reach a view.",
            f"ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate'), then capture: all is read again.",
        )


def _published(table: Table, sent: set[str]) -> Table:
    """Mark the columns that the stream sends."""
    columns = tuple(replace(column, published=column.name in sent) for column in table.columns)
    return keyed(replace(table, columns=columns), sent)


def keyed(table: Table, sent: Collection[str]) -> Table:
    """Return the table without its key if not all of that is in what the stream sends."""
    unsent = tuple(name for name in table.key if name not in sent)
    return replace(table, key=(), keyless="unsent", unsent=unsent) if unsent else table


def all_tables(connection: Connection) -> list[Table]:
    """Return every permanent table outside the system's schemas, partitioned ones under their root, by name."""
    generated = connection.info.server_version >= GENERATED
    found = _read(connection, [row[0] for row in connection.execute(_CANDIDATES)])
    return [keyed(table, {c.name for c in table.columns if generated or not c.generated}) for table in found]


def _read(connection: Connection, oids: list[int]) -> list[Table]:
    tables = [Table(*row) for row in connection.execute(_TABLES, {"oids": oids})]
    columns, indexes, leaves = (_grouped(connection, query, oids) for query in (_COLUMNS, _INDEXES, _LEAVES))
    return [
        replace(
            table,
            columns=tuple(TableColumn(*row) for row in columns.get(table.oid, [])),
            leaves=tuple(Leaf(*row) for row in leaves.get(table.oid, [])),
            **_key(table, [_Index(*row) for row in indexes.get(table.oid, [])]),
        )
        for table in tables
    ]


class _Index(NamedTuple):
    name: str
    columns: list[str]
    primary: bool
    identity: bool
    immediate: bool


def _key(table: Table, indexes: Sequence[_Index]) -> dict[str, Any]:
    """Choose the key: what the stream names an old row by, so the replica identity's index where one is declared.

    Otherwise the primary key. A deferrable one is not a key (S9): between two statements two rows may share it. A column that an index
    has twice is in the key once.
    """
    declared = table.kind == "r" and table.identity == "i"
    chosen = [index for index in indexes if (index.identity if declared else index.primary)]
    usable = [index for index in chosen if index.immediate]
    unique = next((index.name for index in indexes if index.immediate), "")
    if usable:
        return {"key": tuple(dict.fromkeys(usable[0].columns)), "keyless": ""}
    return {"keyless": "deferrable" if chosen else "none", "unique": unique}


def _grouped(connection: Connection, query: str, oids: list[int]) -> dict[int, list[tuple[Any, ...]]]:
    groups: dict[int, list[tuple[Any, ...]]] = {}
    for row in connection.execute(query, {"oids": oids}):
        groups.setdefault(row[0], []).append(row[1:])
    return groups


def _one(connection: Connection, query: str) -> tuple[Any, ...]:
    row = connection.execute(query).fetchone()
    assert row is not None
    return row


_SERVER = """
SELECT current_setting('wal_level'), system_identifier::text, left(pg_walfile_name(pg_current_wal_lsn()), 8),
       current_database(), current_user
FROM pg_control_system()
"""

_CANDIDATES = """
SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND NOT c.relispartition
  AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
"""

_PARTITIONED = f"""
WITH RECURSIVE {published("p.pubname = %(publication)s")}
SELECT c.oid, n.nspname || '.' || c.relname FROM published JOIN pg_class c ON c.oid = published.oid
JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'p' AND strpos(n.nspname, '.') = 0
"""

_LEFT_OUT = """
SELECT concat_ws(', ', CASE WHEN NOT pubinsert THEN 'INSERT' END, CASE WHEN NOT pubupdate THEN 'UPDATE' END,
                 CASE WHEN NOT pubdelete THEN 'DELETE' END, CASE WHEN NOT pubtruncate THEN 'TRUNCATE' END)
FROM pg_publication WHERE pubname = %s
"""

# Before 18 no publication sends generated columns, and none has `pubgencols`. A schema with a dot would make names that mean two tables.
_PUBLISHED = f"""
WITH RECURSIVE {published("p.pubname = %(publication)s")}
SELECT c.oid, coalesce(array_agg(a.attname) FILTER (WHERE coalesce(
         a.attnum = ANY(r.prattrs), a.attgenerated = '' OR (a.attgenerated = 's' AND to_jsonb(p) ->> 'pubgencols' = 's'))), '{{}}')
FROM published JOIN pg_publication p ON p.oid = pub
JOIN pg_class c ON c.oid = published.oid JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_publication_rel r ON r.prpubid = pub AND r.prrelid = c.oid
LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE strpos(n.nspname, '.') = 0 AND %(only)s IN ('', n.nspname || '.' || c.relname)
  AND (%(holding)s::oid IN (0, c.oid) OR c.oid IN (SELECT ancestor FROM above WHERE above.oid = %(holding)s::oid)) GROUP BY c.oid
"""

_TABLES = """
SELECT c.oid, n.nspname, c.relname, c.relkind::text, c.relreplident::text
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = ANY(%(oids)s) ORDER BY 2, 3
"""


BASE_AND_ELEMENT = """
  coalesce(CASE WHEN t.typnamespace = 'pg_catalog'::regnamespace THEN t.typname ELSE format_type(t.oid, NULL) END, ''),
  coalesce(CASE WHEN et.typnamespace = 'pg_catalog'::regnamespace THEN et.typname ELSE format_type(et.oid, NULL) END, '')
  || coalesce(nullif(et.typdelim::text, ','), '')
"""
"""What `TableColumn` calls so, of the type `t` and its element `et`: a name alone could be a user's own ``public.date``."""

BELOW = """CASE WHEN t.typarray = 0 AND (e.below <> t.typelem OR (e.oid IS NOT NULL AND t.oid <> {declared}))
            THEN format_type(e.below, NULL) || '[]'
            WHEN t.oid <> {declared} THEN format_type(t.oid, NULL) ELSE '' END"""
"""The type below the domains of a declared one: `t` is its base, `e` that of its elements (a true array has no array type)."""

# A table without a TOAST table keeps every value in line: Postgres makes one as soon as a row could be too wide.
_COLUMNS = f"""
WITH RECURSIVE base(oid, below) AS (
  SELECT oid, oid FROM pg_type WHERE typtype <> 'd'
  UNION ALL SELECT t.oid, b.below FROM pg_type t JOIN base b ON t.typtype = 'd' AND t.typbasetype = b.oid
), {LEAVES}, wide(oid) AS (
  SELECT l.root FROM leaf l JOIN pg_class c ON c.oid = l.oid WHERE c.reltoastrelid <> 0
)
SELECT a.attrelid, a.attname, format_type(a.atttypid, a.atttypmod), a.atttypid, {BASE_AND_ELEMENT},
       {BELOW.format(declared="a.atttypid")},
       NOT a.attnotnull, a.attgenerated::text, a.attstorage <> 'p' AND a.attgenerated <> 'v' AND a.attrelid IN (SELECT oid FROM wide)
FROM pg_attribute a
JOIN base b ON b.oid = a.atttypid JOIN pg_type t ON t.oid = b.below
LEFT JOIN base e ON e.oid = t.typelem AND t.typcategory = 'A' LEFT JOIN pg_type et ON et.oid = e.below
WHERE a.attrelid = ANY(%(oids)s) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attrelid, a.attnum
"""

# Unique, valid, not partial, over plain columns that are never null: what may be a key, the primary key first. Under another collation
# it tells values apart that are one to their column, if that collation is not deterministic: rows would have one key.
_INDEXES = """
SELECT i.indrelid, c.relname, k.columns, i.indisprimary, i.indisreplident, i.indimmediate
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
CROSS JOIN LATERAL (
  SELECT array_agg(a.attname ORDER BY o) AS columns,
         bool_and(a.attnotnull AND (u.ordering = a.attcollation OR coalesce(l.collisdeterministic, true))) AS usable
  FROM unnest((i.indkey::int2[])[0:i.indnkeyatts - 1], (i.indcollation::oid[])[0:i.indnkeyatts - 1]) WITH ORDINALITY u(number, ordering, o)
  LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = u.number AND a.attnum > 0
  LEFT JOIN pg_collation l ON l.oid = a.attcollation
) k
WHERE i.indrelid = ANY(%(oids)s) AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL AND k.usable
ORDER BY i.indrelid, i.indisprimary DESC, c.relname
"""

_LEAVES = f"""
WITH RECURSIVE {LEAVES}
SELECT l.root, c.oid, n.nspname, c.relname, CASE WHEN l.root <> c.oid AND pk.indisreplident THEN 'd' ELSE c.relreplident::text END,
       {UNLOGGED.format("c")}
FROM leaf l JOIN pg_class c ON c.oid = l.oid LEFT JOIN pg_index pk ON pk.indrelid = c.oid AND pk.indisprimary
JOIN pg_namespace n ON n.oid = c.relnamespace WHERE l.root = ANY(%(oids)s) ORDER BY l.root, n.nspname, c.relname
"""
