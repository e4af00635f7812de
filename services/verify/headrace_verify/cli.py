"""`headrace verify`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from headrace import plugins
from headrace.change import format_lsn
from headrace.cli.show import err, out, print_json
from headrace.consumer import Consumer
from headrace.control import Control
from headrace.effects import EffectConsumer
from headrace.errors import CHECK_FAILED, HeadraceError, Misconfigured
from headrace.log import Log
from headrace.settings import load
from headrace_verify.counts import Counted
from headrace_verify.expected import append_only_root
from headrace_verify.ledger import KINDS, Difference
from headrace_verify.verify import Outcome, Verifier

_SHOWN = 20
_UNDECIDED = "each time it was compared, a change of it was in the view only or in Postgres only"

Names = Annotated[
    list[str] | None, typer.Argument(metavar="NAME...", help="Consumers; all that have been run when none is named.")
]
Files = Annotated[
    list[str] | None,
    typer.Option("--consumer", metavar="FILE.py:CLASS", help="A consumer in one file; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts, with every key.")]
Number = Annotated[
    int | None,
    typer.Option("--generation", min=1, help="Compare this one, for example before it is promoted; else the live one."),
]
Timeout = Annotated[
    float,
    typer.Option("--timeout", help="Longest wait, s, for a view to catch up, and for the next busy row to be decided."),
]

Counts = Annotated[
    bool, typer.Option("--counts", help="Compare only how many rows there are, at one LSN, and not which: faster.")
]


def verify(
    names: Names = None,
    consumer: Files = None,
    generation: Number = None,
    timeout: Timeout = 60.0,
    counts: Counts = False,
    json: AsJson = False,
) -> None:
    """Compare every row of a view with Postgres, also while both go on, and print what is missing, extra or different.

    A difference counts unless the log has a change of that row which the snapshot of Postgres could not see; such rows are
    compared again, with snapshots of the very state that the view shows, until they are decided. Of an append-only table, whose rows have
    no key, it is compared how often each row is there.

    A view of which records are parked is not compared: it is said at once what to run. Rows of a table that is captured no more are not
    compared, and noted: `headrace status --check` is what fails for it. Where no NAME is given, what has effects, what was run from a file,
    and documents of an append-only table's rows are left out with a line on stderr.

    With --counts rows are only counted: a wrong one is not seen, nor one that is missing beside one too many; and a view of documents has
    one for each root row or differs.

    Exit codes: 0 no differences; 1 differences, or rows that could not be decided; 3 something must be changed
    first; 5 a server or a view does not answer.

    Examples:

        headrace verify

        headrace verify search pages

        headrace verify warehouse --json
    """
    log = Log(load())
    log.require_checkpoints()
    control = Control(log)
    chosen = _chosen(log, control, names or [], consumer or [])
    show = print_json if json else _show_counts if counts else _show
    facts: list[dict[str, Any]] = []
    try:
        with _verifier(log, control, timeout) as verifier:
            facts.extend(_compared(verifier, chosen, generation, counts=counts, most=None if json else _SHOWN))
    except HeadraceError:
        if facts:  # of the views before the one that could not be compared: it may have taken hours
            show(facts)
        raise
    show(facts)
    if not all(fact["ok"] for fact in facts):
        raise typer.Exit(CHECK_FAILED)


def _compared(
    verifier: Verifier, chosen: dict[str, type[Consumer]], generation: int | None, *, counts: bool, most: int | None
) -> Iterator[dict[str, Any]]:
    if counts:
        yield from map(_counts, verifier.count(chosen, generation))
        return
    for outcome in verifier.verify(chosen, generation):
        yield _facts(outcome, most)


@contextmanager
def _verifier(log: Log, control: Control, timeout: float) -> Iterator[Verifier]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield Verifier(
            log,
            control,
            lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None),
            timeout,
        )


def _chosen(log: Log, control: Control, names: list[str], files: list[str]) -> dict[str, type[Consumer]]:
    from_files = plugins.load_files(files)
    if names or from_files:
        return {name: plugins.load(name) for name in names if name not in from_files} | from_files
    ran = sorted(name for name, reports in control.reports().items() if any(r.generation for r in reports))
    if not ran:
        said = "No consumer has been run yet: there is no view to verify."
        raise Misconfigured("consumer-not-running", said, "Run: headrace run NAME")
    known = {name: plugins.load(name) for name in ran if name in plugins.installed()}
    left_out = {name: _from_file(name) for name in ran if name not in known}
    left_out |= {
        name: f"{name} has effects and keeps no view." for name in known if issubclass(known[name], EffectConsumer)
    }
    shapes = {table: schema for (table, _), schema in sorted(log.schemas().items())}
    left_out |= {name: said for name, made in known.items() if (said := append_only_root(made, name, shapes))}
    chosen = {name: made for name, made in known.items() if name not in left_out}
    if not chosen and not known:
        raise Misconfigured("unknown-consumer", _from_file(ran[0]), "Name it by --consumer FILE.py:CLASS.")
    if not chosen:
        said = f"No view is there to verify: {' '.join(left_out.values())}"
        raise Misconfigured("verify-no-expectation", said, "Run: headrace run NAME, of a view that can be compared.")
    for said in left_out.values():
        err.print(f"[yellow]not compared[/yellow] {escape(said)}")
    return chosen


def _from_file(name: str) -> str:
    return f"{name} was run, and is not installed here: name it by --consumer FILE.py:CLASS."


def _counts(counted: Counted) -> dict[str, Any]:
    return {
        "consumer": counted.name,
        "generation": counted.generation,
        "lsn": format_lsn(counted.version.lsn),
        "rows": sum(counted.found.values()),
        "ok": not counted.differing,
        "differences": [
            {"collection": name, "expected": expected, "found": found}
            for name, (expected, found) in counted.differing.items()
        ],
        "notes": list(counted.notes),
    }


def _show_counts(facts: list[dict[str, Any]]) -> None:
    shown = Table("view", "generation", "at LSN", "rows", "differences", box=SIMPLE, pad_edge=False)
    for fact in facts:
        shown.add_row(
            *(str(fact[name]) for name in ("consumer", "generation", "lsn", "rows")), str(len(fact["differences"]))
        )
    out.print(shown)
    for fact in facts:
        for note in fact["notes"]:
            out.print(f"[yellow]note[/yellow] {fact['consumer']}: {escape(note)}")
        for each in fact["differences"]:
            what = f"{fact['consumer']} {each['collection']}".strip()
            out.print(f"[red]differs[/red] {escape(what)}: {each['found']} rows, {each['expected']} in Postgres")


def _facts(outcome: Outcome, most: int | None) -> dict[str, Any]:
    with closing(outcome):
        return _found(outcome, most)


def _found(outcome: Outcome, most: int | None) -> dict[str, Any]:
    counts = outcome.ledger.counts()
    undecided = list(islice(outcome.undecided(), most))
    return {
        "consumer": outcome.name,
        "generation": outcome.generation,
        "lsn": format_lsn(outcome.lsn),
        "rows": outcome.rows,
        **{kind: counts[kind] for kind in KINDS},
        "undecided": counts["undecided"],
        "ok": not any(counts.values()),
        "differences": [_fact(difference) for difference in islice(outcome.wrong(), most)],
        "undecided_rows": [_fact(difference) for difference in undecided],
        "notes": outcome.notes,
    }


def _fact(difference: Difference) -> dict[str, Any]:
    return difference._asdict()


def _show(facts: list[dict[str, Any]]) -> None:
    shown = Table("view", "generation", "at LSN", "rows", *KINDS, "undecided", box=SIMPLE, pad_edge=False)
    for fact in facts:
        counts = [str(fact[name]) for name in (*KINDS, "undecided")]
        shown.add_row(fact["consumer"], str(fact["generation"]), fact["lsn"], str(fact["rows"]), *counts)
    out.print(shown)
    for fact in facts:
        for note in fact["notes"]:
            out.print(f"[yellow]note[/yellow] {fact['consumer']}: {escape(note)}")
        for difference in fact["differences"]:
            out.print(f"[red]{difference['kind']}[/red] {fact['consumer']} {_named(difference)}")
        for difference in fact["undecided_rows"]:
            out.print(f"[yellow]undecided[/yellow] {fact['consumer']} {_named(difference)}: {_UNDECIDED}")
        if fact["missing"] + fact["extra"] + fact["different"] > len(fact["differences"]):
            out.print(f"… {fact['consumer']}: --json shows every key")


def _named(difference: dict[str, Any]) -> str:
    columns = f" ({', '.join(difference['columns'])})" if difference["columns"] else ""
    return escape(f"{difference['collection']} {difference['key']}".strip() + columns)
