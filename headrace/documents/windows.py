"""Tumbling windows: one document for each stretch of time in which a table has rows, with values over these.

    Window("public.orders", on="created_at", seconds=60, n=Count(), total=Sum("total"))

A window begins at a whole multiple of its length since 1970-01-01 00:00 (UTC, where the column has a time zone), as
Postgres's ``date_bin`` counts, and its start is written as the log writes a timestamp. So the arithmetic is on that text
(docs/formats.md), for every year that Postgres has: Python's own ends at 9999 and knows none before Christ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from headrace.change import Row
from headrace.documents.aggregates import Function
from headrace.documents.declaration import Document, Folding
from headrace.errors import Misconfigured

_TIMESTAMP = re.compile(
    r"(\d{4,})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d):(\d\d)(?:\.\d+)?(Z|[+-]\d\d(?::\d\d){0,2})?)?( BC)?"
)
_NEVER = (None, "infinity", "-infinity")
_DAY = 86400


class Window(Folding):
    """One document for each window of `seconds` in which `table` has rows, by the timestamp in the column `on`.

    In `render` it is a `Node` of the window's start, under the name `start`, and of the values. A row that changes, comes,
    goes, or moves to another window changes all windows that it was or is in; a window without rows has no document. Rows
    whose `on` is NULL or infinite are in none. A `date` counts as its midnight. However many rows a window has, none is kept
    in memory.
    """

    def __init__(
        self,
        table: str,
        on: str,
        seconds: int,
        *,
        where: Mapping[str, Any] | None = None,
        start: str = "start",
        **values: Function,
    ) -> None:
        """Aggregate the rows of `table` that `where` wants (see `Many`), window by window.

        Args:
            table: ``schema.table``.
            on: Its column of type `timestamp`, `timestamptz` or `date`.
            seconds: How long a window is.
            where: Only rows with these values.
            start: What the window's start is called: the key of the document. By it `id` and `render` can tell several documents of one
                table apart.
            values: `Count`, `Sum`, `Avg`, `Min` and `Max`, by their names in `render`.

        Raises:
            Misconfigured: `document-join`, for what `seconds`, `where` or `values` cannot be.
        """
        super().__init__(table, on, where, values)
        self.on: Final = on
        self.seconds: Final = seconds
        self.start: Final = start
        if type(seconds) is not int or seconds < 1:
            self._refuse(f"seconds={seconds!r}", "Use a whole number above 0.")
        if start in values:
            self._refuse(f"{start!r} is the window's start and a value", "Rename one of them.")

    def start_of(self, row: Row) -> str | None:
        """Return the start of the window that a row is in, None when it is in none.

        That is also where the value is no timestamp: the row is older than the column's type (what is not one now is refused by `checks`).
        """
        value = row.get(self.on)
        if value not in _NEVER:
            with suppress(Misconfigured):
                return window_start(value, self.seconds)
        return None


Root = Document | Window
"""What documents may be made for: each row of a table, or each window of its rows."""


def is_joined(document: Root) -> bool:
    """Whether more than one row is in a document."""
    return isinstance(document, Window) or bool(document.joins)


def window_start(value: Any, seconds: int) -> str:
    """Return the start of the window of a finite timestamp, in the log's form. Raises Misconfigured: `document-column`."""
    found = _TIMESTAMP.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        said = f"{value!r} is no timestamp, and in no window."
        raise Misconfigured("document-column", said, "Change the declaration of the document.")
    year, month, day, hour, minute, second, zone, before_christ = found.groups(default="")
    days = _days(1 - int(year) if before_christ else int(year), int(month), int(day))
    at = days * _DAY + int(hour or 0) * 3600 + int(minute or 0) * 60 + int(second or 0) - _offset(zone)
    return _written(at - at % seconds, "+00:00" if zone else "")


def _offset(zone: str) -> int:
    if zone in ("", "Z"):
        return 0
    hours, minutes, seconds = (*map(int, zone[1:].split(":")), 0, 0)[:3]
    return (hours * 3600 + minutes * 60 + seconds) * (-1 if zone[0] == "-" else 1)


def _written(at: int, zone: str) -> str:
    days, rest = divmod(at, _DAY)
    year, month, day = _date(days)
    time = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    christ = "" if year > 0 else " BC"
    return f"{year if year > 0 else 1 - year:04d}-{month:02d}-{day:02d}T{time}{zone}{christ}"


# The Gregorian calendar for ever, with a year 0, in eras of 400 years that begin in March.

_ERA_DAYS, _TO_1970 = 146097, 719468


def _days(year: int, month: int, day: int) -> int:
    """Return the days since 1970-01-01."""
    year -= month <= 2
    era, of_era = divmod(year, 400)
    of_year = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    return era * _ERA_DAYS + of_era * 365 + of_era // 4 - of_era // 100 + of_year - _TO_1970


def _date(days: int) -> tuple[int, int, int]:
    """Undo `_days`."""
    era, of_era = divmod(days + _TO_1970, _ERA_DAYS)
    year = (of_era - of_era // 1460 + of_era // 36524 - of_era // 146096) // 365
    of_year = of_era - (365 * year + year // 4 - year // 100)
    month = (5 * of_year + 2) // 153
    day = of_year - (153 * month + 2) // 5 + 1
    month = month + 3 if month < 10 else month - 9
    return year + era * 400 + (month <= 2), month, day
