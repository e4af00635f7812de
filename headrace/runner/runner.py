"""The runner of one consumer: what is asked of it, and what it says of itself.

It looks at the store once a second (which generations there are, which is live), serves each generation of its own code by a
worker, keeps those of other code readable and still, promotes the first generation of a view by itself, and does nothing else
unasked. Requests come through `headrace.control` and are carried out one at a time (S30).
"""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from typing import Any

from headrace.change import format_lsn
from headrace.consumer import Consumer, Generation
from headrace.control import DEAD_SECONDS, LEAVE, Control, Report, refusal
from headrace.errors import HeadraceError, Misconfigured, Refused, Transient, as_ours
from headrace.log import Log
from headrace.requests import Request
from headrace.runner.another import check_alone
from headrace.runner.generations import DROPPED, PAUSED, Generations
from headrace.runner.rate import seconds_left
from headrace.runner.rows import Rows
from headrace.runner.unparking import Unparking
from headrace.runner.verbs import Verbs
from headrace.runner.worker import State

_STOP_SECONDS, _FLUSH_SECONDS = 5.0, 1.0
_ASK_SECONDS = 5.0  # all of control is read for that
_TAKEN_OVER = {"view-taken-over", "writer-taken-over"}
"""Who is stopped by these has no more part in a view that runs, whichever generation it was: waiters would believe either process (S30)."""
_MEANWHILE = {"pause", "resume"}


class Runner:
    """Runs one consumer."""

    def __init__(self, log: Log, control: Control, name: str, consumer: type[Consumer]) -> None:
        """Prepare; the first `look` begins."""
        self.name = name
        self.generations = Generations(log, control, name, consumer)
        self._log = log
        self._control = control
        self._failure: HeadraceError | None = None
        self._placeholder = True
        self._reported, self._heard = _elapsed(), time.monotonic()
        self._asks = 0.0
        self._answered = False
        self._ended = False
        self._process = uuid.uuid4().hex
        rows = self._rows = Rows(self.generations, control)
        verbs = Verbs(self.generations, self._tell)
        parked = Unparking(self.generations, self._tell)
        self._verbs = verbs.verbs | {"scan": rows.scan, "rows": rows.some, "count": rows.count, "why": rows.why}
        self._verbs |= {"retry": parked.retry, "drop-parked": parked.drop}

    def look(self) -> None:
        """Look at the store, and begin what is missing. Called about once a second; what it fails by is in the report.

        Where another process has taken a generation over, all of the view is its, as long as one runs it: then everything here ends.
        """
        if self._stood() and not self._is_alone():
            return
        if self._taken_over():
            for worker in self.generations.workers.values():
                worker.stop()
            if not self._is_free():
                return
            self.generations.begin_again()
            self._reported = _elapsed()  # nobody else runs it: that is known
        try:
            self.generations.look()
            self._failure = None
        except Exception as error:  # noqa: BLE001  a plugin may raise anything; the consumers beside it go on
            self._failure = as_ours(error, self.name)

    def _stood(self) -> bool:
        """Whether this process has said nothing for so long that all took it for dead: it was frozen, say."""
        return _elapsed() - self._reported > DEAD_SECONDS and not (self._ended or self._taken_over())

    def _is_alone(self) -> bool:
        """Find out, after it has stood, whether another process has taken the view over meanwhile; until that is known it does nothing.

        What is paused, dropped or of other code writes nothing to its store, and so would never notice.
        """
        try:
            check_alone(self._control, self.name, self._process)
        except HeadraceError as error:
            self._failure = error
            return not isinstance(error, Transient)
        self._reported = _elapsed()
        return True

    def _is_free(self) -> bool:
        """Whether nobody runs a view that was taken over: two may have taken each other's generations, or the other has ended.

        Who does not say that he ends is not heard for long enough by Kafka that answers: while that is away nobody is heard.
        """
        if time.monotonic() < self._asks:
            return False
        heard, answered = True, False
        if not any(worker.is_alive() for worker in self.generations.workers.values()):
            with suppress(HeadraceError):
                said = self._control.reports().get(self.name, [])
                if said and all(report.ended for report in said):
                    return True
                heard, answered = any(report.heard for report in said), True
        now = time.monotonic()  # Kafka may have taken its time, and who runs it is heard again only after us
        self._asks = now + _ASK_SECONDS
        if heard or not self._answered:
            self._heard = now
        self._answered = answered
        return now - self._heard > DEAD_SECONDS

    def _tell(self) -> None:
        self.look()
        self.report()

    def report(self, not_since: float = 0.0) -> None:
        """Say how each generation stands, if that was not said in the last `not_since` seconds; with Kafka away nobody hears it.

        Called about once a second, from any thread.
        """
        with self.generations.reporting, suppress(HeadraceError):
            if self._taken_over() or self._stood() or _elapsed() - self._reported < not_since:
                return
            self._reported = _elapsed()
            for worker in list(self.generations.workers.values()):
                self._control.report(self._report(worker.generation, worker.state))
            self._report_placeholder()

    def _report_placeholder(self) -> None:
        """Until the store has said which generations there are, generation 0 stands for them; then its report goes.

        It stands for a view that is dropped, too; but a process that ends beside another which runs the view says nothing of it.
        """
        workers, dropped = self.generations.workers, self.generations.standing == DROPPED
        if self._ended and not workers and self._is_run_elsewhere():
            self._control.forget(self.name, 0)
        elif not workers and (self._failure or dropped):
            phase = "waiting" if isinstance(self._failure, Transient) else "stopped"
            state = State(phase=phase if self._failure else DROPPED, error=self._failure)
            self._control.report(self._report(self.generations.none, state))
            self._placeholder = True
        elif workers and self._placeholder:
            self._control.forget(self.name, 0)  # a predecessor's too
            self._placeholder = False

    def _is_run_elsewhere(self) -> bool:
        reports = self._control.reports().get(self.name, [])
        return any(report.generation and report.heard for report in reports)

    def handle(self, request: Request) -> None:
        """Carry out a request and answer it; one whose asker has given up is only taken away, and nobody waits to hear that he left.

        It is left to the other process where that has taken the view over.
        """
        if self._stood():
            self.look()
        if self._taken_over() or self._stood():
            return
        with suppress(HeadraceError):  # nobody hears it: with Kafka away, or refusing what this process writes
            if request.verb == LEAVE:
                self._rows.leave(request)
            if request.given_up or request.verb == LEAVE:
                self._control.take_away(self.name, request)
                return
            answer = self._carried_out(request)
            try:
                self._control.answer(self.name, request, answer)
            except Misconfigured as error:  # it is too large
                self._control.answer(self.name, request, refusal(error))

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
        if self._failure and not self.generations.workers and not self._needs_no_store(request):
            return refusal(self._failure)  # it is not known yet what there is
        try:
            return verb(request)
        except Exception as error:  # noqa: BLE001  whatever it is, it belongs to who asked
            return refusal(as_ours(error, self.name))

    def _needs_no_store(self, request: Request) -> bool:
        """Whether it may be carried out though a look has not succeeded yet; a drop of everything asks the store itself."""
        taken_back = request.verb == "rebuild" and self.generations.standing == DROPPED
        return request.verb in _MEANWHILE or bool(request.args.get("all")) or taken_back

    def phases(self) -> dict[str, str]:
        """Return the phase of each generation, with its reason, for a line to people when it changes."""
        if self._failure and (not self.generations.workers or self._failure.code in _TAKEN_OVER):
            return {self.name: str(self._failure)}
        phases: dict[str, str] = {}
        for worker in self.generations.workers.values():
            error = self._error(worker.generation, worker.state)
            phase = _phase(worker.generation, worker.state)
            phases[worker.name] = f"{phase}: {error}" if error else phase
        return phases

    def failed(self) -> HeadraceError | None:
        """Return why nothing of this consumer runs or waits any more, None while something does."""
        if taken := self._taken_over():
            return taken
        if not self.generations.workers:
            return None if isinstance(self._failure, Transient) else self._failure
        errors = [worker.state.error for worker in self.generations.workers.values() if worker.state.phase == "stopped"]
        final = [error for error in errors if error is not None and not isinstance(error, Refused)]
        return final[0] if final and len(final) == len(self.generations.workers) else None

    def _taken_over(self) -> HeadraceError | None:
        errors = [self._failure, *(worker.state.error for worker in list(self.generations.workers.values()))]
        return next((error for error in errors if error is not None and error.code in _TAKEN_OVER), None)

    def stop(self) -> None:
        """End every worker and say so. Whoever waits for a server that is away is left behind: it has promised nothing yet [I7]."""
        deadline = time.monotonic() + _STOP_SECONDS
        for worker in self.generations.workers.values():
            worker.stop()
        for worker in self.generations.workers.values():
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.state.phase != "stopped":
                worker.state.phase = "off"
        heard = not self._stood() or self._is_alone()  # else nobody knows whose what it would say is by now
        self._ended = True
        if heard:
            self.report()
        with suppress(Transient):  # with Kafka away the last report just grows old
            self._control.flush(_FLUSH_SECONDS)

    def _report(self, generation: Generation, state: State) -> Report:
        error = self._error(generation, state)
        return Report(
            name=self.name,
            generation=generation.number,
            fingerprint=generation.fingerprint,
            live=generation.live,
            phase=_phase(generation, state),
            version=state.reached,
            lag=(state.lag.records, state.lag.wal, state.behind),
            rate=round(state.rate, 1),
            eta=seconds_left(state.lag.records, state.rate, state.progress, state.begun),
            progress=state.progress,
            reason=error.message if error else self._reason(state),
            code=error.code if error else "",
            remedy=error.remedy if error else "",
            facts=self._facts(generation, state),
            ended=self._ended,
            process=self._process,
        )

    def _error(self, generation: Generation, state: State) -> HeadraceError | None:
        """Return why a generation does not go on, or cannot be promoted though there is no other."""
        return state.error or self.generations.unpromoted.get(generation.number)

    def _facts(self, generation: Generation, state: State) -> dict[str, Any]:
        left = {"left": True} if self.generations.left_for(generation.number) is not None else {}
        reads = {"reads": self.generations.reads}
        inexact = {"inexact": list(state.inexact)} if state.inexact else {}
        parked = {"parked": state.parked} if state.parked else {}
        if self._log.fed_by_debezium:
            return reads | left | inexact | parked | {"checkpoints": "none"}
        return reads | left | inexact | parked | ({"written_ms": state.written} if state.exact else {})

    def _reason(self, state: State) -> str:
        if self.generations.standing == DROPPED != state.phase:
            return f"it is to be dropped as soon as that is possible: to keep it run headrace rebuild {self.name}"
        hours = self._log.settings.delete_retention_ms / 3_600_000
        first = f"headrace resume {self.name}, then " if self.generations.standing == PAUSED else ""
        return {
            "stale": f"stale since {format_lsn(state.version.lsn)}, built by other code: run {first}headrace rebuild {self.name}",
            "paused": f"somebody asked for it; one paused for {hours:.0f} hours must be rebuilt (S19): run headrace resume {self.name}",
            DROPPED: f"somebody asked for it, and no other is begun: run headrace rebuild {self.name}",
        }.get(state.phase, "")


def _phase(generation: Generation, state: State) -> str:
    """Return the phase of a generation: the worker learns only with the next poll that it went live, or is live no more."""
    if state.phase in {"live", "following"}:
        return "live" if generation.live else "following"
    return state.phase


def _elapsed() -> float:
    """Return seconds that go on while the machine sleeps, where the system counts them so."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
