"""The runner of one consumer: its generations, what is asked of it, and what it says of itself.

It looks at the store once a second (which generations there are, which is live), serves each generation of its own code by a
worker, keeps those of other code readable and still, promotes the first generation of a view by itself, and does nothing else
unasked. Requests come through `headrace.control` and are carried out one at a time (S30).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from contextlib import suppress
from dataclasses import replace
from typing import Any

from headrace.change import NOWHERE, Version
from headrace.consumer import Consumer, Cursor, Generation, ViewRow, no_progress
from headrace.control import PAGE_BYTES, Control, Report, Request, refusal
from headrace.errors import HeadraceError, Misconfigured, Refused, Transient
from headrace.fingerprint import fingerprint
from headrace.log import Log
from headrace.runner.worker import State, Worker, as_ours

_HOLD_SECONDS = 30.0
_CALL_SECONDS = 120.0
_STOP_SECONDS, _FLUSH_SECONDS = 6.0, 2.0
_FIRST_ROWS, _MOST_ROWS = 10, 500


class Runner:
    """Runs one consumer."""

    def __init__(self, log: Log, control: Control, name: str, consumer: type[Consumer]) -> None:
        """Prepare; the first `tick` begins."""
        self.name = name
        self._log = log
        self._control = control
        self._make: Callable[[], Consumer] = lambda: _made(consumer, log, name)
        self._fingerprint = fingerprint(consumer)
        self._store = self._make()
        self._workers: dict[int, Worker] = {}
        self._failure: HeadraceError | None = None
        self._placeholder = True
        self._reporting = threading.Lock()
        self._reported = time.monotonic()
        self._ended = False
        self._first: Future[None] | None = None
        self._verbs = {
            "rebuild": self._rebuild,
            "promote": self._promote_asked,
            "rollback": self._rollback,
            "drop": self._drop,
            "scan": self._scan,
            "rows": self._rows,
        }

    def look(self) -> None:
        """Look at the store, and begin what is missing. Called about once a second; what it fails by is in the report."""
        try:
            self._look()
            self._failure = None
        except Exception as error:  # noqa: BLE001  a plugin may raise anything; the consumers beside it go on
            self._failure = as_ours(error, self.name)

    def report(self, not_since: float = 0.0) -> None:
        """Say how each generation stands, if that was not said in the last `not_since` seconds; with Kafka away nobody hears it.

        Called about once a second, from any thread.
        """
        with self._reporting, suppress(HeadraceError):
            if time.monotonic() - self._reported < not_since:
                return
            self._reported = time.monotonic()
            for worker in list(self._workers.values()):
                self._control.report(self._report(worker.generation, worker.state))
            self._report_placeholder()

    def _report_placeholder(self) -> None:
        """Until the store has said which generations there are, generation 0 stands for them; then its report goes."""
        if not self._workers and self._failure:
            phase = "waiting" if isinstance(self._failure, Transient) else "stopped"
            state = State(phase=phase, error=self._failure)
            self._control.report(self._report(Generation(self.name, 0, self._fingerprint), state))
            self._placeholder = True
        elif self._workers and self._placeholder:
            self._control.forget(self.name, 0)  # a predecessor's too
            self._placeholder = False

    def handle(self, request: Request) -> None:
        """Carry out a request and answer it; one whose asker has given up is only taken away."""
        with suppress(Transient):  # with Kafka away nobody hears it
            if request.given_up:
                self._control.take_away(self.name, request)
            else:
                self._control.answer(self.name, request, self._carried_out(request))

    def _carried_out(self, request: Request) -> dict[str, Any]:
        verb = self._verbs.get(request.verb)
        if verb is None:
            return refusal(
                Misconfigured(
                    "unknown-request",
                    f"The runner of {self.name} does not know {request.verb!r}.",
                    "Use one version of headrace.",
                )
            )
        try:
            return verb(request)
        except Exception as error:  # noqa: BLE001  whatever it is, it belongs to who asked
            return refusal(as_ours(error, self.name))

    def phases(self) -> dict[str, str]:
        """Return the phase of each generation, with its reason, for a line to people when it changes."""
        return {
            worker.name: f"{worker.state.phase}: {worker.state.error}" if worker.state.error else worker.state.phase
            for worker in self._workers.values()
        }

    def failed(self) -> HeadraceError | None:
        """Return why nothing of this consumer runs or waits any more, None while something does."""
        if not self._workers:
            return None if isinstance(self._failure, Transient) else self._failure
        errors = [worker.state.error for worker in self._workers.values() if worker.state.phase == "stopped"]
        final = [error for error in errors if error is not None and not isinstance(error, Refused)]
        return final[0] if final and len(final) == len(self._workers) else None

    def stop(self) -> None:
        """End every worker and say so. Whoever waits for a server that is away is left behind: it has promised nothing yet [I7]."""
        deadline = time.monotonic() + _STOP_SECONDS
        for worker in self._workers.values():
            worker.stop()
        for worker in self._workers.values():
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.state.phase != "stopped":
                worker.state.phase = "off"
        self._ended = True
        self.report()
        with suppress(Transient):  # with Kafka away the last report just grows old
            self._control.flush(_FLUSH_SECONDS)

    # Generations

    def _look(self) -> None:
        held = {generation.number: generation for generation in self._store.generations()}
        if not held and not self._workers:
            number = 1 + max((report.generation for report in self._control.reports().get(self.name, [])), default=0)
            held = {number: Generation(self.name, number, self._fingerprint)}
        for number, generation in held.items():
            if number in self._workers:
                self._workers[number].generation = generation
            else:
                self._begin(generation)
        if held and not any(generation.live for generation in held.values()):
            self._promote_first()

    def _begin(self, generation: Generation) -> Worker:
        still = generation.fingerprint != self._fingerprint
        worker = Worker(self._log, self._make, generation, still=still)
        self._workers[generation.number] = worker
        worker.start()
        return worker

    def _end(self, worker: Worker) -> None:
        worker.stop()
        worker.join(_CALL_SECONDS)

    def _promote_first(self) -> None:
        """Promote the newest generation that shows a state, when none is live: the first build, or after a wipe."""
        ready = [worker for worker in self._workers.values() if worker.state.exact and not worker.still]
        if ready and (self._first is None or self._first.done()):
            newest = max(ready, key=lambda worker: worker.generation.number)
            self._first = newest.call(lambda consumer: consumer.promote())

    def _live(self) -> Worker | None:
        return next((worker for worker in self._workers.values() if worker.generation.live), None)

    def _worker(self, number: int | None) -> Worker:
        worker = self._live() if number is None else self._workers.get(number)
        if worker is None:
            wanted = "no live generation" if number is None else f"no generation {number}"
            raise Misconfigured("no-such-generation", f"{self.name} has {wanted}.", "See: headrace status")
        return worker

    # Verbs

    def _rebuild(self, _request: Request) -> dict[str, Any]:
        """Begin the next generation, or go on with the one that is being built, also when it has stopped.

        Only one that may not go on, because its position makes no sense, is left as it is.
        """
        live = self._live()
        newest = max(self._workers, default=0)
        building = self._workers.get(newest)
        if building is None or building is live or building.still or (live and newest < live.generation.number):
            building = self._begin(Generation(self.name, newest + 1, self._fingerprint))
        elif building.state.phase == "stopped":
            self._end(building)
            refused = isinstance(building.state.error, Refused)
            building = self._begin(replace(building.generation, number=newest + 1 if refused else newest))
        return {"generation": building.generation.number}

    def _promote_asked(self, request: Request) -> dict[str, Any]:
        live = self._live()
        number = request.args.get("generation")
        newer = [n for n in self._workers if live is None or n > live.generation.number]
        if number is None and not newer:
            raise Misconfigured(
                "nothing-to-promote", f"{self.name} has no newer generation.", f"Run: headrace rebuild {self.name}"
            )
        return self._switch(self._worker(number or max(newer)), stale=False)

    def _rollback(self, request: Request) -> dict[str, Any]:
        live = self._worker(None)
        older = [n for n in self._workers if n < live.generation.number]
        if not older:
            raise Misconfigured(
                "nothing-to-roll-back-to",
                f"{self.name} has no generation before {live.generation.number}.",
                "See: headrace status",
            )
        return self._switch(self._workers[max(older)], stale=bool(request.args.get("stale")))

    def _switch(self, target: Worker, *, stale: bool) -> dict[str, Any]:
        """Move the store's pointer so that no reader goes back in time: the old one stops at L, the new one reaches L (S24)."""
        live = self._live()
        if live is target:
            return {"generation": target.generation.number, "version": list(target.state.version)}
        if not target.state.exact:
            raise Misconfigured(
                "not-caught-up",
                f"{target.name} is still {target.state.phase}.",
                "Wait; headrace status --watch shows it.",
            )
        try:
            if not stale:
                self._meet(live, target)
            self._wait_for(target, lambda consumer: consumer.promote())
        finally:
            if live is not None:
                live.release()
        self.look()
        self.report()
        return {"generation": target.generation.number, "version": list(target.state.version)}

    def _meet(self, live: Worker | None, target: Worker) -> None:
        held = NOWHERE
        if live is not None and live.is_alive() and live.state.phase not in {"stopped", "waiting"}:
            held = live.hold(_HOLD_SECONDS)
        elif live is not None:
            held = live.state.version
        if target.still and target.state.version < held:
            raise _behind(target, held)
        deadline = time.monotonic() + _HOLD_SECONDS
        while target.state.version < held:
            if time.monotonic() > deadline:
                raise _behind(target, held)
            time.sleep(0.005)

    def _drop(self, request: Request) -> dict[str, Any]:
        live = self._live()
        number = request.args.get("generation")
        if live is not None and number == live.generation.number:
            raise Misconfigured(
                "drops-the-live-one", f"Generation {number} of {self.name} is live.", "Promote another first."
            )
        if number is None and live is None:
            raise Misconfigured(
                "no-such-generation", f"{self.name} has no live generation to keep.", "Name the generation to drop."
            )
        wanted = [number] if number is not None else [n for n in self._workers if live and n < live.generation.number]
        for each in wanted:
            self._remove(self._worker(each))
            with self._reporting:
                del self._workers[each]
                self._control.forget(self.name, each)
        return {"dropped": wanted}

    def _remove(self, worker: Worker) -> None:
        """Drop a generation by its worker; one that has stopped answers nothing any more, so its store is opened anew."""
        if worker.state.phase != "stopped":
            self._wait_for(worker, lambda consumer: consumer.drop())
            self._end(worker)
            return
        self._end(worker)
        if worker.generation.number in {generation.number for generation in self._store.generations()}:
            consumer = self._make()
            try:
                consumer.open(worker.generation)
                consumer.drop()
            finally:
                consumer.close()

    def _scan(self, request: Request) -> dict[str, Any]:
        worker = self._worker(request.args.get("generation"))
        self._send_page(worker, request, None, _FIRST_ROWS)
        return {"rows": request.id, "generation": worker.generation.number}

    def _rows(self, request: Request) -> dict[str, Any]:
        """Send single rows by their keys, and answer the version of the state that they are, NOWHERE when that is not certain."""
        worker = self._worker(request.args.get("generation"))
        keys = request.args["keys"]
        rows, version = self._wait_for(worker, lambda consumer: (_named(consumer, keys), worker.state.shown))
        self._control.send_rows(request, rows, last=True)
        return {"rows": request.id, "version": list(version)}

    def _send_page(self, worker: Worker, request: Request, after: Cursor | None, limit: int) -> None:
        """Queue the next rows of a scan; whatever becomes of them is told to who reads them."""
        sent = worker.call(lambda consumer: self._page(worker, consumer, request, after, limit))
        sent.add_done_callback(lambda done: self._tell_failure(request, done))

    def _page(self, worker: Worker, consumer: Consumer, request: Request, after: Cursor | None, limit: int) -> None:
        """Send some rows and queue the next, so that the worker reads on between them: fewer at once where rows are large."""
        rows = consumer.scan(after, limit)
        size = self._control.send_rows(request, rows, last=len(rows) < limit)
        if len(rows) == limit:
            fit = PAGE_BYTES * limit // max(size, 1)
            last = (rows[-1].collection, rows[-1].key)
            self._send_page(worker, request, last, min(max(fit, 1), _MOST_ROWS))

    def _tell_failure(self, request: Request, done: Future[None]) -> None:
        error = done.exception()
        if error is not None:
            self._control.break_off(request, as_ours(error, self.name))

    def _wait_for(self, worker: Worker, function: Callable[[Consumer], Any]) -> Any:
        try:
            return worker.call(function).result(_CALL_SECONDS)
        except NoAnswer as error:
            raise Transient(
                "worker-busy", f"{worker.name} is busy ({worker.state.phase}).", "Try again; see headrace status"
            ) from error

    def _report(self, generation: Generation, state: State) -> Report:
        error = state.error
        return Report(
            name=self.name,
            generation=generation.number,
            fingerprint=generation.fingerprint,
            live=generation.live,
            phase=state.phase,
            version=state.version,
            lag=(state.lag.records, state.lag.wal, state.lag.seconds),
            rate=round(state.rate, 1),
            eta=round(state.lag.records / state.rate, 1) if state.rate and state.lag.records else -1.0,
            progress=state.progress,
            reason=error.message if error else self._stale_reason(state),
            code=error.code if error else "",
            remedy=error.remedy if error else "",
            facts=self._facts(state),
            ended=self._ended,
        )

    def _facts(self, state: State) -> dict[str, Any]:
        inexact = {"inexact": list(state.inexact)} if state.inexact else {}
        return inexact | ({"checkpoints": "none"} if self._log.fed_by_debezium else {})

    def _stale_reason(self, state: State) -> str:
        return f"built by other code: run headrace rebuild {self.name}" if state.phase == "stale" else ""


def _made(consumer: type[Consumer], log: Log, name: str) -> Consumer:
    made = consumer(log.settings, name)
    made.progress = no_progress
    return made


def _behind(target: Worker, wanted: Version) -> Misconfigured:
    return Misconfigured(
        "generation-behind",
        f"{target.name} is at {target.state.version}, readers have seen {wanted}: they would go back in time.",
        "Use rollback --stale to accept that, or rebuild.",
    )


def _named(consumer: Consumer, keys: list[tuple[str, str]]) -> list[ViewRow]:
    """Return the rows of some keys: by the consumer's own `get`, else by a scan from just before each."""
    if get := getattr(consumer, "get", None):
        return list(get(keys))
    found = [row for collection, key in keys for row in consumer.scan((collection, _just_before(key)), 1)]
    wanted = {(collection, key) for collection, key in keys}
    return [row for row in found if (row.collection, row.key) in wanted]


def _just_before(key: str) -> str:
    """Return a text that sorts before `key`, and after every key that does."""
    last = max(ord(key[-1:] or "\0") - 1, 0)
    last = _LAST_BEFORE_SURROGATES if _LAST_BEFORE_SURROGATES < last < _FIRST_AFTER_SURROGATES else last
    return f"{key[:-1]}{chr(last)}\U0010ffff" if key else key


_LAST_BEFORE_SURROGATES, _FIRST_AFTER_SURROGATES = 0xD7FF, 0xE000
