"""`DuckDBStore`: the contract of a consumer over one DuckDB file. The package's docstring tells the strategy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from headrace.change import NOWHERE, Position
from headrace.consumer import ALL, Batch, Cursor, Generation, ViewRow, no_progress
from headrace.errors import HeadraceError, Misconfigured
from headrace.settings import Settings
from headrace.stores.duckdb import catalogue, tables
from headrace.stores.duckdb.build import Build
from headrace.stores.duckdb.database import Database


class DuckDBStore:
    """A view that mirrors every captured table; `headrace.consumer.Consumer` says what each method promises."""

    tables: Collection[str] = ALL
    mirrors_rows = True
    progress: Callable[[int, int], None]

    def __init__(self, settings: Settings, name: str) -> None:
        """Open nothing yet. Uses the settings `warehouse` and `warehouse_memory`."""
        self.name = name
        self.settings = settings
        self.progress = no_progress
        self._database: Database | None = None
        self._build: Build | None = None

    def generations(self) -> list[Generation]:
        """Return the generations that the file holds. Raises Misconfigured: `view-of-another`."""
        if not Database.file(self.settings.warehouse).exists():
            return []
        database = Database.opened(self.settings.warehouse, self.settings.warehouse_memory)
        try:
            with database.translated(), database.cursor() as cursor, database.reading(cursor):
                if not catalogue.ready(cursor):
                    return []
                catalogue.owned(cursor, self.name)
                live = catalogue.live(cursor)
                held = catalogue.held(cursor)
        finally:
            database.release()
        return [Generation(self.name, number, fingerprint, live=number == live) for number, fingerprint in held]

    def open(self, generation: Generation) -> Position | None:
        """Open the generation, made when it is not there; an older instance of it can apply nothing from now on.

        Raises:
            Misconfigured: `view-of-another`.
        """
        self.close()
        database = Database.opened(self.settings.warehouse, self.settings.warehouse_memory)
        try:
            self._cursor = database.lend()
        except HeadraceError:
            database.release()
            raise
        self._database = database
        self._number = generation.number
        with database.writing(self._cursor):
            if not catalogue.ready(self._cursor):
                catalogue.prepare(self._cursor)
            catalogue.own(self._cursor, self.name)
            self._turn, position = catalogue.take(self._cursor, self._number) or (
                0,
                None,
            )
            if self._turn:
                self._build = self._read()
            else:
                Build.make(self._cursor, self._number, generation.fingerprint)
                self._build = self._read()
        return position

    def _keeps(self, table: str) -> bool:
        """Whether it is to have a table: a batch knows the shapes of others too."""
        return tuple(self.tables) == ALL or table in self.tables

    def apply(self, batch: Batch) -> None:
        """Apply a batch and move the position, in one transaction.

        It goes to the tables when readers may see it, or when nobody has seen this generation yet; else to staging.
        """
        with self._writing() as build:
            catalogue.move(self._cursor, self._number, self._turn, batch.position)
            build.learn({name: shape for name, shape in batch.schemas.items() if self._keeps(name[0])})
            if build.version == NOWHERE or (batch.complete and not build.staged):
                build.apply(batch.changes)
            else:
                build.stage(batch.changes)
                if batch.complete:
                    build.merge(self.progress)
                    build.apply(())
            build.version = batch.position.version

    def promote(self) -> None:
        """Make this generation the one that readers see: pointer and views in one transaction.

        Raises:
            Misconfigured: `warehouse-loading`: it has reached no state yet [I8].
        """
        with self._writing() as build:
            if build.version == NOWHERE:
                raise Misconfigured(
                    "warehouse-loading",
                    f"Generation {self._number} of {self.name} has reached no state yet.",
                    "Wait for it.",
                )
            catalogue.point(self._cursor, self._number)
            build.show()

    def drop(self) -> None:
        """Remove this generation, and the views when it is the live one."""
        with self._writing() as build:
            live = catalogue.live(self._cursor) == self._number
            catalogue.remove(self._cursor, self._number)
            build.tables = {}
            if live:
                catalogue.point(self._cursor, None)
                build.show()

    def close(self) -> None:
        """Give the file back; the last user in the process closes it."""
        if self._database is not None:
            self._database.take_back(self._cursor)
            self._database.release()
            self._database = self._build = None

    def scan(self, after: Cursor | None, limit: int) -> Sequence[ViewRow]:
        """Return rows of this generation in (table, key) order, in the log's form; nothing before its first state."""
        rows: list[ViewRow] = []
        first, key = after or ("", None)
        with self._reading() as build:
            known = build.tables if build.version != NOWHERE else {}
            for source in sorted(known):
                if source >= first and len(rows) < limit:
                    rows += tables.read(
                        self._cursor,
                        known[source],
                        key if source == first else None,
                        limit - len(rows),
                    )
        return rows

    def get(self, keys: Sequence[Cursor]) -> Sequence[ViewRow]:
        """Return some rows of this generation, each named as (table, key), in the log's form: one query a table."""
        wanted: dict[str, list[str]] = {}
        for source, key in keys:
            wanted.setdefault(source, []).append(key)
        with self._reading() as build:
            known = build.tables if build.version != NOWHERE else {}
            found = [
                tables.pick(self._cursor, known[source], named) for source, named in wanted.items() if source in known
            ]
        return [row for rows in found for row in rows]

    def count(self) -> dict[str, int]:
        """Return how many rows each table of this generation has; nothing before its first state."""
        with self._reading() as build:
            known = build.tables if build.version != NOWHERE else {}
            return {source: tables.count(self._cursor, table) for source, table in known.items()}

    def _read(self) -> Build:
        return Build(self._cursor, self._number, grows=self.settings.feed == "debezium")

    @contextmanager
    def _writing(self) -> Iterator[Build]:
        with self._opened().writing(self._cursor):
            build, self._build = self._build or self._read(), None
            yield build
        self._build = build  # not after an error: then it is read again

    @contextmanager
    def _reading(self) -> Iterator[Build]:
        with self._opened().looking(self._cursor):
            self._build = self._build or self._read()
            yield self._build

    def _opened(self) -> Database:
        if self._database is None:
            raise Misconfigured(
                "warehouse-closed",
                f"{self.name} was used before it was opened.",
                "Call open first.",
            )
        return self._database
