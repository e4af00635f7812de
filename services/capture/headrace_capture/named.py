"""Which tables people name, and why a name is none."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from headrace.errors import Misconfigured
from headrace_capture.catalog import Connection, Table, all_tables


def named_tables(
    connection: Connection, names: Iterable[str], present: Iterable[Table] = (), before: Collection[str] = ()
) -> tuple[list[Table], dict[str, str]]:
    """Return the tables of these names (``schema.name``; without a schema, ``public``), and of which names there is none any more, and why.

    What no table is called may be several names, by commas. What is `present` in the publication is there, also as a partition.
    What was there `before` may be gone.

    Raises:
        Misconfigured: `no-such-table`.
    """
    known = {table.full_name: table for table in [*all_tables(connection), *present]}
    there = {*known, *before}
    wanted = dict.fromkeys(name for given in names for name in _split(given, there))
    gone = {name: _hint(connection, name) for name in wanted if name not in known}
    for name, hint in gone.items():
        if name not in before:
            raise Misconfigured("no-such-table", f"There is no permanent table {name} ({hint}).", _LIST)
    return [known[name] for name in wanted if name in known], gone


def _split(given: str, there: Collection[str]) -> list[str]:
    whole = _full(given)
    return [whole] if whole in there else [_full(name.strip()) for name in given.split(",")]


def _full(name: str) -> str:
    return name if "." in name else f"public.{name}"


def _hint(connection: Connection, name: str) -> str:
    schema, _, table = name.partition(".")
    row = connection.execute(_WHAT_IS, [schema, table]).fetchone()
    if row is None:
        return "nothing has that name"
    return f"it is a partition of {row[1]}: name that" if row[1] else f"it is {row[0]}"


_LIST = "`headrace setup` without --table lists what there is."

_WHAT_IS = """
SELECT CASE c.relkind WHEN 'v' THEN 'a view' WHEN 'm' THEN 'a materialized view' WHEN 'f' THEN 'a foreign table'
       ELSE 'temporary, unlogged or of the system' END,
       CASE WHEN c.relispartition THEN pg_partition_root(c.oid)::regclass::text END
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s
"""
