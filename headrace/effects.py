"""Consumers that keep no view but do something for each change: call a webhook, purge a cache.

What they do may be done again after a crash, so it must be harmless to repeat: a purge is; for a webhook there is `idempotency_key`. The
position is the only thing that is kept, in a file of SQLite, one a source; where the file is lost the consumer waits (`effects-lost`).

The first generation begins with the first state that it meets: what was there before is history, and nobody is told of it. A generation
that is promoted goes on where the one before has stopped, so that nothing is left out and nothing is told twice by a rebuild. Only where
that place makes no sense any more (I12), so that the one before was refused there, it goes on from its own: what came since is left out.

A batch is done in chunks, and what is done of it is kept until the position passes it: where an effect fails, its chunk and what follows
come again, at first change by change. So a receiver that takes only so many a minute is told everything in the end. A `Poison` whose
`cursor` names a change is parked: the rest is done at once, later changes of its key wait, and no generation is promoted before it was
tried again or dropped, since the next one would begin behind it.
"""

from __future__ import annotations

import logging
import sqlite3
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar

from headrace import codec
from headrace.change import Change, Position, source_of
from headrace.consumer import ALL, Batch, Cursor, Generation, ViewRow, no_progress
from headrace.errors import Misconfigured, Transient, Wiped
from headrace.settings import Settings

__all__ = ["EffectConsumer", "idempotency_key"]

log = logging.getLogger(__name__)

_TABLES = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS generations (number INTEGER PRIMARY KEY, fingerprint TEXT, live INTEGER DEFAULT 0, owner TEXT, position BLOB);
CREATE TABLE IF NOT EXISTS reads_all (number INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS done (number INTEGER, change TEXT, PRIMARY KEY (number, change)) WITHOUT ROWID;
"""
_MOST = 256


def idempotency_key(change: Change) -> str:
    """Return what names a change for ever, however often it is told: plain ASCII of its version, its ordinal, its table and key.

    Several changes have one ordinal: the delete and the create of a key that changed, the rows of a TRUNCATE.
    """
    row = blake2b(change.table.encode() + b"\0" + change.key, digest_size=8).hexdigest()
    return f"{change.version.epoch}-{change.version.lsn:X}-{change.ordinal}-{row}"


def lost(name: str) -> Transient:
    """Return what a consumer waits for of which nothing is there any more, though it has run: what came since would be told to nobody."""
    return Transient(
        "effects-lost",
        f"{name} has run, and has no file of its position: what was committed since it stopped would be told to nobody.",
        f"Stop it, put {name}-effects.sqlite back below HEADRACE_STATE, start it. To begin with what comes from now on instead: "
        f"headrace drop {name} --all, then headrace rebuild {name}",
    )


class EffectConsumer:
    """Does something for each change. Subclass it, name the `tables` and write `effect`.

    Class attributes:
        name: Names the consumer; by default the entry point's name.
        tables: ``schema.table`` of each table that it reads, or ALL.
        moved: `promote` has moved the position.
    """

    name: str = ""
    tables: Collection[str] = ()
    mirrors_rows: ClassVar[bool] = False
    moved = False
    progress: Callable[[int, int], None]

    def __init__(self, settings: Settings, name: str) -> None:
        """Open nothing yet."""
        self.settings = settings
        self.name = name
        self.progress = no_progress
        self._number = 0
        self._owner = uuid.uuid4().hex
        self._connection: sqlite3.Connection | None = None
        self._chunk = 1  # the worker makes a consumer anew after every error: then change by change

    def effect(self, changes: Sequence[Change]) -> None:
        """Do what is to be done for some changes, in their order; all of it is done when this returns.

        Raises:
            Transient: try again later, the same changes, fewer or more at once.
            Poison: one of them cannot be done; `cursor` is its table and its key as text.
        """
        raise NotImplementedError

    def generations(self) -> list[Generation]:
        """Return those that the file holds; one that is not there is not made, for somebody may put it back."""
        if not any(map(Path.exists, self._paths)):
            EffectConsumer.close(self)  # what it has open is of a file that is gone
            return []
        with self._file() as db:
            found = db.execute("SELECT number, fingerprint, live FROM generations ORDER BY number").fetchall()
        return [Generation(self.name, number, fingerprint, bool(live)) for number, fingerprint, live in found]

    def open(self, generation: Generation) -> Position | None:
        """Become the one that does it for this generation; return where it stands."""
        self._number = generation.number
        with self._file() as db:
            made = (generation.number, generation.fingerprint)
            db.execute("INSERT OR IGNORE INTO generations (number, fingerprint) VALUES (?, ?)", made)
            db.execute("UPDATE generations SET owner = ? WHERE number = ?", (self._owner, self._number))
            return self._position(db)

    def _position(self, db: sqlite3.Connection) -> Position | None:
        found = db.execute("SELECT position FROM generations WHERE number = ?", (self._number,)).fetchone()
        return codec.decode_position(found[0]) if found and found[0] else None

    def apply(self, batch: Batch) -> None:
        """Do it for each change, if it is this generation's turn: it is live, or none is yet. Then keep the position.

        Raises:
            Wiped: the generation is gone. Misconfigured: `view-taken-over`.
        """
        if self._is_its_turn() and not batch.loading:
            self._do(batch.changes)
        position = (codec.encode_position(batch.position), self._number, self._owner)
        with self._file() as db:
            db.execute("BEGIN IMMEDIATE")
            stood = self._position(db)
            if db.execute("UPDATE generations SET position = ? WHERE number = ? AND owner = ?", position).rowcount:
                self._forget(db, batch, stood)
            if tuple(self.tables) == ALL:
                db.execute("INSERT OR IGNORE INTO reads_all VALUES (?)", (self._number,))
            db.execute("COMMIT")

    def _forget(self, db: sqlite3.Connection, batch: Batch, stood: Position | None) -> None:
        """Forget of what is done that which the position has passed.

        Cut otherwise, a piece may have less of a partition than the batch that failed. A whole state that is another one has all of that,
        though the log may have been compacted meanwhile; where what is parked was tried again it is the same.
        """
        if batch.complete and stood is not None and stood.offsets != batch.position.offsets:
            db.execute("DELETE FROM done WHERE number = ?", (self._number,))
        elif self._done(db):
            passed = ((self._number, idempotency_key(change)) for change in batch.changes)
            db.executemany("DELETE FROM done WHERE (number, change) = (?, ?)", passed)

    def _is_its_turn(self) -> bool:
        with self._file() as db:
            held = {
                number: (live, owner)
                for number, live, owner in db.execute("SELECT number, live, owner FROM generations")
            }
        live, owner = held.get(self._number, (False, None))
        if owner is None:
            raise self._gone()
        if owner != self._owner:
            raise Misconfigured("view-taken-over", f"Another process runs {self.name}.", "Stop one of the two.")
        return live or not any(live for live, _ in held.values())

    def _gone(self) -> Wiped:
        said = f"Generation {self._number} of {self.name} is gone, or goes on elsewhere: it is opened anew."
        return Wiped("view-wiped", said)

    def _do(self, changes: Sequence[Change]) -> None:
        """Do what has not been done of a batch, and note each chunk but the last, which the position covers."""
        with self._file() as db:
            done = self._done(db)
        left = [change for change in changes if idempotency_key(change) not in done] if done else list(changes)
        while left:
            chunk, left = left[: self._chunk], left[self._chunk :]
            try:
                self.effect(chunk)
            except Exception:
                self._chunk = 1  # what a Poison names is taken out, and the rest tried by this one
                raise
            self._chunk = min(2 * self._chunk, _MOST)
            if left:
                noted = ((self._number, idempotency_key(change)) for change in chunk)
                with self._file() as db:
                    db.execute("BEGIN IMMEDIATE")
                    db.executemany("INSERT OR IGNORE INTO done VALUES (?, ?)", noted)
                    db.execute("COMMIT")
                if not self._is_its_turn():  # a batch may take long: who was replaced meanwhile ends
                    raise self._gone()

    def _done(self, db: sqlite3.Connection) -> set[str]:
        return {change for (change,) in db.execute("SELECT change FROM done WHERE number = ?", (self._number,))}

    def promote(self) -> None:
        """Let this generation do it from now on, from where the one before has stopped; it is opened anew for that.

        Where it cannot go on from there it goes on from where it is; what came in between, and what is parked there, is left out.

        Raises:
            Misconfigured: `records-parked`: the one before has not done everything up to there.
        """
        with self._file() as db:
            db.execute("BEGIN IMMEDIATE")
            before = self._before(db)
            if before and before.parked:
                db.execute("ROLLBACK")
                raise Misconfigured(
                    "records-parked",
                    f"The live generation of {self.name} has something parked, which this one would never do.",
                    f"Run: headrace parked retry {self.name} --all",
                )
            if before:
                query = "UPDATE generations SET position = ?, owner = NULL WHERE number = ?"
                db.execute(query, (codec.encode_position(before), self._number))
                live = "SELECT number FROM generations WHERE live"
                db.execute(f"UPDATE OR REPLACE done SET number = ? WHERE number IN ({live})", (self._number,))
            db.execute("UPDATE generations SET live = (number = ?)", (self._number,))
            db.execute("COMMIT")
        self.moved = before is not None

    def _before(self, db: sqlite3.Connection) -> Position | None:
        """Return where the live generation has stopped, if this one may go on from there, as far as its own position tells (I12).

        Of a table that the one before does not read that is where this one is: what is there is history. One that it would have read,
        had the table been there, begins at its beginning.
        """
        query = (
            "SELECT live AND number <> ?1, position, number IN (SELECT number FROM reads_all) FROM generations "
            "WHERE (live OR number = ?1) AND position IS NOT NULL"
        )
        found = {other: (codec.decode_position(at), all_) for other, at, all_ in db.execute(query, (self._number,))}
        (before, reads_all), (own, _) = found.get(1, (None, 0)), found.get(0, (None, 0))
        if before is None or own is None:
            return before
        if self._fits(before, own):
            known = before.offsets.keys() if reads_all else own.offsets.keys()
            offsets = {topic: before.offsets.get(topic, at) for topic, at in own.offsets.items() if topic in known}
            topics = {topic: before.topics.get(topic, id_) for topic, id_ in own.topics.items() if topic in known}
            return replace(before, offsets=offsets, topics=topics)
        said = "%s goes on at %s: what came since %s, where the generation before it has stopped, is left out, and what is parked there."
        log.warning(said, self.name, own.version, before.version)
        return None

    def _fits(self, before: Position, own: Position) -> bool:
        if own.appended < before.appended:  # a rollback: of the log as it is now that one knows more
            return True
        return (
            before.continued_by(own.version, own.source)
            and all(own.topics.get(topic, id_) == id_ for topic, id_ in before.topics.items())
            and own.appended - before.appended <= before.tombstones_stay(self.settings.delete_retention_ms)
        )

    def drop(self) -> None:
        """Forget this generation."""
        with self._file() as db:
            for table in ("generations", "reads_all", "done"):
                db.execute(f"DELETE FROM {table} WHERE number = ?", (self._number,))

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def scan(self, after: Cursor | None, limit: int) -> Sequence[ViewRow]:  # noqa: ARG002  see there
        """See `Consumer.scan`: there is nothing to read."""
        return []

    @property
    def _paths(self) -> tuple[Path, Path]:
        """Return where an earlier version kept the file, and where it is."""
        name = f"{self.name}-effects.sqlite"
        return self.settings.path(name), self.settings.path(f"{self.settings.source}/{name}")

    @contextmanager
    def _file(self) -> Iterator[sqlite3.Connection]:
        """Give the file of the positions. Raises Transient: `local-state`."""
        old, path = self._paths
        try:
            if self._connection is None:
                _take_over(old, path, self.settings.source)
                self._connection = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
                self._connection.executescript(_TABLES)
            yield self._connection
        except sqlite3.Error as error:
            if self._connection is not None and self._connection.in_transaction:
                self._connection.rollback()
            raise Transient("local-state", f"{path}: {error}.", "See the folder of HEADRACE_STATE.") from error


def _take_over(old: Path, path: Path, source: str) -> None:
    """Move the file that an earlier version kept beside those of other sources, unless its live generation is another's.

    Begun anew, it would leave out what came since. Raises Transient: `local-state`, also while a process of that version has it open.
    """
    if path.exists() or not old.exists():
        return
    try:
        with closing(sqlite3.connect(f"{old.absolute().as_uri()}?mode=rw", 1, isolation_level=None, uri=True)) as db:
            db.executescript(_TABLES)
            query = "SELECT position FROM generations WHERE position IS NOT NULL ORDER BY live DESC, number DESC"
            found = db.execute(query).fetchone()
            if found and not {*map(source_of, codec.decode_position(found[0]).topics)} <= {source}:
                return
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("BEGIN IMMEDIATE")  # the last to close it takes in what SQLite keeps beside it
            db.rollback()
        old.replace(path)
    except (sqlite3.Error, OSError) as error:
        raise Transient("local-state", f"{old}: {error}.", "See the folder of HEADRACE_STATE.") from error
