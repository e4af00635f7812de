"""Deciding what was excused: rows that change while they are compared.

Whoever waits for a row to be quiet between a snapshot and a look at the view never decides the hottest: between the two lies the
whole way through the log. So Postgres is *filmed*, snapshot after snapshot, until the view has answered with its rows and the LSN V of
the state that they are of. The snapshots around V are compared with them, and only a change excuses that is below V and not seen, or
seen and beyond V: one within the milliseconds between two snapshots. With each round there are fewer keys to film, and the snapshots
are closer to each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import permutations

from headrace.change import Checkpoint, Version
from headrace.consumer import Cursor, ViewRow
from headrace.control import Control
from headrace.log import Log
from headrace_verify.excuses import Take, excuse
from headrace_verify.film import Film, Frame
from headrace_verify.ledger import Difference, Excused, Ledger
from headrace_verify.postgres import Connection
from headrace_verify.view import View, check, write

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``; total 0 when unknown."""

_KEYS, _BYTES = 256, 8 * 1024 * 1024
"""Most keys that are compared again together, and about the most bytes of them: they are in memory here and where the view is."""
_FILM_SECONDS, _FRAMES = 0.02, 64


@dataclass(frozen=True, slots=True)
class Deciding:
    """Compares excused rows of a view again.

    Attributes:
        timeout: Longest wait (s) for the view to show something newer, and for the next row to be decided.
    """

    log: Log
    control: Control
    connection: Connection
    view: View
    progress: Progress
    timeout: float

    def decide(self, checkpoint: Callable[[], Checkpoint]) -> list[str]:
        """Go on until all are decided, or none was for as long as the timeout; return what a reader should know.

        Args:
            checkpoint: Returns the newest complete one.
        """
        rounds, decided = 0, time.monotonic()
        while pending := self.view.ledger.excused():
            done = 0
            for some in _portions(pending, max(1, _KEYS >> 2 * rounds)):
                self.progress(f"{self.view.name}: comparing again what just changed", done, len(pending))
                done += len(some)
                count = self._again(some, min(4**rounds, _FRAMES), checkpoint)
                if count:
                    decided = time.monotonic()
                elif time.monotonic() - decided > self.timeout:
                    said = f"for {self.timeout:.0f} s it showed nothing newer, so what changed before is undecided"
                    return [] if count is not None else [f"{said}; see headrace status"]
            rounds += 1
        return []

    def _again(self, pending: Sequence[Excused], frames: int, checkpoint: Callable[[], Checkpoint]) -> int | None:
        """Compare some rows once more; return how many are decided by that, None when the view shows nothing newer."""
        before = checkpoint()
        queries = list(self.view.expected.queries(self.connection, sorted({each.root for each in pending})))
        film = Film(self.connection, queries, _FILM_SECONDS, frames)
        keys = {(each.collection, each.key) for each in pending}
        looked = self._look(sorted(keys), film, before.version.epoch)
        if looked is None:
            return None
        shown, rows = looked
        right: set[Cursor] = set()
        wrong: dict[Cursor, Difference] = {}
        with ExitStack() as ending:
            takes = [
                Take(frame.moment, ending.enter_context(self._compared(frame, rows, keys)))
                for frame in film.around(shown.lsn, checkpoint().version.lsn)
            ]
            for one, other in permutations(takes, 2):
                one.ledger.add((), other.ledger.members())
            excuse(self.log, self.view.expected, takes, before, shown)
            for _, small in takes:
                wrong |= {(d.collection, d.key): d for d in small.differences(excused=False)}
                right |= keys - {(d.collection, d.key) for d in small.differences()}
        for collection, key in right | wrong.keys():
            self.view.ledger.settle(collection, key, wrong.get((collection, key)))
        return len(right | wrong.keys())

    def _look(self, keys: Sequence[Cursor], film: Film, epoch: int) -> tuple[Version, dict[Cursor, ViewRow]] | None:
        """Film Postgres until the view shows a state within the film; return the state's version and rows."""
        deadline = time.monotonic() + self.timeout
        with ThreadPoolExecutor(1) as pool:
            film.shoot()
            while time.monotonic() < deadline:
                asked = pool.submit(self.control.rows, self.view.name, self.view.generation, keys, self.timeout)
                while not asked.done():
                    film.shoot()
                shown, rows = asked.result()
                if shown.epoch == epoch and film.covers(shown.lsn):
                    return shown, rows
        return None

    @contextmanager
    def _compared(self, frame: Frame, rows: dict[Cursor, ViewRow], keys: Collection[Cursor]) -> Iterator[Ledger]:
        """Compare a view's rows with a frame; give what differs."""
        with closing(Ledger()) as small:
            write(small, map(self.view.expected.made, frame.found))
            for row in rows.values():
                check(row, small)
            for difference in small.left():
                if (difference.collection, difference.key) in keys:
                    small.note(difference)
            yield small


def _portions(pending: Sequence[Excused], most: int) -> Iterator[list[Excused]]:
    portion: list[Excused] = []
    size = 0
    for each in pending:
        if portion and (len(portion) == most or size + each.size > _BYTES):
            yield portion
            portion, size = [], 0
        portion.append(each)
        size += each.size
    yield portion
