"""The store of a warehouse: every captured table as a typed table in one DuckDB file.

Strategy
    One file holds everything of a view, so that data and position are one transaction: a schema for each generation
    (`g1`, `g2`, …), the schema `headrace` with the generations, the pointer to the live one, the positions and the
    mapping of tables and columns, and the views that readers use. A position is updated by compare-and-set (S21).

    *What readers see.* A view for each table of the live generation, in a schema of the Postgres schema's name
    (`sales.orders`), and for `public` also by its plain name: `SELECT count(*) FROM products`. The views are made
    again in the transaction that promotes, so a reader sees the old generation or the new one, whole. They leave out
    the three columns that headrace keeps with each row: `_headrace_key` (the log's key), `_headrace_version` (the
    row's commit LSN) and `_headrace_exact`, below. Names that differ only in case get a number (`Users`, `users_2`),
    as DuckDB does not tell them apart; a Postgres schema with a name that is taken here (`main`, `headrace`, `g1`,
    the file's own name) gets an underscore.

    *Exact states only.* A generation that has never shown a state is its own staging area: nobody can see its tables,
    so changes go straight into them. Once it has, a batch that ends at a complete, exact checkpoint is applied in one
    transaction, and every other batch (half of a big transaction, part of a backlog) is kept in the table `_staged`,
    durable with its position, and merged in the transaction of the next such checkpoint.

    *Types.* `kinds` maps Postgres's types. What the DuckDB type cannot hold (a date before Christ, NaN in a
    numeric(p,s), an array with more than one dimension) or prints otherwise is kept beside it in `_headrace_exact`,
    as JSON of column to [value as in the log, how the column printed it then]; readers see NULL where the type has no
    such value, `scan` gives what the log had. A column that somebody changed behind our back no longer prints the
    same, and then `scan` shows the change.

    *Schemas.* A table appears with its first schema, a column with the first record that has it: NULL in the rows
    before. A dropped column is dropped with its values, a renamed one is a dropped and a new one. A changed type
    converts what can be converted and leaves NULL for the rest; Postgres rewrote these rows without telling (S12), so
    they are right when they were read again. A record of an older schema than the table's is applied without the
    columns that are gone.

    *A file that cannot be read* is set aside as `<file>.broken`, and a new one is loaded from zero [I6]: only where DuckDB says that it
    is damaged. What keeps it from being opened for a while leaves it whole.
"""

from headrace.stores.duckdb.database import Database
from headrace.stores.duckdb.query import Result, query, shown
from headrace.stores.duckdb.store import DuckDBStore

__all__ = ["Database", "DuckDBStore", "Result", "query", "shown"]
