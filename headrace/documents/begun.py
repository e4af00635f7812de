"""Which documents an apply is about to show: in a file beside the local rows, until these are committed.

A kill in between leaves readers documents of rows that the local rows do not know. The log brings these rows again, but not for ever: where
one of them is gone by then, compaction leaves nothing but its tombstone, after `min.compaction.lag.ms`, and nobody knows which documents
it was in. So what was begun is rendered again by the next apply. The file need only outlive the process: it is not synced.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace import codec
from headrace.change import Version
from headrace.documents import layout
from headrace.documents.when import When

_DUE = f"SELECT doc, key FROM touched WHERE {layout.WAITS} AND {layout.IS_DUE}"
_IS_DUE = f"{_DUE} AND doc = :doc AND key = :key"


class Begun:
    """The documents that may have been shown without the local rows knowing it.

    What is wrong with the file is raised as an error of SQLite, to which it belongs: for lack of space, or for what is damaged.
    """

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        """Keep them beside the local rows of `path`, whose list of touched documents is in `db`."""
        self._db = db
        self._path, self._new = (path.with_name(path.name + suffix) for suffix in layout.BEGUN)

    def begin(self, when: When, version: Version) -> None:
        """Touch what was begun before, as by a change of `version`; then all that is touched and due is begun."""
        with _like_sqlite():
            self._path.touch()
            with self._path.open("rb") as before, self._new.open("wb") as file:
                self._db.executemany(layout.TOUCH, ((*codec.loads(line), version.packed()) for line in before))
                file.writelines(codec.dumps(each) + b"\n" for each in self._db.execute(_DUE, when._asdict()))
                before.seek(0)  # it is touched, but perhaps not due: then it stays in the list, once
                file.writelines(line for line in before if not self._is_due(when, *codec.loads(line)))
            self._new.replace(self._path)

    def _is_due(self, when: When, doc: int, key: str) -> bool:
        found = self._db.execute(_IS_DUE, when._asdict() | {"doc": doc, "key": key})
        return found.fetchone() is not None

    def forget(self) -> None:
        """Say that the local rows are committed."""
        with _like_sqlite():
            self._path.unlink(missing_ok=True)


@contextmanager
def _like_sqlite() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise sqlite3.OperationalError(str(error)) from error
    except ValueError as error:
        raise sqlite3.DatabaseError(str(error)) from error
