"""How facts are shown: to people in colour, to scripts as JSON."""

from __future__ import annotations

import sys
import time
from typing import Any

import orjson
import typer
from rich.console import Console

from headrace.errors import USAGE, HeadraceError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_MOMENT_SECONDS = 2.0
_AGAIN_SECONDS = 60.0


def print_error(error: HeadraceError) -> None:
    """Print what was seen, what to do, and where to read more."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("[red]error:[/red]", end=" ")
    console.print(error.message, markup=False)
    if error.remedy:
        console.print("   [bold]do:[/bold]", end=" ")
        console.print(error.remedy, markup=False)
    console.print(f"   [dim]code {error.code}: see ops/runbook.md[/dim]")


def print_json(facts: Any) -> None:
    """Print facts as one JSON document."""
    typer.echo(orjson.dumps(facts, option=orjson.OPT_INDENT_2).decode())


def agree(refused: str, *, ask: bool = True) -> None:
    """Ask whether what was told is done. Raises typer.Exit: 2, when nobody agrees, or there is nobody to `ask`: then it says `refused`."""
    if not ask or not sys.stdin.isatty():
        typer.echo(f"{refused} Say --yes to do it.", err=True)
        raise typer.Exit(USAGE)
    if not typer.confirm("Do this?"):
        raise typer.Exit(USAGE)


class Telling:
    """Tells who waits how far it is, in lines on stderr: each change of phase, and about once a minute what has moved meanwhile.

    A log or a person without a terminal sees so that it goes on; of what is over in a moment nothing is said.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._told: dict[str, tuple[str, str, float]] = {}

    def tell(self, name: str, phase: str, far: str = "") -> None:
        """Take how it stands with `name`; called again and again."""
        now = time.monotonic()
        before, moved, at = self._told.get(name, ("", "", 0.0))
        if now - self._began < _MOMENT_SECONDS or (phase == before and (far == moved or now - at < _AGAIN_SECONDS)):
            return
        self._told[name] = phase, far, now
        typer.echo(f"{name}: {phase}{', ' if far else ''}{far}", err=True)


def size(count: float) -> str:
    """Return a number of bytes for people: ``1.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds(count: float) -> str:
    """Return a time span for people: ``0.4 s``, ``3 min``, ``2 h``."""
    if count < 60:
        return f"{count:.1f} s"
    return f"{count / 60:.0f} min" if count < 7200 else f"{count / 3600:.0f} h"
