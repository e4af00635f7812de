"""The warehouse: every captured table, typed, in DuckDB, and SQL over it by HTTP.

Everything about keeping tables is in `headrace.stores.duckdb`; DuckDB admits one process to a file, so the process
that keeps it also answers for it.
"""

from __future__ import annotations

from headrace.change import Position
from headrace.consumer import Generation
from headrace.stores.duckdb import DuckDBStore
from headrace_warehouse.endpoint import serve

__all__ = ["Warehouse"]


class Warehouse(DuckDBStore):
    """Keeps the tables of all captured tables, and answers SQL on the live generation at `warehouse_listen`."""

    def open(self, generation: Generation) -> Position | None:
        """Open the generation; the first one of the process starts the endpoint."""
        position = super().open(generation)
        serve(self.settings)
        return position
