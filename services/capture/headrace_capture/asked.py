"""What is asked of capture through `headrace.control` (S30): to read again, to pause, to resume, to cancel.

A request changes jobs, and is answered once the jobs' records are in the log: whoever got an answer need not ask again. After a kill
between the two it is still there, and its id tells that it was carried out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from headrace.change import Checkpoint
from headrace.control import Control, refusal
from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace.requests import Request
from headrace_capture.cut import Cut
from headrace_capture.jobs import CANCELLED, DONE, FAILED, LEFT, PAUSED, READING, WAITING, Job, Jobs
from headrace_capture.progress import NAME
from headrace_capture.relations import Relations


class Asked:
    """Carries out requests."""

    def __init__(
        self, control: Control, jobs: Jobs, relations: Relations, cut: Cut, disturb: Callable[[str], None]
    ) -> None:
        """Change `jobs`; `disturb` is told of a table whose reading is no longer wanted."""
        self._control = control
        self._jobs = jobs
        self._relations = relations
        self._cut = cut
        self._disturb = disturb
        self._answers: list[tuple[Request, dict[str, Any], Checkpoint]] = []

    def take(self, request: Request) -> None:
        """Carry out a request; it is answered when that is in the log. One that nobody waits for any more is taken away."""
        if request.given_up:
            with suppress(Transient):
                self._control.take_away(NAME, request)
            return
        try:
            answer = self._carried_out(request)
        except HeadraceError as error:
            answer = refusal(error)
        self._answers.append((request, answer, self._cut.sealed))

    def _carried_out(self, request: Request) -> dict[str, Any]:
        verbs = {"resnapshot": self._again, "pause": self._pause, "resume": self._resume, "cancel": self._cancel}
        verb = verbs.get(request.verb)
        if verb is None:
            raise Misconfigured("unknown-request", f"Capture does not know {request.verb!r}.", "Use one version.")
        return verb(request)

    def answer(self) -> None:
        """Answer what has been carried out, once a cut was sealed since, or when there is nothing to be sealed."""
        open_ = bool(self._cut.writer.opened_at)
        waiting = [answer for answer in self._answers if open_ and answer[2] is self._cut.sealed]
        ready = [answer for answer in self._answers if answer not in waiting]
        self._answers = waiting
        for request, answer, _ in ready:
            with suppress(Transient):
                self._control.answer(NAME, request, answer)

    def _again(self, request: Request) -> dict[str, Any]:
        tables = request.args.get("tables") or sorted(self._jobs.prints.keys() & self._relations.shapes.keys())
        # One that joined and could not be read has a job, and no shape yet.
        unknown = [table for table in tables if table not in self._relations.shapes and table not in self._jobs.all]
        if unknown:
            raise Misconfigured(
                "table-not-captured",
                f"Capture has no table {', '.join(unknown)}.",
                "Run: headrace setup --table TABLE --apply",
            )
        jobs = [Job(table, request.args.get("key"), request=request.id) for table in tables]
        for job in jobs:
            known = self._jobs.all.get(job.name)
            if known is not None and known.request == request.id:
                continue  # asked before a kill, and not answered
            if known is not None and known.phase != DONE:  # a cancelled one too: it may not forget what it waited for
                self._begin_again(known, request.id)
            else:
                self._jobs.put(job)
        return {"jobs": [job.name for job in jobs]}

    def _begin_again(self, job: Job, request: str) -> None:
        job.request = request
        job.begin_again()
        self._disturb(job.table)
        self._jobs.put(job)

    def _named(self, request: Request) -> list[Job]:
        tables, key = request.args.get("tables"), request.args.get("key")
        return [
            job
            for job in self._jobs.all.values()
            if (job.open or job.phase == FAILED)
            and (not tables or job.table in tables)
            and (key is None or job.key == key)
        ]

    def _pause(self, request: Request) -> dict[str, Any]:
        return self._set(request, {WAITING, READING}, PAUSED)

    def _resume(self, request: Request) -> dict[str, Any]:
        return self._set(request, {PAUSED}, WAITING)

    def _set(self, request: Request, phases: set[str], phase: str) -> dict[str, Any]:
        changed = [job for job in self._named(request) if job.phase in phases]
        for job in changed:
            job.phase = READING if phase == WAITING and job.first else phase
            self._jobs.put(job)
        return {"jobs": [job.name for job in changed]}

    def _cancel(self, request: Request) -> dict[str, Any]:
        jobs = self._given_up(request)
        for job in jobs:
            job.phase = CANCELLED
            self._disturb(job.table)
            if job.key is not None or job.table in self._cut.inexact:
                self._jobs.put(job)  # or a row would pass for read, and such a table begin again by itself
            elif job.table not in self._jobs.prints:
                self._jobs.put(replace(job, phase=LEFT))  # it is published no more, which nobody has decided yet
            else:
                self._jobs.drop(job.name)
        return {"jobs": [job.name for job in jobs]}

    def _given_up(self, request: Request) -> list[Job]:
        """Return the jobs that can be cancelled; refuse what cannot, but where all is to be cancelled that can."""
        jobs = self._named(request)
        initial = [job.name for job in jobs if job.initial]
        if initial:
            raise Misconfigured(
                "snapshot-not-cancelled",
                f"{', '.join(initial)}: without the initial snapshot there is no log.",
                "Pause it: headrace resnapshot --pause",
            )
        joined = [job for job in jobs if job.table not in self._relations.shapes]
        if joined and (request.args.get("tables") or joined == jobs):
            raise Misconfigured(
                "snapshot-not-cancelled",
                f"{', '.join(job.name for job in joined)}: what is published, and was never read, is read by itself.",
                "Take it out of the publication, or pause it: headrace resnapshot --pause",
            )
        return [job for job in jobs if job not in joined]
