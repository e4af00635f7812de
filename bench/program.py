"""A program that is measured: a child process, what it has used of the processor, and how much memory it held at most.

Both are read from /proc while it runs: of the process, of every process that it started, and of those that have ended
(the kernel adds them to their parent). A look costs some microseconds; the search for new children is made less often.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from headrace.errors import Transient
from headrace_ops import processes
from headrace_ops.processes import Process

_TICKS = os.sysconf("SC_CLK_TCK")
_SEARCH_SECONDS = 0.5
_STOP_SECONDS = 60.0


class Program:
    """One run of a program.

    Attributes:
        name: For messages, and of the file of its output.
        started_at: `time.monotonic()` just before it was started.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        """Start it, in `folder`, with `environment` added to ours."""
        self.name = name
        self._log = folder / f"{name}.log"
        self._searched_at = 0.0
        self._members: list[Process] = []
        self._peaks: dict[int, int] = {}
        self._cpu = 0.0
        with self._log.open("wb") as output:
            self.started_at = time.monotonic()
            self._child = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def cpu(self) -> float:
        """Return the seconds, user and system, that it and its children have used so far."""
        self._search()
        self._cpu = max(self._cpu, sum(_cpu(process.pid) for process in self._members))
        return self._cpu

    def peak(self) -> int:
        """Return the most memory that it held (bytes resident); with children the sum of what each held at most."""
        self._search()
        for process in self._members:
            self._peaks[process.pid] = max(self._peaks.get(process.pid, 0), _peak(process.pid))
        return sum(self._peaks.values())

    def check(self) -> None:
        """Raise Transient `bench-program-ended` if it no longer runs."""
        if self._child.poll() is not None:
            self._fail(f"ended with exit code {self._child.returncode}")

    def wait(self, seconds: float) -> None:
        """Wait until it ends by itself, well, counting what it uses. Raises Transient `bench-program-ended`."""
        deadline = self.started_at + seconds
        while self._child.poll() is None:
            self.cpu()
            self.peak()
            if time.monotonic() > deadline:
                self.stop()
                self._fail(f"did not end within {seconds:.0f} s")
            time.sleep(0.01)
        if self._child.returncode:
            self._fail(f"ended with exit code {self._child.returncode}")

    def said(self) -> str:
        """Return its output so far."""
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        """End it as its operator would, by force when it takes too long; whatever it started ends with it."""
        self._search(now=True)
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(_STOP_SECONDS)
        self._kill_members()

    def kill(self) -> None:
        """End it by SIGKILL, now, and whatever it started."""
        self._search(now=True)
        self._kill_members()

    def _kill_members(self) -> None:
        for process in self._members:
            processes.send(process, signal.SIGKILL)
        self._child.wait()

    def _search(self, *, now: bool = False) -> None:
        at = time.monotonic()
        if now or at - self._searched_at > _SEARCH_SECONDS:
            self._searched_at = at
            root = processes.identify(self._child.pid)
            self._members = processes.family(root) if root else []

    def _fail(self, how: str) -> None:
        last = "\n  ".join([line for line in self.said().splitlines() if line.strip()][-12:])
        raise Transient("bench-program-ended", f"{self.name} {how}; its last words:\n  {last}", "Run it again.")


def _cpu(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    fields = text[text.rindex(")") + 2 :].split()
    return sum(int(field) for field in fields[11:15]) / _TICKS


def _peak(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
