"""A film of Postgres: a few rows again and again, each time as a snapshot of its own sees them.

A view shows a state at an LSN that is known only when it has answered, and by then Postgres has gone on. The film has what Postgres was
like then. Where in it that is, is not quite where the LSN is: a commit is in the WAL before anybody sees it, for as long as the disk
takes. Each frame is one statement, which is one snapshot, and Postgres itself waits between them, so that neither the way from here to
there nor a busy machine draws them apart. What the statements gave is kept as it is, each text once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from headrace_verify.expected import Found, Query
from headrace_verify.postgres import Connection, Moment, moments

_BYTES, _AT_ONCE = 64 * 1024 * 1024, 4 * 1024 * 1024
"""Most that is kept, and about the most that is asked for at once. A view that is far behind comes to the beginning of the film first, so
it is the end that is left out."""
_AROUND = 4
_PAUSE = b"SELECT pg_sleep(%s)"


class Frame(NamedTuple):
    """The rows as one snapshot sees them."""

    moment: Moment
    found: list[Found]


class Film:
    """Frames, oldest first: what a later one sees, and a former one does not, was committed between them."""

    def __init__(self, connection: Connection, queries: Sequence[Query], seconds: float, frames: int) -> None:
        """Film what `queries` give: in about so many seconds so many frames."""
        self._connection = connection
        self._query = _in_one(queries)
        self._seconds, self._most = seconds, frames
        self._frames: list[Frame] = []
        self._kept: dict[Found, Found] = {}
        self._size = 0

    def shoot(self) -> None:
        """Take some frames, one when they are large or nothing is known of them, or only pause when there is no room for more."""
        if self._size > _BYTES:
            time.sleep(self._seconds)
            return
        size = sum(map(_size, self._frames[-1].found)) if self._frames else _AT_ONCE
        with moments(self._connection), self._connection.pipeline():
            taken = []
            for _ in range(max(1, min(self._most, _AT_ONCE // max(1, size)))):
                taken.append(self._connection.execute(self._query))
                self._connection.execute(_PAUSE, [self._seconds / self._most])
            self._frames += [self._frame(cursor.fetchall()) for cursor in taken]

    def covers(self, lsn: int) -> bool:
        """Whether it begins below an LSN."""
        return self._frames[0].moment.lsn <= lsn

    def around(self, lsn: int, logged: int) -> list[Frame]:
        """Return the frames that may show what is below an LSN: the last that was wholly taken before it, and the next that differ.

        Only such as see nothing beyond `logged`: whoever compares them must know all that they see.
        """
        known = [frame for frame in self._frames if frame.moment.lsn <= logged]
        first = sum(frame.moment.lsn <= lsn for frame in known) - 1
        frames = known[first : first + 1]
        for frame in known[first + 1 :]:
            if len(frames) == _AROUND:
                break
            if frame.found != frames[-1].found:
                frames.append(frame)
        return frames

    def _frame(self, rows: list[tuple[Any, ...]]) -> Frame:
        found = [self._once(Found(kind, tuple(texts))) for _, _, kind, *texts in rows if kind is not None]
        return Frame(Moment.parsed(*rows[0][:2]), found)

    def _once(self, found: Found) -> Found:
        kept = self._kept.setdefault(found, found)
        if kept is found:
            self._size += _size(found)
        return kept


def _size(found: Found) -> int:
    return sum(len(text) for text in found.texts if text is not None)


def _in_one(queries: Sequence[Query]) -> bytes:
    """Return one statement: snapshot, LSN, kind and texts; what has fewer texts than others ends in NULLs."""
    most = max(query.width for query in queries)
    parts = [b"SELECT %d, q.*%b FROM (%b) q" % (kind, b", NULL" * (most - width), sql) for kind, sql, width in queries]
    now = b"SELECT pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text"
    return b"SELECT * FROM (%b) now LEFT JOIN (%b) found ON true" % (now, b" UNION ALL ".join(parts))
