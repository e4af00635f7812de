"""What `rebuild --wait` does between the first word and the promotion: it waits, and holds the build against Postgres."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from importlib.metadata import entry_points
from typing import NamedTuple

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from headrace import plugins
from headrace.cli.show import Telling, err, out, seconds
from headrace.consumer import Consumer
from headrace.control import DEAD_SECONDS, Control, Report
from headrace.effects import EffectConsumer
from headrace.errors import CHECK_FAILED, HeadraceError, Misconfigured, Transient

_LOOK_SECONDS = 0.5


class Gate(StrEnum):
    """What a build must pass before readers get it."""

    VERIFY = "verify"
    COUNTS = "counts"
    NONE = "none"


def wait(control: Control, building: Mapping[str, int], *, quiet: bool) -> None:
    """Wait until the generations have caught up; show how far each is, and how long it will take: without a terminal in lines on stderr.

    Raises:
        Misconfigured: `consumer-not-running`, `view-paused`, `stale-generation`, `no-such-generation`, and what stopped a build.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"), TimeElapsedColumn())
    with Progress(*columns, console=out, disable=quiet or not out.is_terminal) as progress:
        telling = Telling() if progress.disable else None
        bars = {name: _Bar(progress, telling, name, number) for name, number in building.items()}
        while True:
            caught_up = [bar.show(control.running(name)) for name, bar in bars.items()]
            if all(caught_up):
                return
            time.sleep(_LOOK_SECONDS)


class _Bar:
    """One build's line."""

    def __init__(self, progress: Progress, telling: Telling | None, name: str, number: int) -> None:
        self._progress = progress
        self._telling = telling
        self._name, self._number = name, number
        self._heard = time.monotonic()
        self._task: TaskID = progress.add_task(f"{name} g{number}", total=None, left="")
        self._most = 1

    def show(self, reports: Sequence[Report]) -> bool:
        """Show how far the build is; return whether it has caught up."""
        told = {report.generation: report for report in reports}
        report = told.get(self._number) or told.get(0)  # which stands for all until the store has said which there are
        if report is None or report.phase == "dropped":
            self._check_not_gone()
            return False
        self._heard = time.monotonic()
        if _ready(report):
            self._show(1, 1, "caught up")
            return True
        records = report.lag[0]
        self._most = max(self._most, records)
        done, total = report.progress if report.progress[1] else (self._most - records, self._most)
        estimate = f", {seconds(report.eta)} left" if report.eta >= 0 else ""
        self._show(done, total, report.phase, f"{records} records{estimate}")
        return False

    def _show(self, done: int, total: int, phase: str, far: str = "") -> None:
        self._progress.update(self._task, total=total, completed=done, left=f"{phase}, {far}" if far else phase)
        if self._telling is not None:
            self._telling.tell(f"{self._name} g{self._number}", phase, f"{100 * done // total}%, {far}" if far else "")

    def _check_not_gone(self) -> None:
        """A build of which its process says nothing has just begun, or is gone."""
        if time.monotonic() - self._heard > DEAD_SECONDS:
            said = f"Generation {self._number} of {self._name} is gone: somebody dropped it, or its store lost it."
            raise Misconfigured("no-such-generation", said, f"Run: headrace rebuild {self._name}")


def _ready(report: Report) -> bool:
    if report.phase == "stopped":
        raise Misconfigured(report.code, f"The build has stopped: {report.reason}", report.remedy)
    if report.phase == "stale":
        said = f"Generation {report.generation} of {report.name} stands still: its process has other code since."
        raise Misconfigured("stale-generation", said, f"Run: headrace rebuild {report.name}")
    if report.phase == "paused":
        raise Misconfigured("view-paused", f"{report.name} is paused.", f"Run: headrace resume {report.name}")
    return report.phase in {"following", "live"}


class Here(NamedTuple):
    """A consumer as it is where this command runs: its class, and the options by which another command finds that."""

    made: type[Consumer]
    options: list[str]


def here(names: Sequence[str], gate: Gate, files: Sequence[str]) -> dict[str, Here]:
    """Return what the gate asks, by name; none for one that asks nothing. What it lacks is told before the hours that a build may take.

    Raises:
        Misconfigured: `no-verify`, `unknown-consumer`, `broken-consumer`, `consumer-twice`.
    """
    if gate is Gate.NONE:
        return {}
    if not entry_points(group="headrace.commands", name="verify"):
        raise _no_verify(names)
    loaded = zip(plugins.load_files(files).items(), files, strict=True)
    found = {name: Here(made, ["--consumer", file]) for (name, made), file in loaded}
    return {name: found.get(name) or Here(plugins.load(name), []) for name in names}


def check(
    control: Control, building: Mapping[str, int], asked: Mapping[str, Here], *, counts: bool, quiet: bool
) -> None:
    """Have each generation that is asked about compared with Postgres; exit when one differs, or when that could not be found out.

    Raises:
        Transient: `verify-killed`.
    """
    for name, (made, options) in asked.items():
        number = building[name]
        if issubclass(made, EffectConsumer):
            err.print(f"[yellow]not compared[/yellow] {name}: it has effects and keeps no view")
            continue
        command = [sys.executable, "-m", "headrace", "verify", name, "--generation", str(number)]
        # Its table is for people: with --json this command's stdout is one document.
        code = subprocess.run(
            [*command, *(["--counts"] if counts else []), *options], check=False, stdout=sys.stderr if quiet else None
        ).returncode
        if code < 0:
            raise _killed(-code, name, number, live=_is_live(control, name, number))
        if code:
            why = "differs from Postgres" if code == CHECK_FAILED else "could not be compared with Postgres"
            live = _is_live(control, name, number)
            stands = "it is live already, for no other was" if live else "nothing was promoted"
            err.print(f"[red]generation {number} of {name} {why}; {stands}[/red]")
            if code == CHECK_FAILED and not live:
                with suppress(HeadraceError):  # else it could become so by itself, should the live one be lost
                    control.ask(name, "refuse", {"generation": number})
                err.print(f"to build another: headrace drop {name} {number}, then: headrace rebuild {name}")
            raise typer.Exit(code)


def _no_verify(names: Sequence[str]) -> Misconfigured:
    """Return what to do where the gate is not installed. Without a number `verify` compares the live one; `promote` takes the newest."""
    all_of = " ".join(names)
    which = " --generation N" if len(names) == 1 else ""
    verify = "; ".join(f"headrace verify {name} --generation N" for name in names)
    return Misconfigured(
        "no-verify",
        "The command `verify` is not installed here.",
        f"Install headrace-verify and run this again. Or: headrace rebuild {all_of}, which says the number N; where verify is "
        f"installed: {verify}; then: headrace promote {all_of}{which}. Or unseen: headrace rebuild {all_of} --wait --gate none",
    )


def _killed(number: int, name: str, generation: int, *, live: bool) -> Transient:
    said = (
        f"Generation {generation} of {name} could not be compared with Postgres: verify was killed by signal {number}"
    )
    again = f"headrace verify {name}" if live else f"headrace rebuild {name} --wait, which goes on with this build"
    stands = "It is live already, for no other was" if live else "Nothing was promoted"
    remedy = f"If the kernel did it for want of memory (see dmesg), give it more. Then run: {again}"
    return Transient("verify-killed", f"{said}. {stands}.", remedy)


def _is_live(control: Control, name: str, number: int) -> bool:
    """Whether readers see a build before it is promoted: where no generation is live, the first state becomes so by itself."""
    return any(report.generation == number and report.live for report in control.reports().get(name, []))
