"""Fingerprints of captured tables: what the catalogue must still say if no row changed without an event (S12).

The stream does not mention ATTACH, DETACH, DROP and TRUNCATE of a partition at all, and other DDL only with the next row that changes. So
the catalogue is read now and then, and with every chunk that is read again, and held against what was written down in the log. The
signs are chosen so that daily work is not taken for a change of rows:

- a column keeps its number for ever: another name or type at the same number is a rename or a change of type;
- a new column changes rows if old ones show a value for it (`atthasmissing`, of a partitioned table that of its partitions; virtual) or the
  table was written anew for it; and if the log has values under its name from before: an earlier column was dropped, and rows show null;
- a table's file changes when it is written anew. VACUUM FULL and CLUSTER do that too and touch no column, so an ordinary table is suspected
  only when a column's entry changed as well; TRUNCATE of an ordinary table is in the stream. For a partition no such difference
  can be seen: it is suspected always; so is a table that the publication does not name (FOR ALL TABLES, TABLES IN SCHEMA, or its root):
  only of what is named Postgres refuses SET UNLOGGED, and after SET LOGGED nothing but the file tells that changes were not in the WAL;
- a new partition that is empty changes nothing; one with rows may have brought them; so may one that was detached and attached again:
  another transaction has touched what links it to its root;
- a table whose rows the stream brings by a name belongs to that print at once (`Jobs.hold`): a partition may have come and gone between two
  looks, or another table may have had the name;
- changes of an unlogged or foreign partition are not in the WAL: its table cannot be exact until it is mended (see `writing`);
- a label of an enum has an oid of its own: another label at the same one is a rename, and rows show it; so is one that another transaction
  has touched, for it may have been taken back. Added labels change no row;
- a column that was not sent (a generated one, before 18) and is sent now shows values in old rows;
- a composite type that gains or loses an attribute is not written anew: rows show one value more or less at once;
- so has the constraint (or, as a replica identity, the index) that is the key: while there was none, changes named no row, and two rows may
  have had one key;
- what makes a table published, its entry in the publication, has an oid of its own: another one means that the stream was silent between,
  or that the rows it sends are others (a row filter). So has the publication, and which transaction touched its own entry last tells that
  its options were others for a while: it may have left operations out. A table that is sent for its schema's sake may have been in another
  one (SET SCHEMA and back): another transaction has touched what says that it is in this one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from psycopg import errors, sql

from headrace.change import TableSchema
from headrace_capture.catalog import Connection
from headrace_capture.published import UNLOGGED, published

NO_KEY = "none"
UNSEEN = -1
"""The file of a table that holds rows of one, as the stream said before the catalogue did."""


class ColumnPrint(NamedTuple):
    """A column.

    Its number, name and type, whether rows from before it show a value, which transaction touched its entry, and whether it is sent.
    """

    number: int
    name: str
    type: str
    filled: bool
    touched: str
    sent: bool = True


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What the catalogue says of a table.

    Attributes:
        kind: ``r`` ordinary, ``p`` partitioned.
        columns: By number.
        leaves: (oid, file) of each table that holds its rows.
        sent: The oids of the publication and of what in it names the table; empty: not known.
        altered: Which transaction touched the publication's entry; empty: not known.
        width: How many columns it ever had; 0: not known.
        key: The oid of what is the key, `NO_KEY` where nothing is; empty: not known.
        labels: (oid, label, which transaction touched it) of each enum that is the type of a column, below arrays, domains, ranges and
            composites; of a composite that is, the numbers of its attributes and how many it ever had. The last: empty where not known.
        links: (oid, transactions that touched its links up to the root) of each partition.
        unlogged: For each leaf whose changes are not in the WAL, the statement that mends it.
        placed: Which transaction put the table into its schema, where the publication names only that; empty: not known.
        empty: Leaves that were new to who asked, and empty. Not part of the print.
        unnamed: Whether no entry of the publication is the table's own. Not part of the print either: `sent` is.
        leaving: Partitions that DETACH … CONCURRENTLY is about to take, from any table. No part of the print.
    """

    kind: str
    columns: tuple[ColumnPrint, ...]
    leaves: tuple[tuple[int, int], ...]
    sent: str = ""
    altered: str = ""
    width: int = 0
    key: str = ""
    labels: tuple[tuple[int, str, str], ...] = ()
    links: tuple[tuple[int, str], ...] = ()
    unlogged: tuple[str, ...] = ()
    placed: str = ""
    empty: frozenset[int] = field(default=frozenset(), compare=False)
    unnamed: bool = field(default=False, compare=False)
    leaving: frozenset[int] = field(default=frozenset(), compare=False)

    def plain(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        columns, leaves = [list(column) for column in self.columns], [list(leaf) for leaf in self.leaves]
        rest = {
            "sent": self.sent,
            "altered": self.altered,
            "width": self.width,
            "key": self.key,
            "labels": [list(label) for label in self.labels],
            "links": [list(link) for link in self.links],
            "unlogged": list(self.unlogged),
            "placed": self.placed,
        }
        return {"kind": self.kind, "columns": columns, "leaves": leaves} | rest

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Fingerprint:
        """Undo `plain`."""
        columns = tuple(ColumnPrint(*column) for column in plain["columns"])
        leaves = tuple((oid, file) for oid, file in plain["leaves"])
        labels = tuple((oid, text, "".join(touched)) for oid, text, *touched in plain.get("labels", ()))
        links = tuple((oid, text) for oid, text in plain.get("links", ()))
        sent, altered, key, placed = (plain.get(name, "") for name in ("sent", "altered", "key", "placed"))
        unlogged = tuple(plain.get("unlogged", ()))
        return cls(
            plain["kind"], columns, leaves, sent, altered, plain.get("width", 0), key, labels, links, unlogged, placed
        )


def read(
    connection: Connection, publication: str, known: Collection[int] = (), table: str | None = None
) -> dict[str, Fingerprint]:
    """Return the fingerprints of the published tables, or of one; leaves that are not `known` are asked whether they are empty.

    One that is locked cannot be asked, and counts as not there yet. Without any that are known nothing is asked, nor is an unlogged one.
    """
    found: dict[str, Fingerprint] = {}
    for name, kind, columns, leaves, sent, placed, altered, width, key, labels, unnamed, leaving in connection.execute(
        _PRINTS, {"publication": publication, "table": table}
    ):
        new = [leaf for leaf in leaves if known and kind == "p" and leaf[0] not in known and not leaf[-1]]
        is_empty = {oid: _is_empty(connection, oid, sql.Identifier(schema, leaf)) for oid, _, schema, leaf, *_ in new}
        files = tuple((oid, file) for oid, file, *_ in leaves if is_empty.get(oid, False) is not None)
        links = tuple((oid, link) for oid, *_, link, _ in leaves if link and is_empty.get(oid, False) is not None)
        unlogged = tuple(leaf[-1] for leaf in leaves if leaf[-1])
        empty = frozenset(oid for oid, said in is_empty.items() if said)
        prints, told = tuple(ColumnPrint(*c) for c in columns), tuple((oid, *label) for oid, *label in labels)
        rest = (links, unlogged, placed, empty, unnamed, frozenset(leaving))
        found[name] = Fingerprint(kind, prints, files, sent, altered, width, key, told, *rest)
    return found


def silent(before: Fingerprint, after: Fingerprint, logged: Collection[str] = ()) -> str:
    """Return why rows may have changed without an event between two fingerprints; empty when they did not.

    `logged`: the names of all columns that the table's rows in the log have, or had.
    """
    if unsent(before, after):
        return "it left the publication and came back, or its row filter or the publication's options changed"
    if before.key and before.key != after.key:
        return "its key was dropped or added"
    if _relabelled(before, after):
        return "a value of an enum was renamed, or a composite type has other attributes"
    return _columns(before, after, {*logged, *(column.name for column in before.columns)}) or _leaves(before, after)


def overtaken(before: Fingerprint | None, found: Fingerprint, known: Fingerprint, logged: Collection[str] = ()) -> bool:
    """Whether `known`, which has taken the place of `before` meanwhile, is newer than `found`, in which no row has changed since `before`.

    Held against `known`, what has come since `found` would have gone: a partition.
    """
    if before is None or before == known or silent(before, found, logged):
        return False
    return bool(silent(known, found, logged))


def unsent(before: Fingerprint, after: Fingerprint) -> bool:
    """Whether the stream may have been silent about the table for a while between two fingerprints."""
    pairs = [(before.sent, after.sent), (before.altered, after.altered), (before.placed, after.placed)]
    return any(was and was != now for was, now in pairs)


def outlived(before: Fingerprint, after: Fingerprint) -> bool:
    """Whether rows as they were at `before` may come after `after`, from transactions that were open between.

    What the publication sends, the labels and attributes of types, and partitions (DETACH … CONCURRENTLY, which waits for the writers only
    then) change beside whoever writes, and the stream decodes a row as the catalogue was when it was written.
    """
    leaving = after.leaving.intersection(dict(before.leaves))
    return unsent(before, after) or _relabelled(before, after) or bool(leaving)


def _relabelled(before: Fingerprint, after: Fingerprint) -> bool:
    known = {oid: (label, touched) for oid, label, touched in before.labels}
    pairs = [(known[oid], (label, touched)) for oid, label, touched in after.labels if oid in known]
    return any(was[0] != now[0] or (was[1] and was != now) for was, now in pairs)


def taken_back(shape: TableSchema, now: Fingerprint) -> str:
    """Return why rows of `shape`, which the stream shows, would be others by now; empty when they would not.

    Asked where two prints do not differ: DDL may have been taken back before anybody looked. Columns that were dropped since change no row,
    nor do those that are still to come; one that was dropped and one that came cannot be told from one with another name.
    """
    there = {column.name: column.type for column in now.columns if column.sent}
    both = {column.name: column.type for column in shape.columns if column.name in there}
    if len(both) < min(len(shape.columns), len(there)) or list(both) != [name for name in there if name in both]:
        return "columns had other names for a while"
    retyped = [name for name, type_ in both.items() if not widened(type_, there[name])]
    return f"{', '.join(retyped)} had another type for a while" if retyped else ""


def _columns(before: Fingerprint, after: Fingerprint, names: Collection[str]) -> str:
    old = {column.number: column for column in before.columns}
    new = [column for column in after.columns if column.number not in old]
    for column in after.columns:
        was = old.get(column.number)
        if was is None:
            if column.filled:
                return f"column {column.name} was added with a default"
            if column.name in names:
                return f"column {column.name} was dropped and added again"
        elif was.name != column.name:
            return f"column {was.name} was renamed to {column.name}"
        elif column.sent and not was.sent:
            return f"column {column.name} is sent now, and was not before"
        elif not widened(was.type, column.type):
            return f"the type of {column.name} changed from {was.type} to {column.type}"
    passed = after.width - before.width - len(new) if before.width else 0
    return "a column was added and dropped, and perhaps added again" if new and passed > 0 else ""


def _leaves(before: Fingerprint, after: Fingerprint) -> str:
    old, new = dict(before.leaves), dict(after.leaves)
    if before.unlogged != after.unlogged:
        return "a partition is unlogged or foreign, so that its changes are not in the WAL, or one is so no longer"
    if before.kind != "p" or after.kind != "p":
        why = "with other columns" if before.columns != after.columns else ""
        why = why or ("and may have been unlogged meanwhile" if after.unnamed else "")
        another = "rows of another table went by its name" if UNSEEN in old.values() else ""
        return another or (f"it was written anew {why}" if old != new and why else "")
    if old.keys() - new.keys():
        return "a partition was detached or dropped"
    if new.keys() - old.keys() - after.empty or UNSEEN in old.values():
        return "a partition with rows was attached"
    links = dict(before.links)
    if any(links.get(oid, link) != link for oid, link in after.links):
        return "a partition was detached and attached again"
    rewritten = any(new[leaf] != file for leaf, file in old.items())
    return "a partition was truncated or written anew" if rewritten else ""


def widened(old: str, new: str) -> bool:
    """Whether every value of type `old` is the same value, and the same text, under `new`."""
    before, after = old.partition("("), new.partition("(")
    if old == new:
        return True
    if before[0] != "character varying" or old.endswith("[]") or new.endswith("[]"):
        return False
    return new == "text" or (after[0] == before[0] and _length(after[2]) >= _length(before[2]))


def _length(text: str) -> int:
    return int(text.rstrip(")")) if text else 1 << 30


def _is_empty(connection: Connection, oid: int, name: sql.Identifier) -> bool | None:
    """Return whether a table has no rows, None while it is locked; of one that may not be read, whether it has no pages.

    One whose rows are mostly dead may take longer than a statement may: it counts as not empty.
    """
    for query in (sql.SQL("SELECT NOT EXISTS (SELECT FROM {})").format(name), sql.SQL(_NO_PAGES).format(oid)):
        try:
            with connection.transaction():
                row = connection.execute(query).fetchone()
        except errors.LockNotAvailable:
            return None
        except errors.QueryCanceled:
            return False
        except errors.InsufficientPrivilege:
            continue  # rows are read through the root: nobody has to let us read a new partition
        return row is not None and bool(row[0])
    return False


_NO_PAGES = "SELECT pg_relation_size(oid) = 0 FROM pg_class WHERE oid = {} AND relkind = 'r'"

_PRINTS = f"""
WITH RECURSIVE {published("p.pubname = %(publication)s")}, filled(root, name) AS (
  SELECT x.root, a.attname FROM leaf x JOIN pg_attribute a ON a.attrelid = x.oid WHERE a.atthasmissing AND NOT a.attisdropped
), type(oid, below) AS (
  SELECT atttypid, atttypid FROM pg_attribute WHERE atttypid >= 16384 AND attnum > 0 AND NOT attisdropped
  UNION
  SELECT y.oid, m.type FROM type y CROSS JOIN LATERAL (
    SELECT CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE t.typelem END AS type
    FROM pg_type t WHERE t.oid = y.below AND (t.typtype = 'd' OR t.typcategory = 'A')
    UNION ALL SELECT rngsubtype FROM pg_range WHERE rngtypid = y.below
    UNION ALL SELECT rngtypid FROM pg_range WHERE rngmultitypid = y.below
    UNION ALL SELECT a.atttypid FROM pg_type t JOIN pg_attribute a ON a.attrelid = t.typrelid
    WHERE t.oid = y.below AND t.typtype = 'c' AND a.attnum > 0 AND NOT a.attisdropped
  ) m WHERE m.type >= 16384
), link(oid, told) AS (
  SELECT a.oid, string_agg(i.xmin::text, ' ' ORDER BY i.inhrelid)
  FROM (SELECT oid, oid AS at FROM above UNION SELECT oid, ancestor FROM above) a JOIN pg_inherits i ON i.inhrelid = a.at GROUP BY a.oid
)
SELECT n.nspname || '.' || c.relname, c.relkind::text,
       (SELECT coalesce(json_agg(json_build_array(a.attnum, a.attname, format_type(a.atttypid, a.atttypmod),
                                                  a.attgenerated = 'v' OR (c.oid, a.attname) IN (SELECT root, name FROM filled),
                                                  a.xmin::text, coalesce(a.attnum = ANY(own.prattrs), a.attgenerated = ''
                                                    OR a.attgenerated = of.generated, false)) ORDER BY a.attnum), '[]')
        FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
       coalesce(leaves.told, '[]'),
       concat_ws(' ', published.pub,
         (SELECT string_agg(r.oid::text, ' ' ORDER BY r.oid) FROM pg_publication_rel r WHERE r.prpubid = published.pub
          AND r.prrelid IN (SELECT c.oid UNION ALL SELECT a.ancestor FROM above a WHERE a.oid = c.oid)),
         (SELECT s.oid::text FROM pg_publication_namespace s WHERE s.pnpubid = published.pub AND s.pnnspid = c.relnamespace)),
       coalesce((SELECT d.xmin::text FROM pg_publication_namespace s JOIN pg_depend d
                   ON (d.classid, d.objid, d.objsubid, d.refclassid) = ('pg_class'::regclass, c.oid, 0, 'pg_namespace'::regclass)
                 WHERE s.pnpubid = published.pub AND s.pnnspid = c.relnamespace AND NOT EXISTS (
                   SELECT FROM pg_publication_rel r WHERE r.prpubid = published.pub AND r.prrelid = c.oid)), ''),
       of.altered,
       c.relnatts,
       coalesce((SELECT coalesce(k.oid, i.indexrelid)::text
                 FROM pg_index i LEFT JOIN pg_constraint k ON k.conrelid = c.oid AND k.conindid = i.indexrelid AND k.contype IN ('p', 'u')
                 WHERE i.indrelid = c.oid AND i.indimmediate AND i.indisvalid
                 AND CASE WHEN c.relkind = 'r' AND c.relreplident = 'i' THEN i.indisreplident ELSE i.indisprimary END), '{NO_KEY}'),
       coalesce(labels.told, '[]'),
       own.oid IS NULL,
       ARRAY(SELECT inhrelid::bigint FROM pg_inherits WHERE inhdetachpending
             UNION SELECT a.oid::bigint FROM above a JOIN pg_inherits i ON i.inhrelid = a.ancestor WHERE i.inhdetachpending)
FROM published JOIN pg_class c ON c.oid = published.oid JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN (SELECT oid, xmin::text AS altered, nullif(to_jsonb(p) ->> 'pubgencols', 'n') AS generated FROM pg_publication p OFFSET 0) of
  ON of.oid = published.pub
LEFT JOIN pg_publication_rel own ON own.prpubid = published.pub AND own.prrelid = c.oid
LEFT JOIN (
  SELECT x.root, json_agg(json_build_array(l.oid::bigint, l.relfilenode::bigint, ln.nspname, l.relname, coalesce(link.told, ''),
                                                    {UNLOGGED.format("l")}) ORDER BY l.oid) AS told
  FROM leaf x JOIN pg_class l ON l.oid = x.oid JOIN pg_namespace ln ON ln.oid = l.relnamespace LEFT JOIN link ON link.oid = l.oid
  GROUP BY x.root
) leaves ON leaves.root = c.oid
LEFT JOIN (
  SELECT a.attrelid, jsonb_agg(DISTINCT jsonb_build_array(s.oid::bigint, s.label, s.touched)) AS told
  FROM type y JOIN pg_attribute a ON a.atttypid = y.oid AND a.attnum > 0 AND NOT a.attisdropped
  CROSS JOIN LATERAL (
    SELECT l.oid, l.enumlabel::text AS label, l.xmin::text AS touched FROM pg_enum l WHERE l.enumtypid = y.below
    UNION ALL SELECT t.oid, (SELECT coalesce(string_agg(p.attnum::text, ' ' ORDER BY p.attnum), '') FROM pg_attribute p
                             WHERE p.attrelid = t.typrelid AND p.attnum > 0 AND NOT p.attisdropped), k.relnatts::text
    FROM pg_type t JOIN pg_class k ON k.oid = t.typrelid WHERE t.oid = y.below AND t.typtype = 'c'
  ) s GROUP BY a.attrelid
) labels ON labels.attrelid = c.oid
WHERE strpos(n.nspname, '.') = 0 AND (%(table)s::text IS NULL OR %(table)s::text = n.nspname || '.' || c.relname)
"""
