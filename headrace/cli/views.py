"""`headrace rebuild`, `promote`, `rollback`, `drop`, `pause`, `resume`: all is asked of the process that runs the view [I13]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from headrace.cli import building, forget, together
from headrace.cli.building import Gate
from headrace.cli.show import out, print_json
from headrace.control import Control, Report
from headrace.effects import EffectConsumer
from headrace.errors import USAGE
from headrace.fingerprint import fingerprint
from headrace.log import Log
from headrace.settings import load

Name = Annotated[str, typer.Argument(help="The consumer.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="One consumer, or several.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
AsList = Annotated[bool, typer.Option("--json", help="Print JSON for scripts; with several NAMEs a list.")]

Wait = Annotated[
    bool, typer.Option("--wait", help="Wait until it has caught up, let it pass the gate, and promote it.")
]
Gates = Annotated[
    Gate,
    typer.Option(
        "--gate",
        help="With --wait: promote only what equals Postgres row by row (verify), or has as many rows (counts), or anything (none).",
    ),
]
Files = Annotated[
    list[str] | None,
    typer.Option(
        "--consumer",
        metavar="FILE.py:CLASS",
        help="Where a consumer is, if it was run from a file: the gate asks it. May be repeated.",
    ),
]


def rebuild(
    names: Names, wait: Wait = False, gate: Gates = Gate.VERIFY, consumer: Files = None, json: AsList = False
) -> None:
    """Build views anew from offset 0, beside the live ones.

    Readers see nothing of a build until it is promoted. Run again, also after this command or the view's process was stopped or killed, it
    goes on with the generation that is being built, never with one that readers have seen; on a host where the view's local rows are
    lost, these are loaded again first.

    With --wait the gate expects what the code of the views makes of Postgres: that has to be here (see --consumer), and to be what their
    processes run, or that view is not built, nor those named after it; not so with --gate none.

    With --wait and several views they are promoted at the same LSN, one after the other: all live ones stop, all new ones reach where the
    furthest of them stopped, and each store's pointer moves. That is not atomic over all stores: for a moment some views are new and some
    old, at the same LSN. If one cannot be promoted the error says where each stands, and none stays stopped.

    Where no generation of a view is live, its build becomes so by itself, as at the first start: the gate then only says what differs.

    Exit codes: 0 they are being built, with --wait: they are live; 1 one differs from Postgres and nothing was promoted; 3 something must
    be changed first, or no process runs a view; 5 a server or that process does not answer. With --wait 3 and 5 are the gate's too: one
    could not be compared, and nothing was promoted.

    Examples:

        headrace rebuild search --wait

        headrace rebuild search pages --wait --gate counts

        headrace rebuild search && headrace status --watch

        headrace rebuild my_view --wait --consumer ./my_view.py:MyView
    """
    log = Log(load())
    if wait and (gate is not Gate.NONE or len(names) > 1):
        log.require_checkpoints()
    control = Control(log)
    here = building.here(names, gate, consumer or []) if wait else {}
    prints = {name: fingerprint(each.made) for name, each in here.items() if not issubclass(each.made, EffectConsumer)}
    began = together.rebuild(control, names, prints)
    if not wait:
        said = control.reports()
        lines = [
            f"building generation {n} of {name}; {_next(name, n, said.get(name, []))}" for name, n in began.items()
        ]
        _say(json, [{"name": name, "generation": number} for name, number in began.items()], lines)
        return
    building.wait(control, began, quiet=json)
    building.check(control, began, here, counts=gate is Gate.COUNTS, quiet=json)
    _promoted(json, together.promote(control, began))


def _next(name: str, number: int, said: Sequence[Report]) -> str:
    """Return what is next for a build: readers see the first by itself, unless its gate has refused it."""
    if any((each.live and each.generation != number) or each.code == "not-by-itself" for each in said):
        return f"then: headrace promote {name}"
    return f"no other is live: it becomes so by itself as soon as it is complete, as headrace status {name} says"


def promote(
    names: Names,
    generation: Annotated[
        int | None, typer.Option("--generation", min=1, help="Which, of one view; else the newest.")
    ] = None,
    json: AsList = False,
) -> None:
    """Let readers see newer generations: the live one stops, the new one reaches it, the pointer moves.

    Several views are promoted at the same LSN, one after the other, as `headrace rebuild` tells; not atomically.

    Exit codes: 0 they are live; 2 --generation is given for several; 3 one cannot be promoted, or no process runs it; 4 one has stopped by
    a record; 5 a server or that process does not answer. With several, 3, 4 and 5 say which are live and which are not.

    Examples:

        headrace promote search

        headrace promote search pages warehouse

        headrace promote search --generation 4
    """
    if generation is not None and len(names) > 1:
        typer.echo("--generation names a generation of one view.", err=True)
        raise typer.Exit(USAGE)
    log = Log(load())
    if len(names) > 1:
        log.require_checkpoints()
    _promoted(json, together.promote(Control(log), dict.fromkeys(names, generation)))


def _promoted(json: bool, answers: list[dict[str, Any]]) -> None:
    lines = [f"generation {each['generation']} of {each['name']} is live{_stays(each)}" for each in answers]
    _say(json, answers, lines)


def _stays(answer: dict[str, Any]) -> str:
    """Return what stays beside a generation that was promoted; `drop` without a number takes older ones only."""
    before = answer.get("before")
    if before is None:
        return ""
    number = f" {before}" if before > answer["generation"] else ""
    return f"; the one before stays until: headrace drop {answer['name']}{number}"


def rollback(
    name: Name,
    stale: Annotated[
        bool,
        typer.Option(
            "--stale", help="Accept a generation that is behind what readers have seen, or lacks what is parked."
        ),
    ] = False,
    json: AsJson = False,
) -> None:
    """Let readers see again what was live before; a build that was never promoted is not gone back to.

    It has gone on following if the code is the same. If it was built by other code it stands since, and would take readers back in time:
    put the old code back, start the view's process again, and roll back when `headrace status` shows it `following`.

    Exit codes: 0 it is live again; 3 there is none, it is behind (see --stale), or no process runs it; 4 it has stopped by a record; 5 a
    server or that process does not answer.

    Example:

        headrace rollback search
    """
    control = _control()
    live = next((report.generation for report in control.running(name) if report.live), None)
    answer = control.ask(name, "rollback", {"stale": stale, "from": live}, timeout=120)  # asked twice it goes back once
    _say(json, [answer], [f"generation {answer['generation']} of {name} is live again"])


def drop(
    name: Name,
    generation: Annotated[int | None, typer.Argument(help="Which; all before the live one when left out.")] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Remove the view: every generation, the live one too. Readers find nothing then."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask, where nobody can run the consumer any more.")] = False,
    json: AsJson = False,
) -> None:
    """Remove generations that are not live; with --all the whole view.

    After --all its process stays and does nothing, and says `dropped`, also when it is started again, until `headrace rebuild NAME` begins
    the view anew.

    A consumer that nobody runs and that is not installed here, for its package is gone or its class has another name, is forgotten by
    --all: `headrace status` says no more of it, and what it had parked is given up. It asks first; with --json it does not ask: nothing is
    done without --yes. Its store is not touched.

    Exit codes: 0 they are gone; 2 a generation and --all are given, or nobody agreed; 3 it is the live one, or no process runs the view; 5
    a server or that process does not answer.

    Examples:

        headrace drop search

        headrace drop search 3

        headrace drop search --all

        headrace drop old_search --all --yes
    """
    if everything and generation is not None:
        typer.echo("Name a generation, or give --all.", err=True)
        raise typer.Exit(USAGE)
    log = Log(load())
    control = Control(log)
    if everything and (found := forget.left(log, control, name)):
        forget.forget(log, control, name, found, ask=not yes, json=json)
        _say(json, [found], [forget.said(name, found)])
        return
    answer = control.ask(name, "drop", {"generation": generation, "all": everything}, timeout=120)
    dropped = ", ".join(str(number) for number in answer["dropped"]) or "nothing"
    _say(json, [answer], [f"{name}: dropped {dropped}"])


def pause(name: Name, json: AsJson = False) -> None:
    """Let a view stand still: readers keep the state that it shows, and nothing is applied, until `headrace resume`.

    All of its generations stand, also one that is being built; what a view debounces is shown first. It stays so when its process is
    started again; `headrace status` says `paused`, and `--check` fails. A view that is paused for longer than HEADRACE_DELETE_RETENTION_MS
    (7 days) is refused when it goes on, for it would keep rows whose deletes are forgotten: rebuild it then. A build begins again from
    zero.

    Exit codes: 0 it stands; 3 it is dropped, or no process runs it; 5 a server or that process does not answer.

    Example:

        headrace pause search
    """
    answer = _control().ask(name, "pause", timeout=120)
    _say(json, [answer], [f"{name} is paused; then: headrace resume {name}"])


def resume(name: Name, json: AsJson = False) -> None:
    """Let a paused view go on from where it stands.

    Exit codes: 0 it goes on; 3 it is dropped, or no process runs it; 5 a server or that process does not answer.

    Example:

        headrace resume search
    """
    answer = _control().ask(name, "resume", timeout=120)
    _say(json, [answer], [f"{name} goes on"])


def _control() -> Control:
    return Control(Log(load()))


def _say(json: bool, facts: list[dict[str, Any]], lines: list[str]) -> None:
    """Print what was done: with one view its facts, with several a list of them."""
    if json:
        print_json(facts[0] if len(facts) == 1 else facts)
    for line in [] if json else lines:
        out.print(line)
