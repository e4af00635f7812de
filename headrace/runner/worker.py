"""A worker: one thread that serves one generation.

Its life is a circle: make the consumer, open the store, read on from the durable position, apply; at any Transient throw all of that
away, wait, and begin the circle again. Recovery from an error is so the same path as recovery from a crash, and there is no other.
What others want of the consumer (a promotion, a page of a scan) is queued and called between two batches, in this thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from headrace.change import NOWHERE, Position, Version, source_of
from headrace.consumer import Batch, Consumer, Generation
from headrace.effects import EffectConsumer
from headrace.errors import HeadraceError, Refused, Transient, Wiped, as_ours
from headrace.log import FeedReader, Lag, Log, Reader
from headrace.runner.held import check_held
from headrace.runner.parking import Parking, delayed, is_due, standing
from headrace.runner.rate import Rate

_POLL_SECONDS = 0.25
_BACKOFF_SECONDS = (0.5, 30.0)
_ANSWER_SECONDS = 0.1
_STEP_SECONDS = 0.005
_BEHIND_SECONDS = 5.0

T = TypeVar("T")
Make = Callable[[], Consumer]
Call = tuple[Callable[[Consumer], Any], "Future[Any]"]


@dataclass(slots=True)
class State:
    """What a worker says of itself; written by its thread, read by the runner.

    `version` is that of the view's position, `written` the broker's time of its checkpoint, ms; `held` what is parked or delayed holds
    tokens back to, `ahead` the newest state that the log had when the view was first opened, or that was begun to be applied since; `begun`
    when what is being applied, or the opening, was begun.
    """

    phase: str = "starting"
    version: Version = NOWHERE
    written: int = 0
    held: Version | None = None
    delayed: bool = False
    parked: int = 0
    ahead: Version = NOWHERE
    lag: Lag = field(default_factory=lambda: Lag(0, 0, 0.0))
    begun: float | None = None
    rate: float = 0.0
    progress: tuple[int, int] = (0, 0)
    inexact: tuple[str, ...] = ()
    error: HeadraceError | None = None

    @property
    def exact(self) -> bool:
        """Whether the generation is at a state that Postgres had."""
        return self.version != NOWHERE

    @property
    def reached(self) -> Version:
        """The version up to which readers see everything: what tokens, status and verify go by (S25)."""
        return self.version if self.held is None else min(self.version, self.held)

    @property
    def behind(self) -> float:
        """For how many seconds the view has not been up to date; what is being applied is not shown yet, however long that takes."""
        begun = self.begun
        return self.lag.seconds + (time.monotonic() - begun if begun is not None else 0.0)

    @property
    def shown(self) -> Version:
        """The version of the state that the view is, no row of it newer or older; NOWHERE while that is not certain.

        What is delayed is older. An error or a kill between a view's rows and its position [I7] leaves rows that are newer than the
        position says. None is when the view has come to what was begun, and to what the log had when it was first opened.
        """
        return self.version if self.version >= self.ahead and not self.delayed else NOWHERE


class Worker(threading.Thread):
    """Serves one generation until stopped.

    Attributes:
        state: How it stands.
        still: It only answers calls and applies nothing: the generation is of other code than the process's.
        paused: So it is for now, because somebody asked for it. Afterwards the view is opened anew, so that a position that has grown
            too old meanwhile is refused (S19).
        shown: Readers have seen it, as far as is known.
        follows: It reads, and applies what comes, also while its phase is yet that of the wait before.
        opened: The position that readers saw the view at when it was opened; as it is while still.
    """

    def __init__(
        self, log: Log, make: Make, generation: Generation, *, still: bool = False, until: Version | None = None
    ) -> None:
        """Prepare; `start` begins. It reads no further than the checkpoint at `until`."""
        super().__init__(name=f"{generation.consumer}-g{generation.number}", daemon=True)
        self.generation = generation
        self.still, self.paused, self.shown, self.follows = still, False, False, False
        self.state = State()
        self.opened: Position | None = None
        self._log = log
        self._make = make
        self._calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._until = until
        self._parking = Parking(log, generation)
        self._stood: Position | None = None
        self._hold_until, self._hold_whole = 0.0, False
        self._whole, self._moved, self._held = True, False, False
        self._rate = Rate()

    # What the runner's thread calls

    def call(self, function: Callable[[Consumer], T]) -> Future[T]:
        """Have `function(consumer)` called in the worker's thread between two batches."""
        future: Future[T] = Future()
        self._calls.put((function, future))
        return future

    def hold(self, seconds: float, patience: float, *, whole: bool = True) -> Version:
        """Stop at the end of a complete state; return its version. It goes on after `seconds`, or when released.

        Not `whole`, it stops between the pieces of one too, which nobody sees of a view, and what is returned is `seen`. Asked again
        while it stands, it stands for so long from then on.

        Raises:
            Transient: `does-not-hold`, within `patience` seconds; or why it waits.
        """
        deadline = time.monotonic() + patience
        try:
            while True:
                self.stand(patience + seconds, whole=whole)
                version = self.call(self._stands).result(max(0.0, deadline - time.monotonic()))
                if version is not None:
                    self.stand(seconds, whole=whole)
                    return version
                time.sleep(_STEP_SECONDS)
        except NoAnswer as error:
            self.release()
            what = "come to the end of a state" if whole else "end the step that it is in"
            said = f"{self.name} ({self.state.phase}) did not {what} in {patience:.0f} s."
            raise Transient("does-not-hold", said, "Try again; see headrace status") from error
        except HeadraceError:
            self.release()
            raise

    def stand(self, seconds: float, *, whole: bool = False) -> None:
        """Apply nothing for so long from now, but what ends a state if that is to be; also when it waits, and comes back meanwhile."""
        self._hold_whole, self._hold_until = whole, time.monotonic() + seconds

    @property
    def seen(self) -> Version:
        """What readers may have seen, also of one that reloads its local rows: nobody sees pieces.

        An error or a kill between a state's rows and its position leaves rows that are newer: of what was begun; of what another process
        has begun nothing is known but what the log had.
        """
        return max(self.state.version, self.opened.version if self.opened else NOWHERE, self.state.ahead)

    def unpark(self, consumer: Consumer, function: Callable[[Consumer, Parking, Position], T]) -> T | None:
        """Return what `function` does with what is parked, in this thread, at a complete state; None within one, when it is not called."""
        self.hurry(consumer)  # what is poison of the rest is parked as ever
        if self._stood is None:
            return None
        done = function(consumer, self._parking, self._stood)
        self._set_held(consumer)
        return done

    def _stands(self, consumer: Consumer) -> Version | None:
        """Return what is `seen`, of a whole state all is shown; None within one that is to be ended first."""
        self.hurry(consumer)
        return self.seen if self._whole or not self._hold_whole else None

    def hurry(self, consumer: Consumer) -> None:
        """Show what is delayed, in this thread, if the view stands at a complete state and applies anything at all."""
        if self._stood is not None and self.state.delayed and not self._resting:
            self._apply(consumer, standing(self._stood.copy(), hurry=True))

    def promote(self, consumer: Consumer) -> None:
        """Let readers see it, in this thread; where that has moved its position it is opened anew, and is at nothing until then (S25)."""
        self.shown = True
        consumer.promote()
        if getattr(consumer, "moved", False):
            self._moved = True
            self._set(version=NOWHERE, ahead=NOWHERE)

    def drop(self, consumer: Consumer) -> None:
        """Drop the generation, in this thread, and end: else it would be built again, where who asked did not wait for so long."""
        consumer.drop()
        self.stop()
        self._set(phase="stopped", version=NOWHERE)

    def release(self) -> None:
        """Go on after `hold`."""
        self._hold_until = 0.0

    def stop(self) -> None:
        """Ask the thread to end after the batch in work."""
        self._stopping.set()

    # The thread

    def run(self) -> None:
        """Serve, and begin again after every Transient."""
        wait = _BACKOFF_SECONDS[0]
        while not self._stopping.is_set():
            try:
                self._serve()
            except Exception as failure:  # noqa: BLE001  a plugin may raise anything; the reason must reach status, not only a log
                error = as_ours(failure, self.generation.consumer)
                if not isinstance(error, Transient):
                    self._halt(error)
                    continue
                if isinstance(error, Wiped):
                    self.opened = None  # before it is opened anew: nobody may take it for what it was
                    self._set(version=NOWHERE, ahead=NOWHERE)
                wait = _BACKOFF_SECONDS[0] if self.state.phase != "waiting" else min(2 * wait, _BACKOFF_SECONDS[1])
                self._set(phase="waiting", error=error)
                self._answer_nothing(wait, error)
        self._answer_nothing(0.0, Transient("worker-busy", f"{self.name} has ended.", "Try again; see headrace status"))

    def _serve(self) -> None:
        consumer = self._make()
        consumer.progress, self.state.progress = self._progress, (0, 0)
        try:
            if (self.still and self.state.error) or (self._held and isinstance(consumer, EffectConsumer)):
                check_held(consumer, self.generation)
            self.state.begun = time.monotonic()
            position, resting, self._held = consumer.open(self.generation), self._resting, True
            self.state.begun = None
            self.opened = getattr(consumer, "shows", None) or position
            position = self.opened if resting else position
            known = position or Position()
            self._stood, self._moved = None, False
            self._parking.open(consumer, position)
            self._set_held(consumer)  # before the version, which it bounds
            self._set(version=known.version, written=known.appended, inexact=known.inexact)
            if resting:
                self._set(phase="stale" if self.still else "paused", error=None)
                self._rest(consumer, lambda: self._resting and not self._moved)
                return
            try:
                self._read(consumer, position)
            except Refused as error:
                kept = self.shown and getattr(consumer, "shows", None)  # None after a wipe
                # One of another HEADRACE_SOURCE may be what its process builds.
                sources = set(map(source_of, (self.opened or known).topics)) - {self._log.settings.source}
                other = sources and error.code == "position-of-another-source"
                if kept or other or self.generation.live or self.state.exact:
                    raise
                # Nobody sees this build: where it makes no sense, or stood still for too long, it begins again from zero (S19).
                consumer.drop()
                raise Wiped(error.code, error.message, "The build begins again from zero by itself.") from error
        finally:
            self._whole, self.follows, self.state.begun = True, False, None  # pieces are gone
            consumer.close()

    def _read(self, consumer: Consumer, position: Position | None) -> None:
        group = f"{self.generation.consumer}.g{self.generation.number}"
        reader = self._log.reader(consumer.tables, position, group, self._until)
        if isinstance(reader, Reader) and reader.newest and self.state.ahead == NOWHERE:
            self._set(ahead=reader.newest.version)  # what a process before this one may have begun
        try:
            self._parking.check(consumer)  # after the reader: that a view is of another log comes first
            self._follow(consumer, reader)
        finally:
            reader.close()

    def _follow(self, consumer: Consumer, reader: Reader | FeedReader) -> None:
        self._stood = reader.position.copy() if _at_a_state(reader) else None
        self._whole = self._stood is not None or not self.state.delayed
        self.follows, mirrored = True, 0.0
        while not self._stopping.is_set():
            self._answer(consumer)
            if self._resting or self._moved or self._stopping.is_set():
                return
            if (self._whole or not self._hold_whole) and time.monotonic() < self._hold_until:
                if self.state.phase == "waiting":
                    self._tell(consumer, reader)
                time.sleep(_STEP_SECONDS)
                continue
            batch = reader.poll(_POLL_SECONDS if self._calls.empty() else 0.0)
            if batch is None and self._stood is not None and is_due(consumer):
                batch = standing(self._stood.copy())
            if batch is not None:
                self._apply(consumer, batch)
            self._tell(consumer, reader)
            if time.monotonic() - mirrored > 1.0:
                reader.mirror()
                mirrored = time.monotonic()

    def _apply(self, consumer: Consumer, batch: Batch) -> None:
        self._set(begun=time.monotonic(), ahead=max(self.state.ahead, batch.position.version))
        try:
            self._parking.apply(consumer, batch)
        finally:
            self.state.begun = None
        self._whole = batch.checkpoint is not None
        self._stood = batch.position if self._whole else None
        self._rate.add(len(batch.changes))
        self._set_held(consumer)

    @property
    def _resting(self) -> bool:
        return self.still or self.paused

    def _rest(self, consumer: Consumer, resting: Callable[[], bool]) -> None:
        while resting() and not self._stopping.wait(0.05 if self._calls.empty() else 0.0):
            self._answer(consumer)

    def _answer(self, consumer: Consumer) -> None:
        """Do what has been asked; an error goes to who asked, and to the worker only when the store is away or wiped.

        A scan asks for its next page in its turn: so this ends after a while, and the worker reads on.
        """
        until = time.monotonic() + _ANSWER_SECONDS
        while not self._calls.empty() and time.monotonic() < until:
            function, future = self._calls.get()
            if not future.set_running_or_notify_cancel():
                continue  # who asked has been told that it is not done
            try:
                future.set_result(function(consumer))
            except Transient as error:
                future.set_exception(error)
                raise
            except Exception as error:  # noqa: BLE001  whatever it is, it belongs to who asked
                future.set_exception(error)

    def _answer_nothing(self, seconds: float, error: HeadraceError) -> None:
        """Wait without a consumer: whoever asks gets the reason."""
        deadline = time.monotonic() + seconds
        while True:
            while not self._calls.empty():
                _, future = self._calls.get()
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            if time.monotonic() >= deadline or self._stopping.wait(0.05):
                return

    def _halt(self, error: HeadraceError) -> None:
        """Stay stopped, with the reason in status. A refused view can still be read, so it still answers; one that is moved goes on."""
        self._stood, self._moved = None, False
        self._set(error=error, phase="stopped")  # no report may tell of the one without the other
        while not self._stopping.is_set() and not self._moved:
            if isinstance(error, Refused):
                self._answer_still(error)
            else:
                self._answer_nothing(3600.0, error)

    def _answer_still(self, error: HeadraceError) -> None:
        try:
            with closing(self._make()) as consumer:
                check_held(consumer, self.generation)
                consumer.open(self.generation)
                if shows := getattr(consumer, "shows", None):
                    self._set_held(consumer)
                    self._set(version=shows.version, written=shows.appended, inexact=shows.inexact)
                self._rest(consumer, lambda: not self._moved)
        except Exception:  # noqa: BLE001  a plugin may raise anything; why it was refused is what matters
            self._answer_nothing(_BACKOFF_SECONDS[1], error)

    def _tell(self, consumer: Consumer, reader: Reader | FeedReader) -> None:
        self._set_held(consumer)
        lag, at = reader.lag(), reader.position
        live = "live" if self.generation.live else "following"
        phase = "loading" if at.version == NOWHERE else "catching up" if lag.seconds > _BEHIND_SECONDS else live
        progress = (0, 0) if at.version != NOWHERE else self.state.progress
        self._set(phase=phase, version=at.version, written=at.appended, lag=lag)
        self._set(progress=progress, inexact=at.inexact, error=None)

    def _set_held(self, consumer: Consumer) -> None:
        """Take in what holds tokens back: what is parked, and what the consumer delays (S25)."""
        before = delayed(consumer)
        held = min((each for each in (self._parking.held, before) if each is not None), default=None)
        self._set(held=held, delayed=before is not None, parked=self._parking.count)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self.state, name, value)
        self.state.rate = self._rate.now()

    def _progress(self, done: int, total: int) -> None:
        self.state.progress = (done, total)


def _at_a_state(reader: Reader | FeedReader) -> bool:
    """Whether the position that was opened ends a state; where more is to come that is not known."""
    if isinstance(reader, FeedReader):
        return not reader.position.loading
    return reader.newest is not None and reader.newest.version == reader.position.version
