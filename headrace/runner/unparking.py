"""What may be asked of what is parked: try it again, or give it up. It is done between two batches, where the view stands at a state."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from headrace.change import Position
from headrace.consumer import Consumer, Cursor
from headrace.errors import Misconfigured, Transient
from headrace.requests import Request
from headrace.runner.generations import Generations
from headrace.runner.parking import Parking
from headrace.runner.worker import Worker

_PATIENCE_SECONDS = 60.0
_STEP_SECONDS = 0.01
_CHARACTERS = 400

T = TypeVar("T")
Answer = dict[str, Any]


class Unparking:
    """Answers `retry` and `drop-parked` for one consumer."""

    def __init__(self, generations: Generations, told: Callable[[], None]) -> None:
        """Call `told` when something is no longer parked."""
        self._generations = generations
        self._told = told

    def retry(self, request: Request) -> Answer:
        """Try again what is named; answer what is done and what is left, with the reasons."""
        chosen = _chosen(request)
        worker, done = self._standing(request, lambda consumer, parking, at: parking.retry(consumer, chosen, at))
        told = ("collection", "key", "code", "remedy")
        left = [{name: getattr(entry, name) for name in told} | {"reason": _short(entry.reason)} for entry in done.left]
        return {"generation": worker.generation.number, "done": done.done, "left": left}

    def drop(self, request: Request) -> Answer:
        """Give up what is named; answer it."""
        chosen = _chosen(request)
        worker, entries = self._standing(request, lambda consumer, parking, at: parking.drop(consumer, chosen, at))
        dropped = list(dict.fromkeys(entry.cursor for entry in entries))
        return {"generation": worker.generation.number, "dropped": dropped, "records": len(entries)}

    def _standing(self, request: Request, function: Callable[[Consumer, Parking, Position], T]) -> tuple[Worker, T]:
        """Return what `function` returns at the next complete state of the generation that is named, of the live one else.

        Raises:
            Misconfigured: `no-such-generation`, `not-parked`, `stale-generation`, `view-paused`, `not-caught-up`. Transient: `worker-busy`.
        """
        number = request.args.get("generation")
        worker = self._generations.worker(number)
        if number is None:
            self._check_meant(worker)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            _check(worker)
            done: T | None = self._generations.wait_for(worker, lambda consumer: worker.unpark(consumer, function))
            if done is not None:
                self._told()
                return worker, done
            if time.monotonic() > deadline:
                said = f"{worker.name} came to no complete state in {_PATIENCE_SECONDS:.0f} s."
                raise Transient("worker-busy", said, "Try again; see headrace status")
            time.sleep(_STEP_SECONDS)

    def _check_meant(self, live: Worker) -> None:
        """Refuse a request that names no generation where it is another one, a build perhaps, of which something is parked."""
        workers = self._generations.workers.values()
        others = [each for each in workers if each is not live and each.state.parked and not each.still]
        if others and (live.still or not live.state.parked):
            number = others[-1].generation.number
            said = f"{live.name}, which is live, has nothing that can be tried again; generation {number} has."
            raise Misconfigured("not-parked", said, f"Say which: --generation {number}")


def _short(said: str) -> str:
    """Return the beginning of what an entry says of itself: it has the whole, and an answer may tell of very many."""
    return said if len(said) <= _CHARACTERS else f"{said[:_CHARACTERS]}…"


def check_goes_on(worker: Worker) -> None:
    """Refuse what applies nothing, and will not by itself."""
    name = worker.generation.consumer
    if worker.still:
        raise Misconfigured("stale-generation", f"{worker.name} is of other code.", f"Run: headrace rebuild {name}")
    if worker.paused:
        raise Misconfigured("view-paused", f"{name} is paused.", f"Run: headrace resume {name}")
    if worker.state.phase == "stopped" and worker.state.error:
        raise worker.state.error


def _check(worker: Worker) -> None:
    """Refuse what applies nothing, and what shows nothing yet."""
    check_goes_on(worker)
    if worker.state.phase != "waiting" and not worker.state.exact:
        said = f"{worker.name} is still {worker.state.phase}."
        raise Misconfigured("not-caught-up", said, "Wait; headrace status --watch shows it.")


def _chosen(request: Request) -> Callable[[Cursor], bool]:
    """Return what tells whether the request names a key: by itself, by its collection too, or all."""
    key, collection = request.args.get("key"), request.args.get("collection")
    return lambda cursor: key in {None, cursor[1]} and collection in {None, cursor[0]}
