"""By which operators values of a type are compared: those of its own default order, wherever they are."""

from __future__ import annotations

from collections.abc import Sequence

from headrace_capture.connection import Connection


def operators(connection: Connection, types: Sequence[str]) -> list[dict[str, tuple[str, str]]]:
    """Return (schema, name) of what is =, >= and > in each type's own default order.

    Our search_path has none of an extension's, or those of text, and not all have these names: hstore's are ``#>=#`` and ``#>#``.
    """
    return [dict(zip(_SIGNS, found, strict=True)) for (found,) in connection.execute(_OPERATORS, [list(types)])]


_SIGNS = ("=", ">=", ">")
# A type without an order of its own (an enum, an array) has that of its kind, built in; '???' is one that is gone.
_OPERATORS = """
SELECT array_agg(ARRAY[coalesce(n.nspname::text, 'pg_catalog'), coalesce(o.oprname::text, s.sign)] ORDER BY s.strategy)
FROM unnest(%s::text[]) WITH ORDINALITY u(type, place) CROSS JOIN (VALUES (3, '='), (4, '>='), (5, '>')) s(strategy, sign)
LEFT JOIN pg_opclass c ON c.opcmethod = (SELECT oid FROM pg_am WHERE amname = 'btree') AND c.opcdefault
                      AND c.opcintype = to_regtype(nullif(type, '???'))
LEFT JOIN pg_amop a ON a.amopfamily = c.opcfamily AND a.amopstrategy = s.strategy
                   AND (a.amoplefttype, a.amoprighttype) = (c.opcintype, c.opcintype)
LEFT JOIN pg_operator o ON o.oid = a.amopopr LEFT JOIN pg_namespace n ON n.oid = o.oprnamespace GROUP BY u.place ORDER BY u.place
"""
