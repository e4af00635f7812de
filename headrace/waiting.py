"""Waiting until readers of a view see everything up to a version: what a causality token is for (S25).

A view says once a second how far it is, so that is how soon it is known.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from headrace.change import Source, Version
from headrace.control import Control, Report
from headrace.errors import Misconfigured, Transient
from headrace.parked import records_parked

_POLL_SECONDS = 0.1


def reached(
    control: Control,
    name: str,
    wanted: Version,
    seconds: float,
    generation: int | None = None,
    told: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Wait until a generation of a view, the live one when None, shows `wanted`; return what it says then. Meanwhile `told` is called
    with what it says, the newest one while none is live.

    Raises:
        Misconfigured: `consumer-not-running`, `no-live-generation`, `records-parked`, `view-paused`, `stale-generation`,
            `no-such-generation`, and what stopped the view or its promotion: it will not come there. `token-void`, when the view has come
            to a later epoch (S2).
        Transient: `view-behind`.
    """
    deadline = time.monotonic() + seconds
    while True:
        report = _of(control, name, generation)
        if report is not None:
            check_epoch(wanted, report.version)
        if report is not None and report.version >= wanted:
            return report
        newest = report or control.running(name)[-1]
        if report is not None:
            check_whole(report)
            check_not_paused(report)
        else:
            _check_becomes_live(newest)
        if time.monotonic() > deadline:
            stands = f"is at {report.version}" if report else "has no live generation"
            said = f"{name} {stands}, not at {wanted}, after {seconds:.0f} s."
            raise Transient("view-behind", said, "See: headrace status")
        told(newest)
        time.sleep(_POLL_SECONDS)


def check_epoch(wanted: Version, now: Version) -> None:
    """Refuse a version of an epoch before that of `now` (S2)."""
    if wanted.epoch < now.epoch:
        raise Misconfigured(
            "token-void",
            f"{wanted} is of an epoch before {now}: what was written then may be lost.",
            "Write it again where it is missing; then ask again.",
        )


def check_server(log: Source, system_id: str, database: str) -> None:
    """Refuse another server or database than the log's: neither its LSN nor its rows say how far or how right a view is [I12]."""
    if (system_id, database) != (log.system_id, log.database):
        raise Misconfigured(
            "other-source",
            f"The log is of database {log.database} of system {log.system_id}; HEADRACE_DSN leads to {database} of {system_id}.",
            "Let HEADRACE_DSN name the first, as capture's does, or HEADRACE_SOURCE the log of the second.",
        )


def check_code(name: str, runs: str, here: str) -> None:
    """Refuse to compare a view by code of another fingerprint than that which its process runs."""
    if runs != here:
        said = f"The process of {name} runs other code than is here."
        start = f"If that was changed since, start that process again, then: headrace rebuild {name} --wait"
        raise Misconfigured(
            "other-code", said, f"{start}. Else run this where its code is, in its container for example."
        )


def check_whole(report: Report) -> None:
    """Refuse a view that has stopped, with its reason, and one that cannot equal Postgres because records are parked."""
    if parked := report.facts.get("parked"):
        raise records_parked(report.name, report.generation, parked)
    check_not_stopped(report)


def check_not_stopped(report: Report) -> None:
    """Refuse a view that has stopped, with its reason."""
    if report.phase in {"stopped", "stale"}:
        said = f"{report.name} has stopped at {report.version}: {report.reason or report.phase}"
        remedy = report.remedy or f"Run: headrace rebuild {report.name}"
        raise Misconfigured(report.code or "stale-generation", said, remedy)


def check_not_paused(report: Report) -> None:
    """Refuse a view that is paused."""
    if report.phase == "paused":
        said = f"{report.name} is paused at {report.version}."
        raise Misconfigured("view-paused", said, f"Run: headrace resume {report.name}")


def _check_becomes_live(report: Report) -> None:
    """Refuse a view of which no generation is live when its newest will not become so before somebody changes something."""
    check_not_stopped(report)
    check_not_paused(report)
    if report.phase == "dropped":
        raise Misconfigured("no-such-generation", f"{report.name} is dropped.", f"Run: headrace rebuild {report.name}")
    if report.phase == "following" and report.code:
        raise Misconfigured(report.code, f"{report.name} cannot be promoted: {report.reason}", report.remedy)


def _of(control: Control, name: str, generation: int | None) -> Report | None:
    found = [
        each for each in control.running(name) if (each.live if generation is None else each.generation == generation)
    ]
    if not found and generation is not None:
        raise Misconfigured("no-live-generation", f"Generation {generation} of {name} is gone.", "Run it again.")
    return found[0] if found else None
