"""The backend of `Server` that runs ordinary processes.

Everything about one server lies in the stack's folder: ``<name>.json`` (its process and ports), ``data/<name>``,
``conf/<name>`` and ``logs/<name>.log``. The state file is what any process needs to find, signal and stop the server:
whoever started it may be long gone.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any, ClassVar

from headrace.errors import Misconfigured, Transient
from headrace_ops import ports, processes
from headrace_ops.artifacts import Artifact, check_space, disk_full
from headrace_ops.processes import Process
from headrace_ops.server import Report, silent

_DEADLINE = 240.0
_NOT_YET = (OSError, EOFError, ValueError)


class ProcessServer(ABC):
    """One server as a process.

    Args:
        folder: The stack's folder; made if need be.
        given: Ports that must be used, by the names in `usual_ports`.
        spread: Choose random ports even where the usual ones are free.
        report: Told how long the server has been starting.
    """

    name: ClassVar[str]
    usual_ports: ClassVar[Mapping[str, int | None]]
    """Each port that the server needs; the first, named as the server itself, is that of its address."""
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    stop_seconds: ClassVar[float] = 20
    usual_seconds: ClassVar[float] = 1
    """How long it usually takes to start: the length of its progress bar."""

    def __init__(
        self, folder: Path, *, given: Mapping[str, int] | None = None, spread: bool = False, report: Report = silent
    ) -> None:
        self.folder = folder.absolute()
        self.cancelled = Event()
        """Set by another thread to make `start` give up."""
        self._given = {name: port for name, port in (given or {}).items() if name in self.usual_ports}
        self._spread = spread
        self._report = report

    # what each server says of itself

    @abstractmethod
    def artifact(self) -> Artifact | None:
        """Return what must be in the cache before it can start."""

    @abstractmethod
    def prepare(self) -> None:
        """Write its configuration, and make its data if there is none."""

    @abstractmethod
    def command(self) -> list[str]:
        """Return the command line that runs it in the foreground."""

    @abstractmethod
    def probe(self) -> None:
        """Ask it something. Raises OSError, EOFError or ValueError while it cannot answer yet."""

    @abstractmethod
    def address(self) -> str:
        """Return where it listens, in the form of its setting."""

    def environ(self) -> dict[str, str]:
        """Return the environment of its process."""
        return {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "HOME": str(self.data)}

    # places

    @property
    def data(self) -> Path:
        """Where its data is."""
        return self.folder / "data" / self.name

    @property
    def conf(self) -> Path:
        """Where its configuration is."""
        return self.folder / "conf" / self.name

    @property
    def log(self) -> Path:
        """Its output."""
        return self.folder / "logs" / f"{self.name}.log"

    @property
    def _old_log(self) -> Path:
        """Its output before it was started the last time."""
        return self.log.with_suffix(".log.1")

    @cached_property
    def ports(self) -> dict[str, int]:
        """Return its ports: those it runs at, else those given, those it had before, else chosen now. Recorded at once."""
        before = self._state().get("ports", {})
        given = {} if self.process() else self._given
        chosen = {
            name: given.get(name) or before.get(name) or ports.choose(None if self._spread else usual)
            for name, usual in self.usual_ports.items()
        }
        if chosen != before:
            self._record(ports=chosen)
        return chosen

    @property
    def port(self) -> int:
        """The port of its address."""
        return self.ports[self.name]

    def check_given(self) -> None:
        """Raise Misconfigured `server-runs` if it runs at other ports than those given."""
        if self.process() and self._given.items() - self.ports.items():
            raise Misconfigured(
                "server-runs",
                f"{self.name} runs at {self.address()}; it keeps that port while it runs.",
                f"Run: headrace stack down --only {self.name} --dir {shlex.quote(str(self.folder))}, then up --port again.",
            )

    def recorded(self) -> bool:
        """Whether this folder has its state: it was started here, or about to be."""
        return "ports" in self._state()

    def remove(self) -> None:
        """Remove all that it has in the folder; it does not run."""
        for place in (self.data, self.conf):
            if place.exists():
                shutil.rmtree(place)
        for file in (self.log, self._old_log, *self.folder.glob(f"{self.name}.*.new"), self._state_file):
            file.unlink(missing_ok=True)

    # the interface

    def process(self) -> Process | None:
        """Return its process if it runs."""
        state = self._state()
        if "pid" not in state or state.get("boot") != processes.boot_id():
            return None
        process = Process(state["pid"], state["started"])
        return process if processes.alive(process) else None

    def start(self) -> None:
        """See `Server.start`."""
        running = self.process()
        if running:
            self.resume()
        else:
            self._take_places()
            self.prepare()
            running = self.spawn(self.command())
        self._wait_healthy(running)

    def stop(self) -> None:
        """See `Server.stop`."""
        members = self._signal(self.stop_signal, signal.SIGCONT)
        self._finish(processes.wait_gone(members, self.stop_seconds))

    def kill(self) -> None:
        """See `Server.kill`."""
        self._finish(self._family())

    def pause(self) -> None:
        """See `Server.pause`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """See `Server.resume`."""
        self._signal(signal.SIGCONT)

    def healthy(self) -> bool:
        """Whether it answers now."""
        try:
            self.probe()
        except _NOT_YET:
            return False
        return True

    # how

    def _family(self) -> list[Process]:
        process = self.process()
        return processes.family(process) if process else []

    def _signal(self, *numbers: signal.Signals) -> list[Process]:
        """Signal its process, and for freezing and thawing the whole family; return the family."""
        members = self._family()
        for number in numbers:
            everyone = number in (signal.SIGSTOP, signal.SIGCONT)
            for process in members if everyone else members[:1]:
                processes.send(process, number)
        return members

    def _finish(self, members: list[Process]) -> None:
        """Kill what is left of the family, again if it has grown meanwhile."""
        while members:
            for process in members:
                processes.send(process, signal.SIGKILL)
            members = processes.wait_gone(members, 5) or self._family()
        processes.reap()

    def _take_places(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        check_space(self.folder, 300 << 20)
        _check_reachable(self.folder)
        wanted = self.ports  # recorded first: whatever has state is known to be ours
        for place in (self.data, self.conf, self.log.parent):
            place.parent.mkdir(parents=True, exist_ok=True)
            processes.own(place)
        for name, port in wanted.items():
            if ports.free(port):
                continue
            if name in self._given or self.usual_ports[name]:
                self._raise_taken(name, port)
            self._record(ports=self.ports | {name: ports.choose()})  # of the old one nobody was told
            del self.ports
        if self.log.exists():
            self.log.replace(self._old_log)

    def _raise_taken(self, name: str, port: int) -> None:
        raise Misconfigured(
            "port-taken",
            f"Port {port}, wanted for {name}, is in use by another process.",
            f"Stop that process, or choose another port: headrace stack up --port {self.name}=PORT.",
        )

    def spawn(self, command: Sequence[str]) -> Process:
        """Run `command` as the process of this server, and record it."""
        pid = processes.spawn(command, folder=self.data, log=self.log, environ=self.environ())
        process = processes.identify(pid)
        if process is None:
            raise self._died()
        self._record(pid=process.pid, started=process.started, boot=processes.boot_id())
        return process

    def _wait_healthy(self, process: Process) -> None:
        began = time.monotonic()
        while not self.healthy():
            waited = time.monotonic() - began
            self._report(self.name, min(waited, self.usual_seconds * 0.95), self.usual_seconds)
            if not processes.alive(process):
                raise self._died()
            if waited > _DEADLINE or self.cancelled.wait(0.1):
                raise Transient(
                    "server-slow",
                    f"{self.name} does not answer at {self.address()} after {waited:.0f} s.",
                    f"Look at {self.log}, then run headrace stack up again.",
                )
        self._report(self.name, self.usual_seconds, self.usual_seconds)

    def _died(self) -> Misconfigured:
        """Say why it ended, from the end of its log."""
        tail = self.log.read_text(errors="replace")[-6000:]
        if "No space left on device" in tail:
            raise disk_full(self.folder)
        if "ddress already in use" in tail:
            self._raise_taken(self.name, self.port)
        lines = [line for line in tail.splitlines() if line.strip()][-5:]
        said = "\n  ".join([f"{self.name} ended while starting; its last words:", *lines])
        return Misconfigured("server-died", said, f"Its log is {self.log}.")

    @property
    def _state_file(self) -> Path:
        return self.folder / f"{self.name}.json"

    def _state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(self._state_file.read_text())
        except FileNotFoundError:
            return {}
        return state

    def _record(self, **facts: object) -> None:
        """Add to the state file, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self._state_file.with_suffix(f".{os.getpid()}.new")
        new.write_text(json.dumps(self._state() | facts))
        new.rename(self._state_file)


def _check_reachable(folder: Path) -> None:
    """Raise Misconfigured `stack-folder` if the servers' user cannot get to `folder`."""
    user = processes.server_user()
    if user is None:
        return
    for parent in (folder, *folder.parents):
        facts = parent.stat()
        if not facts.st_mode & stat.S_IXOTH and facts.st_uid != user.pw_uid:
            raise Misconfigured(
                "stack-folder",
                f"The servers run as the user {user.pw_name}, who may not enter {parent}.",
                "Choose another folder with --dir, for example under /var/tmp, or run as an ordinary user.",
            )
