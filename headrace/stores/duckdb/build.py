"""One generation within a transaction: its tables, its staging, its views."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import duckdb
import pyarrow as pa

from headrace.change import UNKNOWN_SCHEMA, Change, TableSchema
from headrace.errors import Poison
from headrace.shapes import check_key, grown, types_of
from headrace.stores.duckdb import catalogue, tables
from headrace.stores.duckdb.database import first
from headrace.stores.duckdb.tables import Record, Table

log = logging.getLogger(__name__)


class Build:
    """What is kept in memory of a generation; made anew after a transaction that failed.

    Attributes:
        tables: Its tables by their name in the source.
        version: The state that it shows, NOWHERE while it is loading.
        staged: How many changes wait in staging.
    """

    def __init__(self, cursor: duckdb.DuckDBPyConnection, number: int, *, grows: bool) -> None:
        """Read it from the file. Where its tables only `grows`, any row may be of an older shape than those before it (S28)."""
        self._cursor = cursor
        self._number = number
        self._grows = grows
        self._staging = f"g{number:d}._staged"
        self.version = catalogue.version_of(cursor, number)
        self.tables: dict[str, Table] = catalogue.tables(cursor, number)
        self._kept = catalogue.schemas(cursor, number)
        self._schemas = dict(self._kept)
        counted = first(cursor, f"SELECT count(*) FROM {self._staging}")
        self.staged: int = counted[0] if counted else 0

    @staticmethod
    def make(cursor: duckdb.DuckDBPyConnection, number: int, fingerprint: str) -> None:
        """Make an empty generation."""
        catalogue.make(cursor, number, fingerprint)
        cursor.execute(
            f"CREATE TABLE g{number:d}._staged "
            "(n BIGINT, source VARCHAR, key VARCHAR, version BIGINT, schema INTEGER, body VARCHAR)"
        )

    def learn(self, schemas: dict[tuple[str, int], TableSchema]) -> None:
        """Take note of table schemas. Raises Misconfigured: `key-changed`."""
        # But of a feed a version stays as it is (S13).
        for name in sorted(schemas if self._grows else schemas.keys() - self._schemas.keys()):
            if (new := schemas[name]) == (before := self._schemas.get(name)):
                continue
            table = self.tables.get(name[0])
            if table is not None and self._grows:
                check_key(name[0], tables.key_columns(self._cursor, table), new.key)
            elif table is not None and tables.is_old(table, new):
                log.warning("%s: columns of domains are text until a rebuild: run headrace rebuild NAME", name[0])
            # Of a feed two readers may have taken one second for the version of two shapes.
            self._schemas[name] = grown(types_of(before), new) if before and self._grows else new

    def apply(self, changes: Iterable[Change]) -> None:
        """Apply changes to the tables, and make the tables that are known but not there yet."""
        records: dict[str, dict[str, Record]] = {}
        for change in changes:
            record = Record(change.key.decode(), change.version.packed(), change.schema, change.row)
            records.setdefault(change.table, {})[record.key] = record
        for source, changed in records.items():
            newest = max(changed.values(), key=lambda record: record.schema)
            if self._has_nothing(source, newest.schema):
                continue
            table = self._shape(source, newest.schema, newest.key)
            schema = self._schemas.get((source, newest.schema))
            tables.write(self._cursor, table, schema.key if schema else (), list(changed.values()))
        for source, version in sorted(self._schemas, reverse=True):
            if source not in self.tables:
                self._shape(source, version)

    def stage(self, changes: Sequence[Change]) -> None:
        """Keep changes for later, with the schemas that they name."""
        named = {(change.table, change.schema): change.key.decode() for change in changes}
        shapes = {name: self._schema(*name, key) for name, key in sorted(named.items()) if name[1] != UNKNOWN_SCHEMA}
        new = {name: shape for name, shape in shapes.items() if shape != self._kept.get(name)}
        catalogue.keep_schemas(self._cursor, self._number, list(new.values()))
        self._kept |= new
        if changes:
            staged = _staged(changes, self.staged)
            with tables.registered(self._cursor, staged) as raw:
                self._cursor.execute(f"INSERT INTO {self._staging} SELECT * FROM {raw}")
        self.staged += len(changes)

    def merge(self, progress: Callable[[int, int], None]) -> None:
        """Apply what is staged, table by table, and empty the staging."""
        found = self._cursor.execute(
            f"SELECT source, list_sort(list(DISTINCT schema)), count(*) FROM {self._staging} GROUP BY source ORDER BY source"
        ).fetchall()
        done = 0
        for source, versions, count in found:
            progress(done, self.staged)
            for version in versions if self._grows else versions[-1:]:
                if not self._has_nothing(source, version):
                    self._shape(source, version)
            if source in self.tables:
                tables.merge(self._cursor, self.tables[source], self._staging)
            done += count
        self._cursor.execute(f"DELETE FROM {self._staging}")
        self.staged = 0

    def show(self) -> None:
        """Let readers see these tables and no others."""
        wanted = {_folded(view) for table in self.tables.values() for view in tables.show(self._cursor, table)}
        found = self._cursor.execute(
            "SELECT schema_name, view_name FROM duckdb_views() WHERE NOT internal AND database_name = current_database()"
        ).fetchall()
        for view in found:
            if _folded(view) not in wanted:
                tables.hide(self._cursor, view)

    def _has_nothing(self, source: str, newest: int) -> bool:
        """Whether there is nothing to do: these are deletes before the first row of a table (S28)."""
        return newest == UNKNOWN_SCHEMA and source not in self.tables

    def _shape(self, source: str, version: int, key: str = "") -> Table:
        """Return a table in the shape of its newest schema so far; `key` is of the row that is in this version."""
        table = self.tables.get(source)
        if table is not None and (version == UNKNOWN_SCHEMA or (table.version >= version and not self._grows)):
            return table
        schema = self._schema(source, version, key)
        if table is not None and self._grows:
            known = {mapped.column: mapped.postgres for mapped in table.columns}
            schema = grown(known, schema)
            if types_of(schema) == known:
                return table
        if table is None:
            table = tables.create(self._cursor, f"g{self._number:d}", schema, list(self.tables.values()))
            if source != (called := ".".join(table.reader)):
                log.warning("%s is called %s here: its own name is taken, perhaps but for case", source, called)
        else:
            table = tables.evolve(self._cursor, table, schema)
        self.tables[source] = table
        catalogue.remember(self._cursor, self._number, table)
        if catalogue.live(self._cursor) == self._number:
            tables.show(self._cursor, table)
        return table

    def _schema(self, source: str, version: int, key: str = "") -> TableSchema:
        found = self._schemas.get((source, version))
        if found is None:
            raise Poison(
                "unknown-schema",
                f"A record of {source} names version {version} of its schema, which the log does not have.",
                "Run: headrace rebuild NAME",
                cursor=(source, key) if key else None,
            )
        return found


def _folded(view: tuple[str, str]) -> tuple[str, str]:
    return view[0].casefold(), view[1].casefold()


def _staged(changes: Sequence[Change], start: int) -> pa.Table:
    columns = {
        "n": pa.array(range(start, start + len(changes)), pa.int64()),
        "source": pa.array([change.table for change in changes], pa.string()),
        "key": pa.array([change.key.decode() for change in changes], pa.string()),
        "version": pa.array([change.version.packed() for change in changes], pa.int64()),
        "schema": pa.array([change.schema for change in changes], pa.int32()),
        "body": tables.fragments([change.row for change in changes]),
    }
    return pa.table(columns)
