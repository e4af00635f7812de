"""`make bench-views`: how fast views are built from zero and kept up to date, against what does only that. See README.md in this folder."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from bench import pgsync, report, servers, source
from bench.report import Ratio, ratio
from bench.viewing import FULL, PARTS, QUICK, Part, Run, Sizes, Views
from headrace.cli.show import print_error, print_json
from headrace.errors import HeadraceError
from headrace_ops import NAMES, artifacts

PAGE = Path(__file__).with_name("views.md")
TITLES: Final = {
    "search": "Search index from zero, one table",
    "pages": "Pages from zero",
    "warehouse": "Warehouse from zero",
    "joined": "Search index from zero, products with their reviews",
    "live": "The live path",
    "backlog": "A backlog of updates into Elasticsearch",
}
_LEAST: Final = {"search": 0.8, "pages": 0.8, "warehouse": 0.5, "joined": 4.0}
_PGSYNC_BACKLOG: Final = 8_400
_MEGA: Final = 1_000_000

_console = Console(stderr=True, highlight=False, soft_wrap=True)


def views(
    only: Annotated[str, typer.Option("--only", help=f"Parts, separated by commas, of: {', '.join(PARTS)}.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Few rows, one pair: to see that it works.")] = False,
    pairs: Annotated[int | None, typer.Option("--pairs", help="Pairs of runs, 3 or 1 by default.", min=1)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON document.")] = False,
) -> None:
    """Measure, print ratios; a whole run (every part, not --quick) also writes bench/views.md.

    Example: `python -m bench.views --quick --only search,live`
    """
    names = [name.strip() for name in only.split(",") if name.strip()] or list(PARTS)
    if unknown := set(names) - set(PARTS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}.")
    sizes = QUICK if quick else FULL
    sizes = replace(sizes, pairs=pairs or sizes.pairs)
    with servers.stack(NAMES) as (stack, folder), _console.status("starting") as status:

        def say(line: str, *, lasting: bool = False) -> None:
            if lasting or not _console.is_terminal:
                _console.print(line, markup=False)
            status.update(line)

        told = conditions(sizes, source.version(servers.postgres(stack)))
        runner = Views(stack, folder, sizes, say)
        parts = [_show(runner.run(name)) for name in names]
    if json:
        print_json({"conditions": told, "parts": [_facts(part) for part in parts]})
    if names == list(PARTS) and not quick:
        PAGE.write_text(page(parts, told))
        _console.print(f"written: {PAGE}", markup=False)


def _show(part: Part) -> Part:
    _console.print(f"[bold]{TITLES[part.name]}[/bold]")
    for one in ratios(part):
        _console.print(f"  {one.told()}", markup=False)
    return part


def ratios(part: Part) -> Iterator[Ratio]:
    """Yield what the part shows, the noise first."""
    if part.name == "live":
        for shown in part.shown:
            yield ratio(f"{shown.view}, p50 in ms", [shown.p50], most=40)
            yield ratio(f"{shown.view}, p99 in ms", [shown.p99], most=150)
        return
    if part.name == "backlog":
        yield ratio(
            f"headrace / {_PGSYNC_BACKLOG:,} a second", [run.rate / _PGSYNC_BACKLOG for run in part.again], least=3
        )
    else:
        first, second = part.again
        yield ratio("headrace / headrace", [first.rate / second.rate])
        other = part.pairs[0][1].kind
        yield ratio(
            f"headrace / {other}", [ours.rate / theirs.rate for ours, theirs in part.pairs], least=_LEAST[part.name]
        )
    if part.limits:
        limit = median(run.rate for run in part.limits)
        yield ratio("headrace / a loader of the same", [run.rate / limit for run in _ours(part)])
    yield ratio("headrace, peak memory in MB", [run.peak / _MEGA for run in _ours(part)], most=400)


def _ours(part: Part) -> list[Run]:
    return [*part.again, *(ours for ours, _ in part.pairs)]


def _facts(part: Part) -> dict[str, Any]:
    return asdict(part) | {"ratios": [asdict(one) for one in ratios(part)]}


def conditions(sizes: Sizes, postgres: str) -> dict[str, str]:
    """Return what the figures depend on."""
    return {
        **report.surroundings(postgres),
        "Elasticsearch": f"{artifacts.ELASTICSEARCH.name.partition('-')[2]}, one node, 512 MB of heap, C1 compiler only",
        "pgsync": f"{pgsync.VERSION}, " + ", ".join(f"{name}={value}" for name, value in pgsync.TUNING.items()),
        "sizes": ", ".join(f"{name} {value}" for name, value in asdict(sizes).items()),
    }


def page(parts: Iterable[Part], told: dict[str, str]) -> str:
    """Return views.md."""
    lines = [
        "# Views",
        "",
        "Written by `make bench-views` from one run: only its ratios mean much. [README.md](README.md) says how it was measured.",
        "",
    ]
    for part in parts:
        lines += [f"## {TITLES[part.name]}", "", *_table(part), "", *(f"- {one.told()}" for one in ratios(part)), ""]
    lines += ["## Conditions", "", *(f"- {name}: {what}" for name, what in told.items())]
    return "\n".join(lines) + "\n"


def _table(part: Part) -> list[str]:
    if part.name == "live":
        head: tuple[str, ...] = ("", "rows", "p50, ms", "of it to the log, ms", "of it to the view, ms", "p99, ms")
        named = [(shown.view, shown) for shown in part.shown]
        named += [(f"{shown.view}, all at once", shown) for shown in part.together]
        rows = [
            (
                name,
                str(shown.samples),
                *(f"{value:.1f}" for value in (shown.p50, shown.log, shown.p50 - shown.log, shown.p99)),
            )
            for name, shown in named
        ]
    else:
        head = ("", "runs", "s", "1/s", "CPU s", "peak MB")
        rows = [_row(runs) for runs in (_ours(part), [theirs for _, theirs in part.pairs], part.limits) if runs]
    return ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]


def _row(runs: Sequence[Run]) -> tuple[str, ...]:
    def mid(value: Callable[[Run], float]) -> float:
        return median(value(run) for run in runs)

    figures = (
        f"{mid(lambda run: run.seconds):.1f}",
        f"{mid(lambda run: run.rate):,.0f}",
        f"{mid(lambda run: run.cpu):.1f}",
    )
    return (runs[0].kind, str(len(runs)), *figures, f"{mid(lambda run: run.peak) / _MEGA:.0f}")


def main() -> None:
    """Run it; an error of ours is printed in three lines. SIGTERM ends what was started too."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))
    try:
        typer.run(views)
    except HeadraceError as error:
        print_error(error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
