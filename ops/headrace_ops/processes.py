"""Operating system processes that outlive whoever started them, and are never confused with others.

A process is known by its id *and* its start time, so that a signal never reaches a stranger who got the id later.
Each server leads a session of its own; its family is whoever descends from it or is in its group
(Postgres's backends each lead a group of their own, Elasticsearch's launcher has the server as its child).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from headrace.errors import Misconfigured


class Process(NamedTuple):
    """A process id with its start time, in clock ticks since the machine started."""

    pid: int
    started: int


class _Stat(NamedTuple):
    process: Process
    parent: int
    group: int
    running: bool


def boot_id() -> str:
    """Return what tells this run of the machine from every other."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@cache
def server_user() -> pwd.struct_passwd | None:
    """Return the user that servers run as: None for whoever we are, an unprivileged one when we are root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return pwd.getpwuid(65534)


def own(path: Path) -> Path:
    """Make the folder `path` if need be and give it to the servers' user."""
    path.mkdir(parents=True, exist_ok=True)
    user = server_user()
    if user:
        os.chown(path, user.pw_uid, user.pw_gid)
    return path


def drop_privileges() -> dict[str, object]:
    """Return what `subprocess` needs to run something as the servers' user."""
    user = server_user()
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}


def spawn(command: Sequence[str], *, folder: Path, log: Path, environ: Mapping[str, str]) -> int:
    """Start `command` as the servers' user in a session of its own, its output appended to `log`; return its id."""
    with log.open("ab") as output:
        child: subprocess.Popen[bytes] = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **drop_privileges(),  # type: ignore[call-overload]
        )
    _children.append(child)
    return child.pid


def run(command: Sequence[str], *, folder: Path, environ: Mapping[str, str]) -> None:
    """Run `command` as the servers' user to its end. Raises Misconfigured `server-died` with what it said."""
    done = subprocess.run(  # type: ignore[call-overload]
        command, cwd=folder, env=dict(environ), capture_output=True, text=True, check=False, **drop_privileges()
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-800:]
        raise Misconfigured("server-died", f"{Path(command[0]).name} failed: {said}", "Remove the stack's folder.")


def identify(pid: int) -> Process | None:
    """Return the running process that has this id now."""
    stat = _stat(pid)
    return stat.process if stat else None


def alive(process: Process) -> bool:
    """Whether it still runs; an ended one that nobody has waited for does not."""
    stat = _stat(process.pid)
    return stat is not None and stat.process == process and stat.running


def family(root: Process) -> list[Process]:
    """Return `root`, its descendants and its group, as far as they run; `root` first."""
    ids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    stats = [stat for pid in ids if (stat := _stat(pid))]
    if any(stat.process.pid == root.pid and stat.process != root for stat in stats):
        return []
    members = {stat.process.pid for stat in stats if stat.group == root.pid and stat.process.started >= root.started}
    size = -1
    while size != len(members):
        size = len(members)
        members |= {stat.process.pid for stat in stats if stat.parent in members}
    running = [stat.process for stat in stats if stat.process.pid in members and stat.running]
    return sorted(running, key=lambda process: process != root)


def send(process: Process, number: signal.Signals) -> None:
    """Signal exactly this process; nobody if it has ended, whoever has its id now."""
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(process.pid)
        try:
            if alive(process):
                signal.pidfd_send_signal(handle, number)
        finally:
            os.close(handle)


def wait_gone(processes: Sequence[Process], seconds: float) -> list[Process]:
    """Wait until all have ended; return those that have not after `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def reap() -> None:
    """Let go of our own children that have ended, so that they do not stay as zombies."""
    for child in _children[:]:
        if child.poll() is not None:
            # Servers are stopped at once, each in a thread: another one may have been faster.
            with contextlib.suppress(ValueError):
                _children.remove(child)


_children: list[subprocess.Popen[bytes]] = []


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    # "ZX" is said of the first thread alone: others may still hold files and ports
    running = fields[0] not in "ZX" or int(fields[17]) > 1
    return _Stat(Process(pid, int(fields[19])), int(fields[1]), int(fields[2]), running)
