"""A log in memory: rows are put and deleted, cuts are made, and batches come out of it as a reader would hand them out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from headrace import codec
from headrace.change import (
    CREATE,
    DELETE,
    NOWHERE,
    UPDATE,
    Change,
    Checkpoint,
    Column,
    Position,
    Row,
    Source,
    TableSchema,
    Version,
)
from headrace.consumer import Batch

_SOURCE = Source("7512", 1, "conformance", "headrace", "headrace")
_WAL_A_CUT = 100


def shape(table: str, *, key: Sequence[str] = ("id",), **columns: str) -> TableSchema:
    """Return the first version of a table's schema: its columns with Postgres's names of their types."""
    return TableSchema(table, 1, tuple(Column(name, kind) for name, kind in columns.items()), tuple(key))


class History:
    """The changes of some tables, each with one partition, as capture would have written them.

    Attributes:
        rows: What the tables hold now: for each table, by key, the row.
    """

    def __init__(self, schemas: Iterable[TableSchema]) -> None:
        """Begin with empty tables of these shapes."""
        self.rows: dict[str, dict[bytes, Row]] = {}
        self._schemas: dict[tuple[str, int], TableSchema] = {}
        self._shapes: dict[str, TableSchema] = {}
        self._topics: dict[str, list[Change]] = {}
        self._cuts: list[dict[str, list[int]]] = []
        self._began = int(time.time() * 1000)
        for schema in schemas:
            self.alter(schema)

    def alter(self, schema: TableSchema) -> None:
        """Begin a table, or go on with it in another shape: a column more or less (S13)."""
        self._schemas[schema.table, schema.version] = self._shapes[schema.table] = schema
        self._topics.setdefault(schema.table, [])
        self.rows.setdefault(schema.table, {})

    def put(self, table: str, row: Mapping[str, Any]) -> None:
        """Insert a row, or update the one that has its key; columns that are not named are NULL."""
        whole = {column.name: row.get(column.name) for column in self._shapes[table].columns}
        key = self.key(table, whole)
        self._append(table, UPDATE if key in self.rows[table] else CREATE, key, whole)
        self.rows[table][key] = whole

    def delete(self, table: str, row: Mapping[str, Any]) -> None:
        """Delete the row that has the key of `row`, whether there is one or not: a compacted log may show only that."""
        key = self.key(table, row)
        self._append(table, DELETE, key, None)
        self.rows[table].pop(key, None)

    def cut(self) -> None:
        """End the transaction: all so far is a state that Postgres had."""
        self._cuts.append({table: [len(changes)] for table, changes in self._topics.items()})

    def at_once(self) -> History:
        """Return a history of one cut that leads to the same rows."""
        fresh = History(self._schemas.values())
        for table, changes in self._topics.items():
            newest = {change.key: change for change in changes if change.key in self.rows[table]}
            for change in newest.values():  # a row stays as it was written, whatever columns came since
                fresh.rows[table][change.key] = self.rows[table][change.key]
                fresh._append(table, CREATE, change.key, change.row, change.schema)
        fresh.cut()
        return fresh

    def key(self, table: str, row: Mapping[str, Any]) -> bytes:
        """Return a row's key as the log has it."""
        return codec.encode_key({name: row[name] for name in self._shapes[table].key})

    @property
    def version(self) -> Version:
        """The version of the newest cut."""
        return Version(1, _WAL_A_CUT * len(self._cuts)) if self._cuts else NOWHERE

    def batches(self, position: Position | None, piece: int | None = None) -> Iterator[Batch]:
        """Yield all that is after `position`, to the newest cut; where `piece` is given, in pieces of so many records of a table.

        From zero only the last change of each key in a piece is there, as in a compacted log, and only the last piece completes a
        state. After that each cut is one: what a live reader is given. What comes in pieces is ended by a batch without changes, as a
        reader does that has all changes before it knows that a state is complete.
        """
        now = position or Position(appended=self._began)
        if now.loading:
            yield from self._pieces(now, len(self._cuts), piece)
            return
        for number in range(now.version.lsn // _WAL_A_CUT, len(self._cuts)):
            for batch in self._pieces(now, number + 1, piece):
                now = batch.position
                yield batch

    def _pieces(self, now: Position, cut: int, piece: int | None) -> Iterator[Batch]:
        """Yield what leads from `now` to a cut."""
        ends, version = self._cuts[cut - 1], Version(1, _WAL_A_CUT * cut)
        checkpoint = Checkpoint(version, self._began, 0, {_topic(table): end for table, end in ends.items()}, _SOURCE)
        loading = now.loading
        while True:
            offsets = {table: (now.offsets.get(_topic(table)) or [0])[0] for table in ends}
            upto = {table: min(offsets[table] + (piece or end), end) for table, (end,) in ends.items()}
            whole = upto == (offsets if piece else {table: end for table, (end,) in ends.items()})
            now = Position(
                {_topic(table): [at] for table, at in upto.items()},
                {_topic(table): f"id-{table}" for table in upto},
                version if whole else now.version,
                _SOURCE,
                self._began,
            )
            changes = [change for table, at in upto.items() for change in self._topics[table][offsets[table] : at]]
            changes.sort(key=lambda change: (change.version, change.ordinal))
            if loading:
                changes = list({(change.table, change.key): change for change in changes}.values())
            yield Batch(changes, replace(now), checkpoint if whole else None, loading, dict(self._schemas))
            if whole:
                return

    def _append(self, table: str, op: str, key: bytes, row: Row | None, schema: int = 0) -> None:
        topic = self._topics[table]
        version = Version(1, _WAL_A_CUT * len(self._cuts) + _WAL_A_CUT // 2)
        ordinal = 1 + sum(map(len, self._topics.values()))
        topic.append(
            Change(table, op, key, row, version, ordinal, 1, schema or self._shapes[table].version, 0, len(topic))
        )


def _topic(table: str) -> str:
    return f"conformance.{table}"
