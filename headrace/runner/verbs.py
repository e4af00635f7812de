"""What may be asked of the generations of one consumer: rebuild, promote, roll back, drop, pause.

Several views meet at one L by two requests each, of whoever promotes them (`headrace.cli.together`): ``hold`` stops the live generation and
answers what readers may have seen, and with the highest of these as L ``promote`` lets the new one reach L before the pointer moves. A hold
ends by itself, so that nothing stays held when the asker dies; who promotes after that is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as NoAnswer
from contextlib import suppress
from dataclasses import replace
from typing import Any

from headrace.change import NOWHERE, Version
from headrace.consumer import Generation
from headrace.errors import HeadraceError, Misconfigured, Refused, Transient, as_ours
from headrace.parked import records_parked
from headrace.requests import Request
from headrace.runner.generations import CALL_SECONDS, DROPPED, PAUSED, Generations
from headrace.runner.parking import Lacking
from headrace.runner.unparking import check_goes_on
from headrace.runner.worker import Worker

_PATIENCE_SECONDS = 30.0
HOLD_SECONDS = 60.0
"""How long a view stands when it is held for somebody, who may ask again meanwhile."""
_ANOTHER_LOG = frozenset({"position-ahead", "position-of-another-source"})
"""Why a view is refused of which no state can be compared with one of the log as it is now [I12]."""
_RESTING = frozenset({"stale", "paused", "stopped"})

Answer = dict[str, Any]


class Verbs:
    """Carries out what is asked of one consumer's generations."""

    def __init__(self, generations: Generations, told: Callable[[], None]) -> None:
        """Call `told` when readers see another generation or none, and when one goes on: who asked looks at control next."""
        self._generations = generations
        self._told = told
        self.verbs: dict[str, Callable[[Request], Answer]] = {
            "rebuild": self._rebuild,
            "refuse": self._refuse,
            "hold": self._hold,
            "release": self._release,
            "promote": self._promote,
            "rollback": self._rollback,
            "drop": self._drop,
            "pause": lambda _request: self._stay(PAUSED),
            "resume": self._resume,
        }

    @property
    def _name(self) -> str:
        return self._generations.name

    # Building

    def _rebuild(self, request: Request) -> Answer:
        """Begin the next generation, or go on with the one that is being built, also when it has stopped.

        One that may not go on, because its position makes no sense, is left as it is; so is one that readers saw before a rollback.
        """
        made = self._generations
        made.code.check(request.args.get("fingerprint"))
        if made.standing == PAUSED:
            raise Misconfigured("view-paused", f"{self._name} is paused.", f"Run: headrace resume {self._name}")
        if made.standing == DROPPED:
            made.stay("")
        made.check_not_lost()
        live = made.live()
        made.check_not_of_another()
        newest = max(made.workers, default=0)
        building = made.workers.get(newest)
        seen = live is not None and (newest < live.generation.number or made.was_shown(newest))
        seen = seen or made.left_for(newest) is not None
        if building is None or building is live or building.still or seen:
            building = made.begin(Generation(self._name, made.next(), made.code.fingerprint))
        elif building.state.phase == "stopped":
            refused = isinstance(building.state.error, Refused)
            if not refused:  # one that is answers yet
                made.end(building)
            building = made.begin(replace(building.generation, number=made.next() if refused else newest))
        self._told()
        return {"generation": building.generation.number}

    def _refuse(self, request: Request) -> Answer:
        """Keep that the gate of who asked has refused a build; to promote it is still his who wants it."""
        self._generations.refuse(self._generations.worker(request.args["generation"]).generation.number)
        return {}

    # Which one readers see

    def _hold(self, request: Request) -> Answer:
        """Stop the live generation, for a promotion of the one that is asked for, or at where readers of it are compared."""
        live = self._generations.live()
        target = live if request.args.get("compare") else self._newer(request)
        if target is None:
            raise Misconfigured("no-such-generation", f"{self._name} has no live generation.", "See: headrace status")
        if target is not live:
            _check_caught_up(target)
            _check_whole(target, live)
        version = self._held(live, target, HOLD_SECONDS)
        if target is live and not live.still:  # of which rows are compared: what readers may have seen is too much
            version = live.state.shown
        return {"generation": target.generation.number, "version": list(version)}

    def _release(self, _request: Request) -> Answer:
        live = self._generations.live()
        if live is not None:
            live.release()
        return {}

    def _promote(self, request: Request) -> Answer:
        before = request.args.get("from") if request.args.get("generation") is None else None
        live = self._generations.live()
        if before is not None and live is not None and live.generation.number > before:
            # It was carried out by a process that was killed before it was taken away.
            return _shown(live) | {"before": before or None}
        at = Version(*request.args.get("at") or NOWHERE)
        return self._switch(self._newer(request), at)

    def _newer(self, request: Request) -> Worker:
        live = self._generations.live()
        number = request.args.get("generation")
        newer = [n for n in self._generations.workers if live is None or n > live.generation.number]
        if number is None and not newer:
            raise Misconfigured(
                "nothing-to-promote", f"{self._name} has no newer generation.", f"Run: headrace rebuild {self._name}"
            )
        return self._generations.worker(max(newer) if number is None else number)

    def _rollback(self, request: Request) -> Answer:
        """Go back to what readers saw before: never to a build that they never saw, which its gate may have refused."""
        live = self._generations.worker(None)
        left = request.args.get("from") or live.generation.number
        if left != live.generation.number:
            # It was asked twice, or carried out by a process that was killed before it was taken away.
            return self._rolled_back(left, live)
        before = self._generations.before(live)
        if before is None:
            raise Misconfigured(
                "nothing-to-roll-back-to",
                f"{self._name} has no generation that was live before {live.generation.number}.",
                f"See: headrace status. For another one: headrace promote {self._name} --generation N",
            )
        return self._switch(before, stale=bool(request.args.get("stale")))

    def _rolled_back(self, left: int, live: Worker) -> Answer:
        """Answer that readers were brought from one generation to what was before it, if the live one is that."""
        if self._generations.left_for(left) != live.generation.number:
            said = f"Generation {live.generation.number} of {self._name} is live, and not {left}."
            raise Misconfigured("rolled-back-already", said, "See: headrace status. Nothing was changed.")
        return _shown(live) | {"before": left}

    def _switch(self, target: Worker, at: Version = NOWHERE, *, stale: bool = False) -> Answer:
        """Move the store's pointer so that no reader goes back in time: the old one stops at L, the new one reaches L (S24).

        With several views L is `at`, the highest of those where they stopped: no old one has shown more, no new one shows less.
        """
        live = self._generations.live()
        before = live.generation.number if live is not None and live is not target else None
        try:
            if live is not target:
                _check_caught_up(target)
                if not stale:
                    _check_whole(target, live)
                    self._meet(live, target, at)
                self._generations.wait_for(target, target.promote)
        finally:
            if live is not None:
                live.release()
        self._told()
        return _shown(target) | {"before": before}

    def _meet(self, live: Worker | None, target: Worker, at: Version) -> None:
        held = self._held(live, target, 2 * CALL_SECONDS)
        if at != NOWHERE and held > at:
            said = f"it was held for {HOLD_SECONDS:.0f} s, or its process started again."
            raise Transient("hold-ended", f"{self._name} went on to {held}: {said}", "Promote them again.")
        wanted = max(held, at)
        if not _reach(target, wanted, _PATIENCE_SECONDS):
            said = (
                f"{target.name} is at {target.state.reached}, readers have seen {wanted}: they would go back in time."
            )
            error = _final(target)
            stopped = f" It has stopped: {error.message}" if error else ""
            raise Misconfigured("generation-behind", said + stopped, self._way_on(live, target))
        if live is not None and self._seen(live, target) > wanted:
            said = f"{self._name} waited, and went on to {live.seen} when it came back."
            raise Transient("hold-ended", said, "Promote it again.")

    def _way_on(self, live: Worker | None, target: Worker) -> str:
        """Return what to do about a generation that is behind; a rollback goes to one only, and to none that answers nothing."""
        if target.paused:
            return f"Run: headrace resume {self._name}"
        rebuild = f"headrace rebuild {self._name}"
        if live is None or self._generations.before(live) is not target or _final(target):
            return f"Run: {rebuild}"
        accept = "To accept that run"
        if target.still:
            again = "put that back, start its process again, and run the same command once it follows"
            accept = f"It is of other code: {again}. To show it as it is"
        return f"{accept}: headrace rollback {self._name} --stale. Otherwise: {rebuild}"

    def _held(self, live: Worker | None, target: Worker, seconds: float) -> Version:
        """Stop the live generation for so long, in the middle of a backlog too; return what readers have seen, NOWHERE when there is none.

        One that waits is not waited for, but when it has come back and is applying. One that is compared itself stops at a complete state;
        so does one that hands its place on: its pieces are seen, and amid them its position is as old as the state before.
        """
        if live is None:
            return NOWHERE
        live.stand(seconds)
        if live.is_alive() and live.state.phase != "stopped":
            whole = live is target or self._generations.hands_on
            waits = live.state.phase == "waiting"
            try:
                held = live.hold(seconds, _PATIENCE_SECONDS, whole=whole)
            except Transient as error:
                if error.code == "does-not-hold" and not (waits and not whole):  # what it has begun is counted
                    raise
                live.stand(seconds)
            else:
                if not live.still:
                    return held
        return self._seen(live, target)

    def _seen(self, live: Worker, target: Worker) -> Version:
        """Return what readers have seen; NOWHERE where that is of another log than the one that `target` follows.

        Perhaps no build ever reaches it then.

        Raises:
            Misconfigured: `not-caught-up`: then, while it could still show what was long before.
        """
        error = self._generations.refusal(live)
        if error is None or error.code not in _ANOTHER_LOG:
            return live.seen
        if target.state.phase == "catching up":
            raise _not_caught_up(target)
        return NOWHERE if target.state.phase == "following" else live.seen

    # Standing still, and going

    def _stay(self, phase: str) -> Answer:
        if self._generations.standing == DROPPED:
            raise Misconfigured(
                "no-such-generation", f"{self._name} is dropped.", f"Run: headrace rebuild {self._name}"
            )
        self._generations.stay(phase)
        self._told()
        return {"name": self._name, "paused": phase == PAUSED}

    def _resume(self, _request: Request) -> Answer:
        return self._stay("")

    def _drop(self, request: Request) -> Answer:
        made = self._generations
        if request.args.get("all"):
            return self._drop_all()
        live = made.live()
        number = request.args.get("generation")
        if live is not None and number == live.generation.number:
            said = f"Generation {number} of {self._name} is live."
            raise Misconfigured("drops-the-live-one", said, "Promote another first, or drop the view: --all.")
        if number is None and live is None:
            said = f"{self._name} has no live generation to keep."
            raise Misconfigured("no-such-generation", said, "Name the generation to drop.")
        wanted = [number] if number is not None else [n for n in made.workers if live and n < live.generation.number]
        for each in wanted:
            made.drop(each)
        return {"dropped": wanted}

    def _drop_all(self) -> Answer:
        """Drop the view. That is kept before the first generation goes: a later look ends what fails then, and who asked hears of it."""
        made = self._generations
        dropped = sorted(made.workers)
        made.check_free()
        made.stay(DROPPED)
        try:
            made.drop_all()
        except Exception as failure:
            error = as_ours(failure, self._name)
            said = f"{error.message} {self._name} is dropped as soon as that is possible."
            keep = f"To keep what is there: headrace rebuild {self._name}"
            raise type(error)(error.code, said, f"{error.remedy} {keep}") from failure
        self._told()
        return {"dropped": dropped}


def _shown(live: Worker) -> Answer:
    return {"generation": live.generation.number, "version": list(live.state.version)}


def _final(target: Worker) -> HeadraceError | None:
    """Return why a generation has stopped and answers nothing any more."""
    error = target.state.error
    return error if target.state.phase == "stopped" and not isinstance(error, Refused) else None


def _check_caught_up(target: Worker) -> None:
    if not target.state.exact:
        if target.state.phase in _RESTING:
            check_goes_on(target)  # who waits for one that does not waits for ever
        raise _not_caught_up(target)


def _not_caught_up(target: Worker) -> Misconfigured:
    said = f"{target.name} is still {target.state.phase}."
    return Misconfigured("not-caught-up", said, "Wait; headrace status --watch shows it.")


def _check_whole(target: Worker, live: Worker | None) -> None:
    """Refuse to show readers of a live generation another that lacks what is parked (S24); the first one goes live without.

    None goes live that lacks it for ever.
    """
    error = target.state.error
    if isinstance(error, Lacking):
        raise error
    if live is not None and target.state.parked:
        raise records_parked(target.generation.consumer, target.generation.number, target.state.parked)


def _reach(worker: Worker, version: Version, seconds: float) -> bool:
    """Wait until a generation shows a state, also what it delays; return whether it does. One that stands still is not waited for."""
    deadline = time.monotonic() + seconds
    while worker.state.reached < version:
        if worker.still or worker.paused or time.monotonic() > deadline:
            return False
        if worker.state.version >= version:
            with suppress(NoAnswer, HeadraceError):  # it says itself what it lacks
                worker.call(worker.hurry).result(max(0.0, deadline - time.monotonic()))
        time.sleep(0.005)
    return True
