"""Several views: built together, and promoted at one L, one after the other (S24).

For a promotion each runner is asked twice. First all live generations are held, and L is the highest state at which one of them stands;
then each new generation reaches L and its store's pointer moves. So no view's old generation has shown anything beyond L, and no new one
shows anything before it. Whoever fails or dies between leaves nothing held: a hold ends by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from headrace.change import Version
from headrace.control import Control
from headrace.errors import HeadraceError

_SECONDS = 120.0


def rebuild(control: Control, names: Sequence[str], prints: Mapping[str, str]) -> dict[str, int]:
    """Begin a build of each view, of none where nobody runs one of them; return the generations, by name.

    Its process refuses it where that runs code of another fingerprint than that in `prints`, by name.

    Raises:
        HeadraceError: what a runner refuses it with; it says which builds have begun.
    """
    for name in names:
        control.running(name)
    began: dict[str, int] = {}
    try:
        for name in names:
            args = {"fingerprint": prints[name]} if name in prints else {}
            began[name] = int(control.ask(name, "rebuild", args)["generation"])
    except HeadraceError as error:
        said = [f"Generation {number} of {name} is being built." for name, number in began.items()]
        raise type(error)(error.code, " ".join([error.message, *said]), error.remedy) from error
    return began


def promote(control: Control, wanted: Mapping[str, int | None]) -> list[dict[str, Any]]:
    """Promote one generation of each view, the newest when None; return for each its name, generation and version.

    Raises:
        HeadraceError: what a runner refuses it with; with several views it says which of them stands where.
    """
    if len(wanted) == 1:
        ((name, number),) = wanted.items()
        live = next((report.generation for report in control.running(name) if report.live), 0)
        asked: dict[str, int | None] = {"generation": number, "from": live}  # asked twice it goes on once
        return [{"name": name} | control.ask(name, "promote", asked, _SECONDS)]
    held: dict[str, dict[str, Any]] = {}
    done: list[dict[str, Any]] = []
    name = ""
    try:
        for name, number in wanted.items():
            held[name] = control.ask(name, "hold", {"generation": number}, _SECONDS)
        at = max(Version(*each["version"]) for each in held.values())
        for name in wanted:
            args = {"generation": held[name]["generation"], "at": list(at)}
            done.append({"name": name} | control.ask(name, "promote", args, _SECONDS))
    except HeadraceError as error:
        left = list(wanted)[len(done) :]
        for other in left:
            with suppress(HeadraceError):
                control.ask(other, "release")
        raise _half_way(error, done, left, name) from error
    return done


def _half_way(error: HeadraceError, done: list[dict[str, Any]], left: list[str], asked: str) -> HeadraceError:
    """Return the error, which came when `asked` was asked, with where each view stands."""
    silent = asked if error.code in {"no-answer", "worker-busy"} else ""  # who did not answer may yet have done it
    stand = [f"{each['name']}: generation {each['generation']} is live." for each in done]
    stand += [f"{name}: see headrace status {name}." if name == silent else f"{name}: not promoted." for name in left]
    again = f"{error.remedy} Then: headrace promote {' '.join(left)}".strip()
    return type(error)(error.code, " ".join([error.message, *stand]), again)
