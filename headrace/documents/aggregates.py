"""Values over many rows. As in SQL, NULL does not count.

`Count`, `Sum`, `Avg`, `Min` and `Max` are data: an `Aggregate` declares them, the local rows are streamed through them,
one at a time, and verify makes SQL of them. `count`, `total` and `mean` are for rows that `render` has in its hands.

Numbers are added as the decimals that the log writes, without rounding, so that the order of the rows does not matter
and SQL gets the same: floating point would depend on both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Final, NamedTuple

from headrace.documents.order import comparable
from headrace.errors import Misconfigured

_EXACT: Final = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])
_WORD = 1 << 63


class Summed(NamedTuple):
    """The exact sum of some numbers; `text` when the log writes them as text (`numeric`)."""

    total: Decimal
    terms: int
    text: bool


class _Function:
    """A function of one column, as a fold: `add` each value, and take the `result`. The state begins as None."""

    def __init__(self, column: str) -> None:
        """Take the values of `column`."""
        self.column: Final = column

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.column!r})"


class Count:
    """The number of rows, or of those with a value in `column`."""

    def __init__(self, column: str | None = None) -> None:
        """Count rows, or the values of `column`."""
        self.column: Final = column

    def add(self, state: int | None, value: Any, *, number: bool, time: bool = False) -> int:  # noqa: ARG002 -- as in the others
        """Count a row."""
        return (state or 0) + (self.column is None or value is not None)

    def result(self, state: int | None) -> int:
        """Return the number."""
        return state or 0


class _Adding(_Function):
    def add(self, state: Summed | None, value: Any, *, number: bool, time: bool = False) -> Summed | None:  # noqa: ARG002 -- as in the others
        """Add a value. Raises Misconfigured: `document-column`, when it is no number."""
        if value is None:
            return state
        term = self._decimal(value)
        text = isinstance(value, str) and term.is_finite()
        if state is None:
            return Summed(term, 1, text)
        return Summed(_EXACT.add(state.total, term), state.terms + 1, state.text or text)

    def _decimal(self, value: Any) -> Decimal:
        try:
            return Decimal(str(value))  # true is no number
        except InvalidOperation as error:
            said = f"{self!r} of {value!r}, which is no number."
            raise Misconfigured("document-column", said, "Change the declaration of the document.") from error


class Sum(_Adding):
    """The sum of `column`, exact, in the codec's form: of `numeric` text, else a number. None of nothing."""

    def result(self, state: Summed | None) -> int | float | str | None:
        """Return the sum."""
        if state is None:
            return None
        if not state.total.is_finite():
            return str(state.total)
        if state.text:
            return format(state.total, "f")
        exact = Fraction(state.total)
        return int(exact) if exact.denominator == 1 and -_WORD <= exact < _WORD else _nearest(exact)


class Avg(_Adding):
    """The average of `column`, rounded once, to the nearest float. None of nothing."""

    def result(self, state: Summed | None) -> float | str | None:
        """Return the average."""
        if state is None:
            return None
        return _nearest(Fraction(state.total) / state.terms) if state.total.is_finite() else str(state.total)


def _nearest(exact: Fraction) -> float | str:
    try:
        return float(exact)
    except OverflowError:
        return "Infinity" if exact > 0 else "-Infinity"


class Min(_Function):
    """The least value of `column`, as the log has it; text by code points. None of nothing."""

    def add(self, state: Any, value: Any, *, number: bool, time: bool = False) -> Any:
        """Keep the lesser."""
        return value if state is None else state if value is None else min(state, value, key=_rank(number, time))

    def result(self, state: Any) -> Any:
        """Return it."""
        return state


class Max(Min):
    """The greatest value of `column`, as the log has it; text by code points. None of nothing."""

    def add(self, state: Any, value: Any, *, number: bool, time: bool = False) -> Any:
        """Keep the greater."""
        return value if state is None else state if value is None else max(state, value, key=_rank(number, time))


def _rank(number: bool, time: bool) -> Any:
    """Compare values; equal numbers that are written otherwise (``1.0``, ``1.00``) by how they are written."""
    return lambda value: (comparable(value, number=number, time=time), str(value))


Function = Count | Sum | Avg | Min
"""What an `Aggregate` may have."""


# Over rows that are there: what a Many gave.


def count(rows: Iterable[Mapping[str, Any]], column: str | None = None) -> int:
    """Return the number of rows, or of those with a value in `column`."""
    return sum(1 for row in rows if column is None or row[column] is not None)


def total(rows: Iterable[Mapping[str, Any]], column: str) -> int | float | str:
    """Return the sum of `column` as `Sum` does: of integers an integer, of floats a float, of `numeric` text. 0 of nothing."""
    values = _present(rows, column)
    if _WHOLE.issuperset(map(type, values)):
        whole: int = sum(values)
        if -_WORD <= whole < _WORD:
            return whole
    found: int | float | str = _folded(Sum(column), values)
    return float(found) if isinstance(found, int) and float in map(type, values) else found


def mean(rows: Iterable[Mapping[str, Any]], column: str) -> float | str | None:
    """Return the average of `column` as `Avg` does, text when it is no number; None of nothing."""
    values = _present(rows, column)
    whole = _WHOLE.issuperset(map(type, values))
    found: float | str | None = sum(values) / len(values) if whole and values else _folded(Avg(column), values)
    return found


_WHOLE: Final = frozenset({int, bool})
"""Types whose values Python itself adds without rounding: nearly always there are no others."""


def _present(rows: Iterable[Mapping[str, Any]], column: str) -> list[Any]:
    return [value for row in rows if (value := row[column]) is not None]


def _folded(function: Sum | Avg, values: Iterable[Any]) -> Any:
    """Fold values. Raises ValueError, as mistakes in `render` do: its document is parked, where a declaration's mistake stops the view."""
    state = None
    try:
        for value in values:
            state = function.add(state, value, number=True)
    except Misconfigured as error:
        raise ValueError(error.message) from error
    return function.result(state)
