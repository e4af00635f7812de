"""What `rebuild --wait` does between the first word and the promotion: it waits, and holds the build against Postgres."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from importlib.metadata import entry_points

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from headrace import plugins
from headrace.cli.show import Telling, err, out, seconds
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


def check(control: Control, building: Mapping[str, int], gate: Gate, files: Sequence[str], *, quiet: bool) -> None:
    """Have each generation compared with Postgres; exit when one differs, or when that could not be found out.

    Raises:
        Misconfigured: `no-verify`; Transient: `verify-killed`.
    """
    if gate is Gate.NONE:
        return
    if not entry_points(group="headrace.commands", name="verify"):
        raise _no_verify(building)
    of_name = {name: ["--consumer", file] for name, file in zip(plugins.load_files(files), files, strict=True)}
    counts = ["--counts"] if gate is Gate.COUNTS else []
    for name, number in building.items():
        if _has_effects(name, of_name.get(name, [])):
            err.print(f"[yellow]not compared[/yellow] {name}: it has effects and keeps no view")
            continue
        command = [sys.executable, "-m", "headrace", "verify", name, "--generation", str(number)]
        # Its table is for people: with --json this command's stdout is one document.
        code = subprocess.run(
            [*command, *counts, *of_name.get(name, [])], check=False, stdout=sys.stderr if quiet else None
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


def _no_verify(building: Mapping[str, int]) -> Misconfigured:
    """Return what to do where the gate is not installed: without a number `verify` compares what is live, and `promote` takes the newest."""
    verify = "; ".join(f"headrace verify {name} --generation {number}" for name, number in building.items())
    which = "".join(f" --generation {number}" for number in building.values()) if len(building) == 1 else ""
    names = " ".join(building)
    remedy = (
        f"Install headrace-verify and run this again. Or where it is: {verify}; then: headrace promote {names}{which}"
    )
    unseen = f"Or unseen: headrace rebuild {names} --wait --gate none"
    return Misconfigured("no-verify", "The command `verify` is not installed here.", f"{remedy}. {unseen}")


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


def _has_effects(name: str, file: Sequence[str]) -> bool:
    """Whether a consumer keeps nothing that could be compared; one that is not here is asked no further."""
    if not file and name not in plugins.installed():
        return False
    return issubclass(plugins.load_file(file[-1])[1] if file else plugins.load(name), EffectConsumer)
