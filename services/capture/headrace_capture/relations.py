"""From Relation messages to tables: which are captured, under which schema version, and whether their topic still equals them.

A table whose shape has changed may have rows that changed without an event (S12), and one that is new may have had rows before: both are
told to `suspected`, which looks closer (`fingerprints`) and lets the table be read again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from headrace.change import Column, TableSchema
from headrace.errors import Misconfigured, Poison
from headrace.log import Log
from headrace_capture import append_only, catalog
from headrace_capture.cut import Cut
from headrace_capture.fingerprints import widened
from headrace_capture.pgoutput import Relation
from headrace_capture.replication import MEND, postgres_errors
from headrace_capture.tables import ColumnPlan, Table, newest


class _ByOid(dict[int, Table | None]):
    def __missing__(self, oid: int) -> None:
        raise Poison("bad-message", f"A row of table {oid} came before its shape.", "Report this as a defect.")


class Relations:
    """The tables of one stream, by the oid that row messages name. None: seen, and left out.

    Attributes:
        versions: All schema versions, by table and number.
        shapes: The newest one of each table.
        names: The names of the columns of all versions, by table.
        suspected: Is told of each new version, with why rows may have changed without an event (empty: they did not), or None for a
            table's first.
        moved: Is told, with each Relation message, the name, the oids of the tables that hold the rows, and the name that those of a
            partitioned one went by until now, or empty.
        held: Is told the name by which the rows of a table come, and its oid. A partition's shape Postgres tells right after its root's.
    """

    def __init__(self, log: Log, cut: Cut, connection: catalog.Connection, say: Callable[[str], None]) -> None:
        """Know the schema versions that are in the log; `connection` reads the catalogue, `say` warns people."""
        self._log = log
        self._cut = cut
        self._connection = connection
        self._say = say
        self.versions = log.schemas()
        self.shapes = newest(self.versions.values())
        self.names: dict[str, set[str]] = defaultdict(set)
        for shape in self.versions.values():
            self._name(shape)
        self.suspected: Callable[[TableSchema, str | None], None] = lambda shape, _why: cut.inexact.add(shape.table)
        self.moved: Callable[[str, frozenset[int], str], None] = lambda _table, _oids, _was: None
        self.held: Callable[[str, int], None] = lambda _table, _oid: None
        self.by_oid = _ByOid()
        self._root = ""  # the partitioned table whose shape was told last, if that of a partition must follow now
        # What was told after a root, as what it is in the catalogue and after how many changes: a partition, unless a TRUNCATE follows.
        self._parts: list[tuple[str, Relation, catalog.Table | None, int]] = []
        self._told: dict[int, tuple[Relation, int]] = {}

    def take(self, relation: Relation, lsn: int, ordinal: int = 0) -> Table | None:
        """Learn the shape that comes after `ordinal` changes of the transaction committed at `lsn`; publish it if it is a new version.

        Raises:
            Misconfigured: `key-changed`.
        """
        with postgres_errors(f"reading the catalogue of {relation.schema}.{relation.name}"):
            found = self._learn(relation, ordinal)
        self.by_oid[relation.oid] = found
        self._told[relation.oid] = relation, lsn
        return found

    def rename(self, oid: int, name: str, lsn: int) -> bool:
        """Let the rows of a table go by the name that the catalogue had at `lsn`, where the stream is; return whether it was another one.

        Postgres tells the name of a partitioned table with the first row of each partition, and not again when it is renamed.
        """
        table, (relation, told) = self.by_oid.get(oid), self._told.get(oid, (None, 0))
        if table is None or relation is None or table.name == name or told >= lsn:
            return False
        schema, _, alone = name.partition(".")
        self.take(relation._replace(schema=schema, name=alone), lsn)
        self._root = ""
        return True

    def truncated(self, ordinal: int) -> None:
        """A TRUNCATE comes after so many changes: shapes that were told since are of what it empties, and of no partition."""
        self._root = ""
        of_it = [part for part in self._parts if part[-1] == ordinal]
        self._parts = [part for part in self._parts if part[-1] != ordinal]
        for _, relation, now, _ in of_it:
            self._named(relation, now)

    def tell_parts(self) -> None:
        """Say of which partitions rows came, before the cut that has them: only with what follows a shape that is certain."""
        parts, self._parts = self._parts, []
        for root, relation, _, _ in parts:
            self.held(root, relation.oid)

    def _is_part(self, relation: Relation, now: catalog.Table | None, ordinal: int) -> bool:
        """Whether it must be a partition, by what was told just before."""
        root, self._root = self._root, ""
        if not root or (now and now.kind == "p"):  # of two roots both are truncated
            return False
        self._parts.append((root, relation, now, ordinal))
        return True

    def _learn(self, relation: Relation, ordinal: int) -> Table | None:
        known = self.shapes.get(f"{relation.schema}.{relation.name}")
        published = catalog.published_tables(self._connection, self._cut.source.publication, holding=relation.oid)
        now = next((table for table in published if table.oid == relation.oid), None)
        leaf = now is None and any(leaf.oid == relation.oid for table in published for leaf in table.leaves)
        if self._is_part(relation, now, ordinal) or leaf:
            if now is None and known is None:
                return None  # a partition: its rows come in its root's name, which was told just before
        else:
            self._named(relation, now)
        dotted = "." in relation.schema
        if dotted or (now is None and known is None and not self._append_only(relation, known)):
            self._say(unpublished(f"{relation.schema}.{relation.name}", dotted=dotted))
            return None
        key = now.key if now else known.key if known else ()
        sent = {column.name for column in relation.columns}
        unsent = not sent.issuperset(key)  # when it was written: by a column list, or the key is newer
        if unsent and known is not None and known.key != key:
            raise _key_changed(known.table, known.key, key)
        if unsent or (not key and not self._append_only(relation, known)):
            self._say(keyless(f"{relation.schema}.{relation.name}", catalog.keyed(now, sent) if now else None))
            if known is not None:  # what is passed over from now on is read again when the key is back
                self._cut.inexact.add(known.table)
            return None
        plans = self._plans(relation, now)
        shape = self.version(
            known, TableSchema(f"{relation.schema}.{relation.name}", 1, tuple(p.column for p in plans), key)
        )
        if shape is not known:
            self._judge(known, shape, relation.oid)
            self._publish(shape)
        return Table(
            shape, self._log.topic_of(shape.table), plans, (self._log.settings.source, self._cut.source.database)
        )

    def _named(self, relation: Relation, now: catalog.Table | None) -> None:
        """Tell by which name the rows of which tables come from now on."""
        name = f"{relation.schema}.{relation.name}"
        oids = frozenset(leaf.oid for leaf in now.leaves) if now else frozenset({relation.oid})
        was = self.by_oid.get(relation.oid) if relation.oid not in oids else None
        self.moved(name, oids, was.name if was else "")
        if now and now.kind == "p":
            self._root = name
        else:
            self.held(name, relation.oid)

    def _append_only(self, relation: Relation, known: TableSchema | None) -> bool:
        """Whether a table without a key is one of those that are captured so (S10)."""
        name = f"{relation.schema}.{relation.name}"
        if name not in append_only.named(self._connection, self._cut.source.publication) and (
            known is None or known.key
        ):
            return False
        append_only.check_identity(name, relation.identity)
        return True

    def _plans(self, relation: Relation, now: catalog.Table | None) -> list[ColumnPlan]:
        """Types come from the message, as they were; what it does not tell from the catalogue, as it is now."""
        columns = {column.name: column for column in now.columns} if now else {}
        types = self._connection.execute(
            _TYPES, [[c.type_oid for c in relation.columns], [c.modifier for c in relation.columns]]
        ).fetchall()
        plans = []
        for sent, (name, base, element, below) in zip(relation.columns, types, strict=True):
            column = columns.get(sent.name)
            nullable, wide = (column.nullable, column.out_of_line) if column else (True, True)
            kind = sent.type_oid, sent.modifier
            plans.append(
                ColumnPlan(Column(sent.name, name, nullable, below), base, element, out_of_line=wide, sent=kind)
            )
        return plans

    @staticmethod
    def version(known: TableSchema | None, wanted: TableSchema) -> TableSchema:
        if known is None:
            return wanted
        if known.key != wanted.key:
            raise _key_changed(wanted.table, known.key, wanted.key)
        return known if known.columns == wanted.columns else replace(wanted, version=known.version + 1)

    def _publish(self, shape: TableSchema) -> None:
        self._cut.writer.add_topic(self._log.ensure_table(shape.table))
        self._cut.writer.schema(shape)
        self.shapes[shape.table] = self.versions[shape.table, shape.version] = shape
        self._name(shape)

    def _name(self, shape: TableSchema) -> None:
        self.names[shape.table].update(column.name for column in shape.columns)

    def settle(self, wanted: TableSchema) -> TableSchema:
        """Return the version for a shape that was read beside the stream; publish it if it is a new one.

        Raises:
            Misconfigured: `key-changed`.
        """
        known = self.shapes.get(wanted.table)
        shape = self.version(known, wanted)
        if shape is not known:
            self._publish(shape)
        return shape

    def _judge(self, known: TableSchema | None, shape: TableSchema, oid: int) -> None:
        """Say whether rows may have changed, or have been there, without an event: before the new version is among those known."""
        self.suspected(shape, silent_change(known, shape, self._with_default(oid)) if known else None)

    def _with_default(self, oid: int) -> set[str]:
        rows = self._connection.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = %s AND (atthasdef OR attgenerated <> '')", [oid]
        )
        return {name for (name,) in rows}


def _key_changed(table: str, was: Sequence[str], now: Sequence[str]) -> Misconfigured:
    said = f"The key of {table} was ({', '.join(was)}) and is ({', '.join(now)}): a key cannot change under a topic."
    mend = f"With capture stopped: {MEND} The topic is made anew: rebuild the views that read it."
    return Misconfigured("key-changed", said, mend)


def plans_of(shape: TableSchema, published: catalog.Table | None) -> list[ColumnPlan]:
    """Return how the columns of `shape` become JSON, as the catalogue says; of a table that is gone (None) only deletes are written."""
    if published is None:
        return [ColumnPlan(column, "", "", out_of_line=False) for column in shape.columns]
    return [
        ColumnPlan(column, read.base, read.element, out_of_line=read.out_of_line)
        for column, read in zip(shape.columns, published.published, strict=True)
    ]


def keyless(table: str, found: catalog.Table | None) -> str:
    """Return the warning for a table that is left out, as it was `found`."""
    if found is not None and found.unsent:
        why, mend = found.hidden()
        return f"warning: {table} is left out: {why}. {mend}"
    deferrable = found is not None and found.keyless == "deferrable"
    reason = "its key is deferrable, which is no key (rule S9)" if deferrable else "it has no primary key"
    return f"warning: {table} is left out: {reason}. Do: ALTER TABLE {table} ADD PRIMARY KEY (…); it is read then."


def unpublished(table: str, *, dotted: bool) -> str:
    """Return the note for a table of which the stream has rows, still or already; what can be seen later comes with its shape again."""
    if dotted:
        return f"warning: {table} is left out: its schema has a dot in its name. Rename the schema."
    return f"note: {table} is passed over: the catalogue does not show it as published (any more, or yet)"


def silent_change(old: TableSchema, new: TableSchema, with_default: set[str]) -> str:
    """Return why rows may have changed without an event between two versions; empty when they did not (S12).

    Only dropped columns, or only new ones that are null everywhere, are harmless; both at once may be a renamed column.
    """
    before, after = ({column.name: column for column in shape.columns} for shape in (old, new))
    added = [column for name, column in after.items() if name not in before]
    dropped = [name for name in before if name not in after]
    filled = [column.name for column in added if not column.nullable or column.name in with_default]
    retyped = [name for name, column in after.items() if name in before and not widened(before[name].type, column.type)]
    if retyped:
        return f"the type of {', '.join(retyped)} changed"
    if filled:
        return f"column {', '.join(filled)} was added with a default"
    if added and dropped:
        return f"column {', '.join(dropped)} may have been renamed to {', '.join(column.name for column in added)}"
    return ""


_TYPES = f"""
WITH RECURSIVE base(oid, below) AS (
  SELECT oid, oid FROM pg_type WHERE typtype <> 'd'
  UNION ALL SELECT t.oid, b.below FROM pg_type t JOIN base b ON t.typtype = 'd' AND t.typbasetype = b.oid
)
SELECT coalesce(format_type(u.oid, u.modifier), '???'), {catalog.BASE_AND_ELEMENT},
       {catalog.BELOW.format(declared="u.oid")}
FROM unnest(%s::oid[], %s::int4[]) WITH ORDINALITY u(oid, modifier, place)
LEFT JOIN base b ON b.oid = u.oid LEFT JOIN pg_type t ON t.oid = b.below
LEFT JOIN base e ON e.oid = t.typelem AND t.typcategory = 'A' LEFT JOIN pg_type et ON et.oid = e.below
ORDER BY u.place
"""
