"""What is told of the jobs: what is to be read again, and what the log lacks."""

from __future__ import annotations

from collections.abc import Collection, Container

from headrace_capture.jobs import DONE, FAILED, Job
from headrace_capture.progress import Progress

_TOLD = 5
"""So many jobs are told in a report."""


def tell(jobs: Collection[Job], captured: Container[str], progress: Progress, *, initial: bool) -> None:
    """Report what is to be read again, and what the log lacks since it could not be read: nothing else ever shows that.

    `captured`: the tables that the log has; `initial`: whether the initial snapshot is not complete yet.
    """
    lacking = {job.name: job for job in jobs if _lacks(job, captured)}
    told = [
        f"{job.name}: {job.told()}" for job in jobs if job.open or (job.phase == FAILED and job.name not in lacking)
    ]
    progress.fact("resnapshot", "; ".join(_few(told)))
    progress.fact("unread", _few([job.missed() for job in lacking.values()]))
    if initial:
        done = [job.phase == DONE for job in jobs if job.initial]
        progress.phase("snapshot", progress=(sum(done), len(done)))


def _lacks(job: Job, captured: Container[str]) -> bool:
    """Whether its table could not be read, and the log has at most what came of it since, or the initial snapshot is not complete."""
    never = job.initial or (job.floor and not job.first) or job.table not in captured
    return job.phase == FAILED and bool(never)


def _few(told: list[str]) -> list[str]:
    more = [f"and {len(told) - _TOLD} more: headrace resnapshot --status"] if len(told) > _TOLD else []
    return told[:_TOLD] + more
