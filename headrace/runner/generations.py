"""The generations of one consumer: which the store holds, which is live, and the worker that serves each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from itertools import takewhile
from typing import Any

from headrace.consumer import Consumer, Generation
from headrace.control import Control
from headrace.effects import EffectConsumer, lost
from headrace.errors import HeadraceError, Misconfigured, Refused, Transient, as_ours
from headrace.log import Log
from headrace.parked import Shelf
from headrace.runner.another import check_not_of_another, check_stands
from headrace.runner.code import Code
from headrace.runner.parking import Lacking
from headrace.runner.worker import Worker

PAUSED, DROPPED = "paused", "dropped"
CALL_SECONDS = 120.0
_STANDING, _SHOWN = "standing", "shown"
_STATE_SECONDS = 15.0
_IDLE = frozenset({"stopped", "waiting"})


class Generations:
    """What one process has of a view.

    Attributes:
        code: What this process has of it.
        workers: By number; all that the store holds, and those that are being begun.
        standing: What somebody asked the view to stay: PAUSED or DROPPED, until asked otherwise; else empty. It is a record of
            control, so that it outlives this process.
        none: Stands for them while there is none.
        reads: The tables that the view reads, or ALL; none before the first look.
        unpromoted: Why the first build cannot be promoted, by its number: it says so itself until that succeeds.
        reporting: Held while what the workers say is written, so that nothing is said of a generation that is gone.
    """

    def __init__(self, log: Log, control: Control, name: str, consumer: type[Consumer]) -> None:
        """Prepare; the first `look` begins."""
        self.name = name
        self.workers: dict[int, Worker] = {}
        self.standing = ""
        self.code = Code(consumer, log.settings, name)
        self.make = self.code.make
        self.none = Generation(name, 0, "")
        self.reads: list[str] = []
        self._consumer = consumer
        self._log = log
        self._control = control
        self._shelf = Shelf(log)
        self.reporting = threading.Lock()
        self._remembers = self._tidy = self._unrecorded = self._headless = False
        self._listed: set[Worker] = set()
        self._shown: list[int] = []
        self._left: dict[int, int] = {}
        self._refused: set[int] = set()
        self._first: Future[None] | None = None
        self.unpromoted: dict[int, HeadraceError] = {}

    @cached_property
    def _store(self) -> Consumer:
        """Return one that serves nothing and is asked what there is; a plugin may raise anything."""
        return self.make()

    def look(self) -> None:
        """Look at the store, and begin what is missing: the first build too, unless the view is to stay dropped."""
        taken = self.code.fingerprint  # of the code as it was loaded, whatever is away
        self.none = Generation(self.name, 0, taken)
        if not self._remembers:
            kept, shown = self._control.kept(self.name, _STANDING, _SHOWN, committed=False)
            self.standing = kept.get("", {}).get("phase", "")
            self._shown = shown.get("", {}).get("generations", [])
            self._left = dict(shown.get("", {}).get("left", []))
            self._refused = set(shown.get("", {}).get("refused", []))
            self._unrecorded = not shown
            self._remembers = True
        self.reads = sorted(getattr(self._store, "tables", ()))
        held = {generation.number: generation for generation in self._store.generations()}
        if self._unrecorded:
            self._seed_shown(held)
        self._let_go(held)
        if self.standing != DROPPED:
            self.check_not_lost(held)
        if not self._tidy and (held or self.standing == DROPPED):
            # What a drop that was cut short has left. A store with nothing in it may be another one: there it is all of what is parked.
            self._shelf.clear(self.name, lambda number: number not in held and number not in self.workers)
        if self.standing == DROPPED:
            if held:
                check_stands(self._control, self.name, DROPPED)
            self.drop_all()
        else:
            self._serve(held)
        if not self._tidy:
            self._forget_lost()
            self._tidy = True
        self._note_live()

    def _let_go(self, held: dict[int, Generation]) -> None:
        """End who serves what the store has lost, where it applies nothing or has effects: as if that were lost while nobody ran it."""
        for number, worker in list(self.workers.items()):
            if worker in self._listed and number not in held and worker.is_alive():
                worker.generation = replace(worker.generation, live=False)
                if worker.still or worker.state.phase == "stopped" or issubclass(self._consumer, EffectConsumer):
                    self.end(worker)
                    with self.reporting:
                        del self.workers[number]
                    self._tidy = False
                    if held:  # else its number is not used again, and effects that were done are not to begin anew
                        self._unmark(number)

    def _serve(self, held: dict[int, Generation]) -> None:
        """Begin what the store holds and nothing serves, the first build when there is none."""
        stored = held
        if not held and not self.workers:
            number = self.next()
            held = {number: Generation(self.name, number, self.code.fingerprint)}
        for number in [each for each, worker in self.workers.items() if each not in held and not worker.is_alive()]:
            self.forget(number)  # who asked for the drop did not wait for so long
        for number, generation in held.items():
            worker = self.workers.get(number) or self.begin(generation)
            worker.generation = generation
        self._listed = {each for number, each in self.workers.items() if number in stored or each in self._listed}
        self._headless = not any(generation.live for generation in held.values())
        if not self._headless:
            self.unpromoted = {}
        elif held:
            self._promote_first()

    def _forget_lost(self) -> None:
        """Take away what was said of generations that are no more: their store was lost while nobody ran them, or a drop was cut short."""
        for report in self._control.reports().get(self.name, []):
            if report.generation and report.generation not in self.workers:
                self._control.forget(self.name, report.generation)

    def _note_live(self) -> None:
        """Keep which generations readers have seen, in their order up to the live one, and those that a rollback left, each with for which.

        It is a record of control, since not all that is older than the live one was ever live.
        """
        live = self.live()
        if live is not None:
            number = live.generation.number
            there = [each for each in self._shown if each in self.workers]
            shown = [*takewhile(lambda each: each != number, there), number]
            left = self._left | {each: number for each in there if each not in shown}
            left = {each: to for each, to in left.items() if each in self.workers and each not in shown}
            self._keep_shown(shown, left)

    def _seed_shown(self, held: dict[int, Generation]) -> None:
        """Take what is not newer than the live one for what readers have seen: an older headrace kept no record of it."""
        live = next((number for number, generation in held.items() if generation.live), 0)
        self._keep_shown(sorted(number for number in held if number <= live), {})
        self._unrecorded = False

    def refuse(self, number: int) -> None:
        """Keep that its gate has refused a build: it does not go live by itself."""
        self._keep_shown(self._shown, self._left, self._refused | {number})

    def _keep_shown(self, shown: list[int], left: dict[int, int], refused: set[int] | None = None) -> None:
        refused = (self._refused if refused is None else refused) & self.workers.keys() - set(shown)
        if (shown, left, refused) != (self._shown, self._left, self._refused):
            kept = {"generations": shown, "left": list(left.items()), "refused": sorted(refused)}
            self._control.keep(self.name, _SHOWN, kept)
            self._shown, self._left, self._refused = shown, left, refused

    def first_builds(self) -> list[int]:
        """Return the generations that show a state while, as of the last look, none is live."""
        return [] if self.live() else [worker.generation.number for worker in self._ready()]

    def _ready(self) -> list[Worker]:
        shows = [worker for worker in list(self.workers.values()) if worker.state.exact and not worker.still]
        return [worker for worker in shows if not isinstance(worker.state.error, Lacking)]

    def _promote_first(self) -> None:
        """Promote a generation that shows a state, when none is live: the first build; or, where the pointer or the live one was lost,
        what readers have seen last of those, else the newest; none that its gate refused or that a rollback left."""
        ready = {worker.generation.number: worker for worker in self._ready()}
        there = ready.keys() - self._left.keys() - self._refused
        if there and (self._first is None or self._first.done()):
            chosen = ready[next((each for each in reversed(self._shown) if each in there), max(there))]
            self._first = chosen.call(partial(self._promote_if_none_is, chosen))
            self._first.add_done_callback(partial(self._note_first, chosen.generation.number))
        elif ready and not there:
            said = f"No generation of {self.name} is live; this one is not made so: its gate refused it, or a rollback left it."
            remedy = f"Run: headrace promote {self.name} --generation {max(ready)}; or: headrace rebuild {self.name}"
            self.unpromoted = {max(ready): Misconfigured("not-by-itself", said, remedy)}

    def _promote_if_none_is(self, chosen: Worker, consumer: Consumer) -> None:
        """Promote it, in its thread: by when it comes to it somebody may have promoted another."""
        if self._headless and chosen in self._ready():
            chosen.promote(consumer)

    def _note_first(self, number: int, tried: Future[None]) -> None:
        """Keep what a person has to change; a Transient is why the worker waits."""
        error = tried.exception()
        failed = error is not None and not isinstance(error, Transient)
        self.unpromoted = {number: as_ours(error, self.name)} if error is not None and failed else {}

    def stay(self, phase: str) -> None:
        """Let the view stay so, also after a restart; empty: let it go on. A paused one stands when this returns.

        Raises:
            Transient: `kafka-away`, `worker-busy`.
        """
        self._control.keep(self.name, _STANDING, {"phase": phase} if phase else None)
        self.standing = phase
        if phase == PAUSED:
            self._pause()
            return
        for worker in self.workers.values():
            if worker.state.phase == PAUSED:
                worker.state.phase = "starting"
            worker.paused = False

    def _pause(self) -> None:
        """Let all stand, each if it can soon at the end of a state and with all shown: readers keep that for long.

        None is waited for before all are told: one that is busy does not keep the others from it.
        """
        stood = {n for n, each in self.workers.items() if each.paused or each.still or each.state.phase in _IDLE}
        for number, worker in self.workers.items():
            if number not in stood and worker.state.exact:
                # It says itself what it lacks, and what a plugin raises must not keep it from standing.
                with suppress(Exception):
                    worker.hold(CALL_SECONDS, _STATE_SECONDS)
            worker.paused = True
        errors: list[HeadraceError] = []
        until = time.monotonic() + CALL_SECONDS / 2  # who asks is to hear it
        for number, worker in self.workers.items():
            try:
                if worker.follows or (number not in stood and worker.state.phase != "waiting"):
                    self.wait_for(worker, lambda _consumer: None, max(0.0, until - time.monotonic()))
            except HeadraceError as error:
                if worker.follows or worker.state.phase != "waiting":  # it stands too
                    errors.append(error)
            finally:
                worker.release()
        if errors:
            why = errors[0]
            said = f"{why.message} {self.name} is recorded as paused, and stands as soon as that is over."
            raise type(why)(why.code, said, why.remedy)

    # Which

    def next(self) -> int:
        """Return the number of a new generation; when there is none, the one after what was reported last."""
        reported = [report.generation for report in self._control.reports().get(self.name, [])]
        return 1 + max(self.workers or reported, default=0)

    def live(self) -> Worker | None:
        """Return the worker of the generation that readers see."""
        return next((worker for worker in list(self.workers.values()) if worker.generation.live), None)

    def before(self, live: Worker) -> Worker | None:
        """Return the worker of the generation that readers saw before the live one, of those that are there."""
        before = list(takewhile(lambda each: each != live.generation.number, self._shown))
        return next((self.workers[each] for each in reversed(before) if each in self.workers), None)

    def left_for(self, number: int) -> int | None:
        """Return for which generation a rollback left this one; None when none did, or readers see it again."""
        return self._left.get(number)

    def was_shown(self, number: int) -> bool:
        """Return whether readers have ever seen a generation that is there."""
        return number in self._shown or number in self._left

    @property
    def hands_on(self) -> bool:
        """Whether a generation that is promoted takes over the place where the one before has stopped (`Consumer.moved`)."""
        return hasattr(self._consumer, "moved")

    def worker(self, number: int | None) -> Worker:
        """Return the worker of a generation, of the live one when None. Raises Misconfigured: `no-such-generation`."""
        worker = self.live() if number is None else self.workers.get(number)
        if worker is None:
            wanted = "no live generation" if number is None else f"no generation {number}"
            raise Misconfigured("no-such-generation", f"{self.name} has {wanted}.", "See: headrace status")
        return worker

    def refusal(self, worker: Worker) -> HeadraceError | None:
        """Return why a generation has stopped; of one of other code, which opens no reader, why that would be refused (I12).

        Raises:
            Transient: `kafka-away`.
        """
        if not worker.still or worker.opened is None:
            return worker.state.error if worker.state.phase == "stopped" else None
        with suppress(Misconfigured):
            try:
                self._log.reader(self._store.tables, worker.opened.copy()).close()
            except Refused as error:
                return error
        return None

    def check_not_lost(self, held: Collection[int] = ()) -> None:
        """Raise Transient `effects-lost` where effects that were done before would begin anew: nothing is `held` of them any more."""
        if self._shown and not held and not self.workers and issubclass(self._consumer, EffectConsumer):
            raise lost(self.name)

    def check_not_of_another(self) -> None:
        """Refuse to build beside a view of another source whose process runs. Raises Misconfigured: `view-of-another`."""
        live = self.live()
        check_not_of_another(self._log, self.name, [live] if live is not None else list(self.workers.values()))

    # Beginning and ending

    def begin_again(self) -> None:
        """Know nothing, as at the start: all have ended, and another process has run the view meanwhile."""
        with self.reporting:
            self.workers.clear()
        self._first, self.unpromoted, self._remembers, self._tidy = None, {}, False, False

    def begin(self, generation: Generation) -> Worker:
        """Serve a generation; one of other code stays still."""
        still = generation.fingerprint != self.code.fingerprint
        worker = Worker(self._log, self.make if still else self.code.make_same, generation, still=still)
        worker.paused = self.standing == PAUSED
        # A live one may have been killed before that was kept.
        worker.shown = generation.live or self.was_shown(generation.number)
        self.workers[generation.number] = worker
        worker.start()
        return worker

    def end(self, worker: Worker) -> None:
        """Serve a generation no more."""
        worker.stop()
        worker.join(CALL_SECONDS)

    def drop(self, number: int) -> None:
        """Drop a generation by its worker; one that has stopped answers nothing any more, so its store is opened anew."""
        worker = self.worker(number)
        if worker.state.phase != "stopped":
            self.wait_for(worker, worker.drop)
            self.end(worker)
        else:
            self.end(worker)
            for generation in self._store.generations():
                if generation.number == number:
                    self._drop_unserved(generation)
        self.forget(number)

    def check_free(self) -> None:
        """Check that the store answers, and that no generation is busy. Raises what the store raises; Transient: `worker-busy`."""
        self._store.generations()
        for worker in self.workers.values():
            if worker.state.phase not in _IDLE:
                self.wait_for(worker, lambda _consumer: None)

    def drop_all(self) -> None:
        """Drop what there is, the live one last: killed half way it leaves readers what they had."""
        for number in sorted(self.workers, key=lambda number: self.workers[number].generation.live):
            self.drop(number)
        for generation in sorted(self._store.generations(), key=lambda generation: generation.live):
            self._drop_unserved(generation)
            self.forget(generation.number)
        self._keep_shown([], {})

    def _drop_unserved(self, generation: Generation) -> None:
        consumer = self.make()
        try:
            consumer.open(generation)
            consumer.drop()
        finally:
            consumer.close()

    def forget(self, number: int) -> None:
        """Take away what was said of a generation, and what is parked of it."""
        with self.reporting:
            self.workers.pop(number, None)
            self.unpromoted = {each: error for each, error in self.unpromoted.items() if each != number}
            self._control.forget(self.name, number)
        self._shelf.clear(self.name, lambda each: each == number)
        self._unmark(number)

    def _unmark(self, number: int) -> None:
        """Keep no more of a number that is used again what readers saw of it."""
        left = {each: to for each, to in self._left.items() if each != number}
        self._keep_shown([each for each in self._shown if each != number], left)

    def wait_for(self, worker: Worker, function: Callable[[Consumer], Any], seconds: float | None = None) -> Any:
        """Return what `function(consumer)` returns in the worker's thread. Raises Transient: `worker-busy`; then it has not been begun,
        and is not, unless it is what takes so long."""
        future = worker.call(function)
        try:
            return future.result(CALL_SECONDS if seconds is None else seconds)
        except NoAnswer as error:
            future.cancel()
            raise Transient(
                "worker-busy", f"{worker.name} is busy ({worker.state.phase}).", "Try again; see headrace status"
            ) from error
