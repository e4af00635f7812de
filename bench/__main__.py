"""`make bench-capture`: headrace's capture and Debezium in turn on the same servers and rows. See README.md in this folder."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench import report, servers, source
from bench.parts import FULL, PARTS, QUICK, Bench, Part
from headrace.cli.show import print_error, print_json
from headrace.errors import HeadraceError

RESULTS = Path(__file__).with_name("results.md")
Only = Annotated[str, typer.Option("--only", help=f"Parts, separated by commas, of: {', '.join(PARTS)}.")]
Ours = Annotated[bool, typer.Option("--ours", help="Headrace only, without Debezium.")]
Quick = Annotated[bool, typer.Option("--quick", help="Few rows, one pair: to see that it works.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as one JSON document.")]

_app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="markdown")
_console = Console(stderr=True, highlight=False, soft_wrap=True)


@_app.command()
def bench(only: Only = "", ours: Ours = False, quick: Quick = False, json: AsJson = False) -> None:
    """Measure, print ratios; a whole run (every part, both tools, not --quick) also writes bench/results.md.

    Examples:

        python -m bench

        python -m bench --quick --ours --only single
    """
    names = _names(only)
    sizes = QUICK if quick else FULL
    with servers.running() as (postgres, kafka, folder), _console.status("starting") as status:

        def say(line: str, *, lasting: bool = False) -> None:
            if lasting or not _console.is_terminal:
                _console.print(line, markup=False)
            status.update(line)

        told = report.conditions(sizes, source.version(postgres))
        runner = Bench(postgres, kafka, folder, sizes, say, ours=ours)
        parts = [_show(runner.run(name)) for name in names]
    if json:
        print_json(report.facts(parts, told))
    if names == list(PARTS) and not ours and not quick:
        RESULTS.write_text(report.page(parts, told))
        _console.print(f"written: {RESULTS}", markup=False)


def _names(only: str) -> list[str]:
    names = [name.strip() for name in only.split(",") if name.strip()] or list(PARTS)
    if unknown := set(names) - set(PARTS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}.")
    return names


def _show(part: Part) -> Part:
    _console.print(f"[bold]{part.name}[/bold]")
    for ratio in report.ratios(part):
        _console.print(f"  {ratio.told()}", markup=False)
    return part


def main() -> None:
    """Run it; an error of ours is printed in three lines. SIGTERM ends what was started too."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))
    try:
        _app()
    except HeadraceError as error:
        print_error(error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
