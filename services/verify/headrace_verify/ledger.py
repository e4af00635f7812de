"""What a view should hold, on disk: memory stays small whatever the size of the view [I10].

One temporary SQLite file a view. Expected rows are struck off as the scan of the view brings them; what differs is kept with
what was expected, until it is decided.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from headrace import codec
from headrace.change import Row
from headrace.errors import Misconfigured

MISSING, EXTRA, DIFFERENT = KINDS = ("missing", "extra", "different")


class Difference(NamedTuple):
    """One row that is not as expected. `columns` names what differs, empty for a missing or an extra row."""

    kind: str
    collection: str
    key: str
    columns: tuple[str, ...] = ()


class Expected(NamedTuple):
    """One row that readers of the view should see. `value` None: they should see none."""

    collection: str
    key: str
    root: tuple[str, str]
    """(table, log's key) of the row, or of the document's root row."""
    value: Row | None


Touched = tuple[str, str, tuple[str, str]]
"""(collection, key, root) of a view's row."""


class Member(NamedTuple):
    """A joined row, by table and log's key, in a document, by collection and key."""

    table: str
    row: str
    collection: str
    key: str


class Excused(NamedTuple):
    """A row that is to be compared again: its root as (table, log's key), and the bytes that are expected of it."""

    collection: str
    key: str
    root: tuple[str, str]
    size: int


class Ledger:
    """The expected rows of one view, and the rows of other tables that its documents hold."""

    def __init__(self) -> None:
        """Make a file without a name: nothing is left of it after a kill."""
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.executescript(_SCHEMA)
        self._db.execute("BEGIN")  # never committed: nobody else reads it

    def close(self) -> None:
        """Remove it."""
        self._db.close()

    def add(self, rows: Iterable[Expected], members: Iterable[Member]) -> None:
        """Expect rows, and know which joined rows are in them, or were or will be.

        Raises:
            Misconfigured: `document-ids`, for a row that is expected of another root too.
        """
        rows = list(rows)
        packed = ((row.collection, row.key, *row.root, _packed(row.value)) for row in rows)
        if rows and self._db.executemany(_EXPECT, packed).rowcount < len(rows):
            raise self._doubled(rows)
        self._db.executemany("INSERT OR IGNORE INTO members VALUES (?, ?, ?, ?)", members)

    def _doubled(self, rows: Iterable[Expected]) -> Misconfigured:
        """Return what is wrong with the first of `rows` that is expected of another root."""
        query = "SELECT tbl, root FROM expected WHERE collection = ? AND key = ?"
        known = ((row, self._db.execute(query, (row.collection, row.key)).fetchone()) for row in rows)
        key, *roots = next((row.key, other, row.root) for row, other in known if other not in {None, row.root})
        said = " and ".join(" ".join(root) for root in roots)
        return Misconfigured(
            "document-ids",
            f"Two roots have one document, {key}: {said}. Either overwrites it, and whichever goes first takes it away.",
            "Ids must be unique: let id(table, key) give each root its own, then run: headrace rebuild NAME",
        )

    def count(self) -> int:
        """Return how many rows are expected."""
        row = self._db.execute("SELECT count(*) FROM expected WHERE value IS NOT NULL").fetchone()
        return int(row[0])

    def strike(self, collection: str, key: str) -> Row | None:
        """Strike an expected row off and return it; None when none is expected, or it has come before."""
        query = "UPDATE expected SET seen = seen + 1 WHERE collection = ? AND key = ? RETURNING value, seen"
        found = self._db.execute(query, (collection, key)).fetchall()
        value: Row | None = codec.loads(found[0][0]) if found and found[0][0] and found[0][1] == 1 else None
        return value

    def again(self, collection: str, key: str) -> bool:
        """Return whether a row that was struck, or noted, had come before: a scan has no key twice."""
        query = (
            "SELECT EXISTS (SELECT 1 FROM expected WHERE collection = ?1 AND key = ?2 AND seen > 1) "
            "OR EXISTS (SELECT 1 FROM differences WHERE collection = ?1 AND key = ?2)"
        )
        return bool(self._db.execute(query, (collection, key)).fetchone()[0])

    def left(self) -> Iterator[Difference]:
        """Yield what was expected and did not come."""
        query = "SELECT collection, key FROM expected WHERE seen = 0 AND value IS NOT NULL ORDER BY 1, 2"
        for collection, key in self._db.execute(query):
            yield Difference(MISSING, collection, key)

    def note(self, difference: Difference, *, sure: bool = False) -> None:
        """Keep a difference; nothing excuses one that is `sure`."""
        self._db.execute(
            "INSERT OR REPLACE INTO differences VALUES (?, ?, ?, ?, 0, NULL, NULL, ?)",
            (difference.kind, difference.collection, difference.key, codec.dumps(difference.columns), sure),
        )

    def excuse(self, collection: str, key: str, root: tuple[str, str]) -> None:
        """Say that a difference may be a change that the snapshot does not see; the row's root is known by it."""
        self._db.execute(
            "UPDATE differences SET excused = 1, tbl = ?, root = ? WHERE collection = ? AND key = ? AND NOT sure",
            (*root, collection, key),
        )

    def excuse_all(self) -> None:
        """Say that any difference may be such a change: for a ledger whose rows are compared again anyway."""
        self._db.execute("UPDATE differences SET excused = 1 WHERE NOT sure")

    def settle(self, collection: str, key: str, difference: Difference | None) -> None:
        """Decide an excused row: it differs, or it does not."""
        self._db.execute("DELETE FROM differences WHERE collection = ? AND key = ?", (collection, key))
        if difference is not None:
            self.note(difference)

    def members(self) -> Iterator[Member]:
        """Yield which joined rows are in which documents."""
        yield from map(Member._make, self._db.execute("SELECT tbl, key, collection, doc FROM members"))

    def holders(self, table: str, key: str) -> list[Touched]:
        """Return the documents that hold a joined row."""
        rows = self._db.execute(
            "SELECT e.collection, e.key, e.tbl, e.root FROM members m JOIN expected e ON e.collection = m.collection "
            "AND e.key = m.doc WHERE m.tbl = ? AND m.key = ?",
            (table, key),
        )
        return [(collection, doc, (tbl, root)) for collection, doc, tbl, root in rows]

    def differences(self, *, excused: bool | None = None) -> Iterator[Difference]:
        """Yield what differs: what is excused for now, what nothing excuses, or both when None."""
        query = (
            "SELECT kind, collection, key, columns FROM differences WHERE excused = coalesce(?, excused) ORDER BY 2, 3"
        )
        for kind, collection, key, columns in self._db.execute(query, (excused,)):
            yield Difference(kind, collection, key, tuple(codec.loads(columns)))

    def counts(self) -> dict[str, int]:
        """Return how many rows are wrong in each way, and how many are undecided."""
        query = "SELECT CASE WHEN excused THEN 'undecided' ELSE kind END, count(*) FROM differences GROUP BY 1"
        return dict.fromkeys((*KINDS, "undecided"), 0) | dict(self._db.execute(query))

    def excused(self) -> list[Excused]:
        """Return what is excused for now."""
        query = (
            "SELECT collection, key, d.tbl, d.root, coalesce(length(value), 0) FROM differences d "
            "LEFT JOIN expected e USING (collection, key) WHERE excused = 1 ORDER BY 1, 2"
        )
        found = self._db.execute(query)
        return [Excused(collection, key, (table, root), size) for collection, key, table, root, size in found]


def _packed(value: Row | None) -> Any:
    return codec.dumps(value) if value is not None else None


_EXPECT = """
INSERT INTO expected VALUES (?, ?, ?, ?, ?, 0) ON CONFLICT DO UPDATE SET value = excluded.value
WHERE (tbl, root) = (excluded.tbl, excluded.root)
"""
_SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE expected (collection TEXT, key TEXT, tbl TEXT, root TEXT, value BLOB, seen INT, PRIMARY KEY (collection, key))
  WITHOUT ROWID;
CREATE TABLE members (tbl TEXT, key TEXT, collection TEXT, doc TEXT, PRIMARY KEY (tbl, key, collection, doc)) WITHOUT ROWID;
CREATE TABLE differences (kind TEXT, collection TEXT, key TEXT, columns TEXT, excused INT, tbl TEXT, root TEXT, sure INT,
                          PRIMARY KEY (collection, key));
"""
