"""What capture says of itself: to people on the terminal, to everyone else in `headrace.control` once a second [I13].

It is also the watchdog of S15: the loop beats, and when it has not for ten seconds (mostly: Kafka does not take the cut) the replication
connection is shut down from here, so that Postgres can stop or go on without us; the slot keeps the WAL.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from headrace.change import Checkpoint, format_lsn
from headrace.consumer import no_progress
from headrace.control import Control, Report
from headrace.errors import HeadraceError

NAME = "capture"
STALLED_SECONDS = 10.0


class Progress:
    """The state that the loop writes and a thread reports.

    Attributes:
        changes: Records written since the start.
    """

    def __init__(
        self, control: Control, say: Callable[[str], None], show: Callable[[int, int], None] = no_progress
    ) -> None:
        """Report through `control`, tell people through `say`, and once a second (done, total) of long work through `show`."""
        self.say = say
        self._show = show
        self.changes = 0
        self._control = control
        self._report = Report(NAME, phase="starting", live=True)
        self._facts: dict[str, int | str | list[str]] = {}
        self._warned: list[str] = []
        self._written = Written()
        self._beat_at = time.monotonic()
        self._cut_off: Callable[[], None] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._rate = _Rate()

    def start(self) -> None:
        """Report, before anything shows that capture runs but for one that does already, and go on with it every second.

        What is reported first is where the last one stood: a log that begins anew is to be above that (see `beginnings.new_epoch`).
        What it knew of tables that are captured no more holds until the catalogue was read: views show them as they were, whoever runs.
        """
        for report in self._reported():
            self._report = replace(self._report, version=report.version)
            self._facts["unpublished"] = report.facts.get("unpublished", [])
        if not self._another():
            self._send()
            self._flush()
        self._thread.start()

    def stop(self, error: HeadraceError | None = None) -> None:
        """Report the end, with its reason, and stop."""
        self._ended.set()
        self._thread.join(5.0)
        if not self._stands_by():
            self.phase("stopped" if error else "off", error)
            self._send()
        self._flush()

    def beat(self) -> None:
        """The loop goes round."""
        self._beat_at = time.monotonic()

    def now_ms(self) -> int:
        """Return the time, in ms since the Unix epoch."""
        return time.time_ns() // 1_000_000

    def phase(self, phase: str, error: HeadraceError | None = None, *, progress: tuple[int, int] = (0, 0)) -> None:
        """Say what capture does now, and why if it is not what it should do."""
        told = (error.message, error.code, error.remedy) if error else ("", "", "")
        self._report = replace(
            self._report, phase=phase, reason=told[0], code=told[1], remedy=told[2], progress=progress
        )

    def sealed(self, checkpoint: Checkpoint) -> None:
        """A checkpoint was committed."""
        self._report = replace(self._report, version=checkpoint.version)
        self._written.captured(checkpoint.version.lsn, checkpoint.commit_ts, self.now_ms())
        self._facts["inexact"] = list(checkpoint.inexact)
        self._facts["approximate"] = ", ".join(sorted(checkpoint.approximate))

    def fact(self, name: str, value: int | str | list[str]) -> None:
        """Add something to the report, `wal_held` for example: the bytes of WAL that the slot holds back."""
        self._facts[name] = value

    def failing(self, statements: list[str]) -> None:
        """Statements of the application fail or come without a key until these are run: say so once, and report it meanwhile [I1]."""
        for statement in statements:
            if statement not in str(self._facts.get("failing", "")):
                self.say(
                    "warning: UPDATE and DELETE of a captured table fail in Postgres as it is now, or come without its key (rule S8); "
                    f"run: {statement}"
                )
        self._facts["failing"] = "; ".join(statements)

    def warn(self, name: str, told: str) -> None:
        """Something in Postgres makes the application or the stream wait, as `told` says: say so once, and report it meanwhile; "" when
        nothing does."""
        if told and told != self._facts.get(name):
            self.say(f"warning: {told}")
        self._facts[name] = told

    def unpublished(self, tables: list[str]) -> None:
        """Tables that the log has are not published any more: say so once, and report it meanwhile."""
        for table in tables:
            if table not in self._warned:
                self.say(
                    f"warning: {table} is captured no more: it was renamed, dropped or taken out. See: headrace status"
                )
        self._facts["unpublished"] = self._warned = tables

    def wal(self, held: int, end: int) -> None:
        """The slot holds back so many bytes of WAL, which ends at `end` now."""
        self.fact("wal_held", held)
        self._written.seen(end, self.now_ms())

    @contextmanager
    def watching(self, cut_off: Callable[[], None]) -> Iterator[None]:
        """Call `cut_off`, once, when the loop has not gone round for ten seconds."""
        self.beat()
        self._cut_off = cut_off
        try:
            yield
        finally:
            self._cut_off = None

    def _run(self) -> None:
        while not self._ended.wait(1.0):
            self._watch()
            self._send()

    def _watch(self) -> None:
        cut_off = self._cut_off
        if cut_off is not None and time.monotonic() - self._beat_at > STALLED_SECONDS:
            self._cut_off = None
            cut_off()
            self.say(
                f"Capture has not come on for {STALLED_SECONDS:.0f} s, most likely because Kafka takes nothing: the replication connection "
                f"is closed, the slot keeps the WAL from {format_lsn(self._report.version.lsn)}. It goes on when what it waits for answers."
            )

    def _send(self) -> None:
        """Report; while Kafka is away there is nobody to report to, and that is no reason to stop."""
        self._show(*self._report.progress)
        lag = (0, *self._written.lag(self.now_ms()))
        report = replace(self._report, rate=self._rate.of(self.changes), lag=lag, facts=dict(self._facts))
        with suppress(HeadraceError):
            if not self._stands_by():
                self._control.report(report)

    def _stands_by(self) -> bool:
        """Whether another capture reports while this one waits for the slot: it is not to be reported over (S30)."""
        return self._report.code == "slot-active" and self._another()

    def _another(self) -> bool:
        return any(not each.gone and each.code != "slot-active" for each in self._reported())

    def _reported(self) -> list[Report]:
        with suppress(HeadraceError):
            return self._control.reports().get(NAME, [])
        return []

    def _flush(self) -> None:
        with suppress(HeadraceError):
            self._control.flush(2.0)


class Written:
    """How much WAL there is that the newest checkpoint does not cover, and since when."""

    def __init__(self) -> None:
        self._captured = 0
        self._current = 0
        self._end = 0
        self._seen = 0

    def captured(self, lsn: int, commit_ts: int, now: int) -> None:
        """A checkpoint at `lsn` was committed by `now`, ms; its last transaction was at `commit_ts`, by the source's clock.

        That may have been ahead for a while: nothing is up to date beyond now, or no lag would be seen until then.
        """
        self._captured = lsn
        self._current = max(self._current, min(commit_ts, now))

    def seen(self, end: int, now: int) -> None:
        """WAL ends at `end` at `now`, ms."""
        if self._captured >= self._end:
            self._current = max(
                self._current, self._seen
            )  # nothing was missing then, however long ago the last commit was
        self._end, self._seen = end, now

    def lag(self, now: int) -> tuple[int, float]:
        """Return the bytes that are missing, and for how many seconds the log has not been up to date."""
        if self._captured >= self._end:
            return 0, 0.0
        return self._end - self._captured, max(0.0, (now - self._current) / 1000) if self._current else 0.0


class _Rate:
    """Changes a second over the last few reports."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def of(self, changes: int) -> float:
        self._seen = [*self._seen[-4:], (time.monotonic(), changes)]
        (then, before), (now, after) = self._seen[0], self._seen[-1]
        return (after - before) / (now - then) if now > then else 0.0
