"""What a document is made of: a root row, and rows of other tables joined to it, and to these.

    Document("public.products",
             category=One("public.categories", on="category_id", parent=One("public.categories", on="parent_id")),
             latest=Many("public.reviews", by="product_id", where={"hidden": False}, order="-created_at", limit=3),
             tags=Many("public.product_tags", by="product_id", tag=One("public.tags", on="tag_id")),
             rating=Aggregate("public.reviews", by="product_id", n=Count(), stars=Avg("stars")))

A declaration is data. `headrace.documents.paths` reads it to find the documents that a change touches, and
`headrace.documents.local` to put them together; verify makes SQL of it. So a filter is a mapping and not a function:
there is nothing in it that could not be said in SQL. All hand the rows to `render` as a `Node`, so that it cannot tell
which of them called.

Joins compare values in the codec's form, so the columns on both sides must be of types that write equal values alike
(`headrace.documents.checks`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, TypeVar

from headrace.change import Row
from headrace.documents.aggregates import Avg, Function, Min, Sum
from headrace.documents.order import Shape, filtering, sorting
from headrace.errors import Misconfigured

_With = TypeVar("_With")


_OF_DICT = frozenset(name for name in set(dir(dict)) - set(dir(Mapping)) if not name.startswith("_"))
"""Methods that only a dictionary has: columns and joins of these names come first."""
_OF_MAPPING = frozenset(name for name in dir(Mapping) if not name.startswith("_"))
"""Methods that every mapping has: they come before columns of these names."""


class Node(dict[str, Any]):
    """A row as `render` gets it: its columns by `row["name"]`, its joins by `row.category`, its table by `row.table`.

    The values are the codec's: a `numeric` is text, a timestamp ISO 8601 text. A template, and a plugin, may write ``product.name``
    for a column, where no join and no method of a mapping has that name. So a template finds it at once: of a dictionary it tries the
    attribute, then the item, which is a quarter of the time of a small page.
    """

    __slots__ = ("__dict__", "_joins", "table")

    def __init__(self, table: str, columns: Row, joins: Mapping[str, Node | list[Node] | None] | None = None) -> None:
        """Take a row, in the codec's form, and what is joined to it."""
        super().__init__(columns)
        self.table = table
        self._joins = joins or {}
        if not _OF_MAPPING.isdisjoint(columns):
            columns = {name: value for name, value in columns.items() if name not in _OF_MAPPING}
        self.__dict__ = {**columns, **self._joins}

    # What render changes of a row is what a template finds.

    def __setitem__(self, name: str, value: Any) -> None:
        """Change a column."""
        super().__setitem__(name, value)
        if name not in _OF_MAPPING and name not in getattr(self, "_joins", ()):  # none yet, where a copy is made
            vars(self)[name] = value

    def __delitem__(self, name: str) -> None:
        """Take a column away."""
        super().__delitem__(name)
        if name not in self._joins:
            vars(self).pop(name, None)

    def pop(self, name: str, *default: Any) -> Any:
        """Take a column away."""
        value = self.get(name, *default) if default else self[name]
        if name in self:
            del self[name]
        return value

    def update(self, *args: Any, **more: Any) -> None:
        """Change columns."""
        for name, value in dict(*args, **more).items():
            self[name] = value

    def __ior__(self, other: Any) -> Self:  # type: ignore[override,misc]
        """Change columns."""
        Node.update(self, other)
        return self

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return what is joined by this name, or the column."""

    def __repr__(self) -> str:
        return f"Node({self.table}, {super().__repr__()})"


_TAKEN = frozenset(dir(Node)) - _OF_DICT


class Level:
    """A table, and what is joined to each of its rows: a document's root, or a join.

    Attributes:
        table: ``schema.table``.
        joins: `One`, `Many` and `Aggregate` by their names in `render`.
    """

    def __init__(self, table: str, **joins: Join) -> None:
        """Join to the rows of `table`.

        Raises:
            Misconfigured: `document-name`, when a join has a name that `Node` needs; `document-join`, when it is no
            join.
        """
        self.table: Final = table
        self.joins: Final[Mapping[str, Join]] = joins
        for name, join in joins.items():
            if name in _TAKEN:
                raise Misconfigured(
                    "document-name", f"{self} names a join {name!r}, which every row has.", "Rename the join."
                )
            if not isinstance(join, One | Many | Aggregate):
                self._refuse(f"{name}={join!r} is no join", "Use One(…), Many(…) or Aggregate(…).")

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.table!r})"

    @property
    def tables(self) -> Collection[str]:
        """Return every table that is read, this one first, each once."""
        deeper = (table for join in self.joins.values() for table in join.tables)
        return tuple(dict.fromkeys((self.table, *deeper)))

    def _refuse(self, what: str, remedy: str) -> NoReturn:
        raise Misconfigured("document-join", f"{self}: {what}.", remedy)


class Document(Level):
    """One document for each row of `table`, with the rows that `joins` names."""


class One(Level):
    """At most one row of `table`: the one whose key is in the columns `on` of the row that it is joined to, in the
    order of that key.

    In `render` it is a `Node`, or None when the columns are NULL or the row is absent. A table may be joined to itself,
    as many levels up as are declared.
    """

    def __init__(self, table: str, on: str | Sequence[str], **joins: Join) -> None:
        """Join the row of `table` that `on` refers to. Raises Misconfigured: see `Level`."""
        super().__init__(table, **joins)
        self.on: Final = _names(on)

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns that refer; of `One` they are of the row that it is joined to."""
        return self.on


class _Referring(Level):
    """What `Many` and `Aggregate` share: the rows of `table` that refer to a row, and perhaps only some of them."""

    def __init__(
        self, table: str, by: str | Sequence[str], where: Mapping[str, Any] | None, joins: Mapping[str, Join]
    ) -> None:
        super().__init__(table, **joins)
        self.by: Final = _names(by)
        self.where: Final = {name: _listed(value) for name, value in (where or {}).items()}
        for name, values in self.where.items():
            if not all(value is None or isinstance(value, str | int | float) for value in values):
                self._refuse(
                    f"where {name!r} is {values!r}", "Use text, a number, a boolean, None, or a list of these."
                )

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns that refer, of the rows of `table`."""
        return self.by

    def filter(self, shape: Shape) -> Callable[[Row], bool]:
        """Return whether a row is among those that `where` wants."""
        return filtering(self.where, shape)


class Many(_Referring):
    """The rows of `table` whose columns `by` hold the key of the row that they are joined to, in the order of that key.

    In `render` they are a list of `Node`, by `order` and then by their own keys; rows of an append-only table, which
    have none, in an order that depends on nothing but what they hold. Without a `limit` all of them are in memory at once
    when the row is rendered: where there is no bound to them, give one, or use an `Aggregate`.

    Many to many is a `Many` of the table between, with a `One` of the other:
    ``Many("public.product_tags", by="product_id", tag=One("public.tags", on="tag_id"))``.
    """

    def __init__(
        self,
        table: str,
        by: str | Sequence[str],
        *,
        where: Mapping[str, Any] | None = None,
        order: str | Sequence[str] = (),
        limit: int | None = None,
        **joins: Join,
    ) -> None:
        """Join the rows of `table` that refer by `by`.

        Args:
            table: ``schema.table``.
            by: Its columns, in the order of the key that they hold.
            where: Only rows with these values, in the codec's form (of a `numeric` also another form of the number);
                of a list any is right, and None is NULL.
            order: Columns to sort by; a ``-`` before one means descending. NULLs come last.
            limit: At most so many; no more are held in memory.
            joins: What is joined to each.

        Raises:
            Misconfigured: see `Level`; `document-join` also for what `where`, `order` or `limit` cannot be.
        """
        super().__init__(table, by, where, joins)
        self.order: Final = tuple((name.removeprefix("-"), name.startswith("-")) for name in _names(order))
        self.limit: Final = limit
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            self._refuse(f"limit={limit!r}", "Use a whole number above 0.")

    def picked(self, found: Iterable[tuple[Row, _With]], shape: Shape) -> list[tuple[Row, _With]]:
        """Return rows, each with whatever comes with it, in order and no more than `limit`."""
        by = sorting(self.order, shape)
        if self.limit is None:
            rows = list(found)
            return sorted(rows, key=lambda each: by(each[0])) if len(rows) > 1 else rows
        return heapq.nsmallest(self.limit, found, key=lambda each: by(each[0]))

    @property
    def ordered(self) -> Collection[str]:
        """Return the columns of `table` by which rows are put in order."""
        return {name for name, _ in self.order}


class Folding(_Referring):
    """What `Aggregate` and `Window` share: values over rows, by their names."""

    def __init__(
        self, table: str, by: str | Sequence[str], where: Mapping[str, Any] | None, values: Mapping[str, Function]
    ) -> None:
        """Take rows together by `by`, those that `where` wants. Raises Misconfigured: `document-join`."""
        super().__init__(table, by, where, {})
        self.values: Final = values
        for name, function in values.items():
            if not isinstance(function, Function):
                self._refuse(f"{name}={function!r}", "Use Count(), Sum(…), Avg(…), Min(…) or Max(…).")

    def over(self, rows: Iterable[Row], shape: Shape) -> Row:
        """Return the values over some rows, which are looked at one by one."""
        states: dict[str, Any] = dict.fromkeys(self.values)
        folds = [(n, each, each.column in shape.numbers, each.column in shape.times) for n, each in self.values.items()]
        for row in rows:
            for name, function, number, time in folds:
                value = row.get(function.column) if function.column is not None else None
                states[name] = function.add(states[name], value, number=number, time=time)
        return {name: function.result(states[name]) for name, function in self.values.items()}

    @property
    def ordered(self) -> Collection[str]:
        """Return the columns of `table` of which the least or the greatest value is taken."""
        return {each.column for each in self.values.values() if isinstance(each, Min)}

    @property
    def added(self) -> Collection[str]:
        """Return the columns of `table` whose values are added."""
        return {each.column for each in self.values.values() if isinstance(each, Sum | Avg)}

    @property
    def counted(self) -> Collection[str]:
        """Return the other columns that the values are of."""
        return {each.column for each in self.values.values() if each.column is not None and not isinstance(each, Min)}


class Aggregate(Folding):
    """Values over the rows of `table` whose columns `by` hold the key of the row that it is joined to.

    In `render` it is one `Node` of them, by their names. However many rows there are, none is kept in memory.
    """

    def __init__(
        self, table: str, by: str | Sequence[str], *, where: Mapping[str, Any] | None = None, **values: Function
    ) -> None:
        """Aggregate the rows of `table` that refer by `by`, and that `where` wants (see `Many`).

        Raises:
            Misconfigured: `document-join`, when one of `values` is no `Count`, `Sum`, `Avg`, `Min` or `Max`.
        """
        super().__init__(table, by, where, values)


Join = One | Many | Aggregate


def _names(columns: str | Sequence[str]) -> tuple[str, ...]:
    return (columns,) if isinstance(columns, str) else tuple(columns)


def _listed(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple | set | frozenset) else (value,)
