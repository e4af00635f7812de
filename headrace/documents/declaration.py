"""What a document is made of: a root row, and rows of other tables joined to it.

    Document("public.products",
             category=One("public.categories", on="category_id"),
             reviews=Many("public.reviews", by="product_id"))

A declaration is data. `headrace.documents.consumer` reads it to find the documents that a change touches; verify reads
it to join the same rows in SQL. Both hand the rows to `Document.node`, so that `render` cannot tell which of them
called.

Joins compare values in the codec's form, so the columns on both sides must be of the same type. One level only: what a
joined row is joined to is not part of the document.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

from headrace import codec
from headrace.change import Row
from headrace.errors import Misconfigured


class _Join:
    """What `One` and `Many` share: a table and the columns that refer."""

    def __init__(self, table: str, columns: str | Sequence[str], nested: Mapping[str, Any]) -> None:
        self.table: Final = table
        self.columns: Final = (columns,) if isinstance(columns, str) else tuple(columns)
        if nested:
            raise Misconfigured(
                "document-nested",
                f"{type(self).__name__}({table!r}) has joins of its own, {', '.join(sorted(nested))}: "
                "documents join one level deep.",
                "Join these tables to the root, or make a document of their own.",
            )


class One(_Join):
    """At most one row of `table`: the one whose key is in the root's columns `on`, in the order of that key.

    In `render` it is a `Node`, or None when the columns are NULL or the row is absent.
    """

    def __init__(self, table: str, on: str | Sequence[str], **nested: Any) -> None:
        """Join the row of `table` that the root refers to by `on`. Raises Misconfigured: `document-nested`."""
        super().__init__(table, on, nested)

    @property
    def on(self) -> tuple[str, ...]:
        """Return the columns of the root."""
        return self.columns


class Many(_Join):
    """The rows of `table` whose columns `by` hold the root's key, in the order of that key.

    In `render` they are a list of `Node` in the order of their own keys; rows of an append-only table, which have none, in
    an order that depends on nothing but what they hold.
    """

    def __init__(self, table: str, by: str | Sequence[str], **nested: Any) -> None:
        """Join the rows of `table` that refer to the root by `by`. Raises Misconfigured: `document-nested`."""
        super().__init__(table, by, nested)

    @property
    def by(self) -> tuple[str, ...]:
        """Return the columns of the joined table."""
        return self.columns


class Node(Mapping[str, Any]):
    """A row as `render` gets it: its columns by `row["name"]`, its joins by `row.category`, its table by `row.table`.

    The values are the codec's: a `numeric` is text, a timestamp ISO 8601 text. A template may write ``product.name``
    for a column, where no join and no method of a mapping has that name.
    """

    __slots__ = ("_columns", "_joins", "table")

    def __init__(self, table: str, columns: Row, joins: Mapping[str, Node | list[Node] | None] | None = None) -> None:
        """Wrap a row; `Document.node` does it for a whole document."""
        self.table = table
        self._columns = columns
        self._joins = joins or {}

    def __getitem__(self, column: str) -> Any:
        return self._columns[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __getattr__(self, name: str) -> Any:
        try:
            return self._joins[name]
        except KeyError:
            raise AttributeError(f"a row of {self.table} has no join {name!r}; its columns are row[{name!r}]") from None

    def __repr__(self) -> str:
        return f"Node({self.table}, {self._columns!r})"


_TAKEN = frozenset(dir(Node)) | {"table"}


class Document:
    """One document for each row of `table`, with the rows that `joins` names.

    Attributes:
        table: The root, ``schema.table``.
        joins: The `One` and `Many` by their names in `render`.
    """

    def __init__(self, table: str, **joins: One | Many) -> None:
        """Declare a document.

        Raises:
            Misconfigured: `document-name`, when a join has a name that `Node` needs; `document-join`, when it is no
            join.
        """
        for name, join in joins.items():
            if name in _TAKEN:
                raise Misconfigured(
                    "document-name",
                    f"Document({table!r}) names a join {name!r}, which every row has.",
                    "Rename the join.",
                )
            if not isinstance(join, One | Many):
                raise Misconfigured(
                    "document-join", f"Document({table!r}, {name}={join!r}) is no join.", "Use One(…) or Many(…)."
                )
        self.table: Final = table
        self.joins: Final[Mapping[str, One | Many]] = joins

    @property
    def tables(self) -> Collection[str]:
        """Return every table that it reads, the root first, each once."""
        return tuple(dict.fromkeys((self.table, *(join.table for join in self.joins.values()))))

    def node(self, row: Row, joined: Mapping[str, Any], keys: Mapping[str, Sequence[str]]) -> Node:
        """Build what `render` gets from plain rows, in the codec's form.

        Args:
            row: The root row.
            joined: For each join by name: of a `One` the row or None, of a `Many` its rows in any order.
            keys: The key's columns of each table that is joined by `Many`.
        """
        joins: dict[str, Node | list[Node] | None] = {}
        for name, join in self.joins.items():
            found = joined[name]
            if isinstance(join, Many):
                ordered = sorted(found, key=_by(keys[join.table])) if found else []
                joins[name] = [Node(join.table, child) for child in ordered]
            else:
                joins[name] = Node(join.table, found) if found is not None else None
        return Node(self.table, row, joins)


def _by(columns: Sequence[str]) -> Callable[[Row], tuple[tuple[int, float, str], ...]]:
    """Order rows by their keys; those of an append-only table, which have none in the row, by all that they hold."""

    def order(row: Row) -> tuple[tuple[int, float, str], ...]:
        keyed = columns and all(column in row for column in columns)
        return key_order(row[column] for column in columns) if keyed else key_order([sorted(row.items())])

    return order


def key_order(values: Iterable[Any]) -> tuple[tuple[int, float, str], ...]:
    """Return what rows are sorted by: numbers by value, text by its code points, anything else by its JSON."""
    return tuple(_order(value) for value in values)


def _order(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float):
        return (0, value, "")
    return (1, 0, value) if isinstance(value, str) else (2, 0, codec.dumps(value).decode())


# Aggregates over the rows of a Many. As in SQL, NULL does not count.


def count(rows: Iterable[Mapping[str, Any]], column: str | None = None) -> int:
    """Return the number of rows, or of those with a value in `column`."""
    return sum(1 for row in rows if column is None or row[column] is not None)


def total(rows: Iterable[Mapping[str, Any]], column: str) -> int | float | str:
    """Return the sum of `column` in the codec's form: of integers an integer, of floats a float, of `numeric` text. 0
    of nothing."""
    values = _numbers(rows, column)
    if any(isinstance(value, Decimal) for value in values):
        return format(sum(values, Decimal(0)), "f")
    return math.fsum(values) if any(isinstance(value, float) for value in values) else sum(values)


def mean(rows: Iterable[Mapping[str, Any]], column: str) -> float | None:
    """Return the average of `column`, whose order does not matter; None of nothing."""
    values = _numbers(rows, column)
    return math.fsum(values) / len(values) if values else None


def _numbers(rows: Iterable[Mapping[str, Any]], column: str) -> list[Any]:
    values = [row[column] for row in rows]
    return [Decimal(value) if isinstance(value, str) else value for value in values if value is not None]
