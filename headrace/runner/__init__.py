"""The runner: what makes a plugin a running view. `run` is `headrace run`."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping

from headrace.consumer import Consumer
from headrace.control import Control
from headrace.errors import HeadraceError
from headrace.log import Log
from headrace.memory import collect_rarely, use_few_arenas
from headrace.runner.runner import Runner
from headrace.settings import Settings

__all__ = ["Runner", "run", "serve"]

_TICK_SECONDS = 1.0


def run(settings: Settings, consumers: Mapping[str, type[Consumer]], say: Callable[[str], None]) -> None:
    """Run consumers in this process until SIGTERM or SIGINT.

    Args:
        settings: The servers.
        consumers: Name to class.
        say: Prints a line for people.

    Raises:
        HeadraceError: why the last consumer that ran has stopped.
    """
    stopping = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda _number, _frame: stopping.set())
    use_few_arenas()
    collect_rarely()
    log = Log(settings)
    log.ensure_spine()
    control = Control(log)
    runners = {name: Runner(log, control, name, consumer) for name, consumer in consumers.items()}
    say(f"running {', '.join(runners)}; stop with Ctrl-C")
    serve(control, runners, stopping, say)


def serve(
    control: Control,
    runners: Mapping[str, Runner],
    stopping: threading.Event,
    say: Callable[[str], None],
    every: float = _TICK_SECONDS,
) -> None:
    """Drive runners, by name, until `stopping` is set, then end them: `every` so many seconds each looks and reports, between requests.

    They look at once when a first build becomes exact: until it is promoted there is nothing to read. A request may take minutes, and
    the process must not look dead meanwhile [I13]: then a thread reports.

    Raises:
        HeadraceError: why the last consumer that ran has stopped.
    """
    ended = threading.Event()
    reports = threading.Thread(target=_report, args=(list(runners.values()), ended, every), name="reports", daemon=True)
    box = control.requests(list(runners))
    ticked = 0.0
    ready: dict[str, list[int]] = {}
    said: dict[str, str] = {}
    try:
        reports.start()
        while not stopping.is_set():
            before, ready = ready, {name: runner.generations.first_builds() for name, runner in runners.items()}
            if time.monotonic() - ticked > every or ready != before:
                ticked = time.monotonic()
                _tick(runners, said, say)
            for name, request in box.poll(0.1):
                runners[name].handle(request)
    finally:
        box.close()
        ended.set()
        reports.join()
        for runner in runners.values():
            runner.stop()


def _report(runners: list[Runner], ended: threading.Event, every: float) -> None:
    while not ended.wait(every):
        for runner in runners:
            runner.report(not_since=2 * every)


def _tick(runners: Mapping[str, Runner], said: dict[str, str], say: Callable[[str], None]) -> None:
    failures: list[HeadraceError] = []
    for runner in runners.values():
        runner.look()
        runner.report()
        for generation, phase in runner.phases().items():
            if said.get(generation) != phase:
                said[generation] = phase
                say(f"{generation}: {phase}")
        failure = runner.failed()
        if failure is not None:
            failures.append(failure)
    if failures and len(failures) == len(runners):
        raise failures[0]
