"""The programs of the demo: the `headrace` command line as child processes, each with its output in a file."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson

from headrace.errors import Misconfigured, Transient

HEADRACE = (sys.executable, "-m", "headrace")
_STOP_SECONDS = 15.0
_WELL = b"well"
_ELSEWHERE = ("COMPOSE_PROJECT_NAME", "SHOP_DSN")


class Programs:
    """Runs `headrace` with one environment; nothing that it started outlives `stop_all`."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        """Keep outputs in `folder`; add `environment` to what is `inherited`."""
        self.folder = folder
        self.environment = {**inherited(), **environment}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> int:
        """Start `headrace command` in the background, as `name`; return its pid. Its output goes to `<name>.log`."""
        with self.output(name).open("ab") as output:
            process = subprocess.Popen(
                [*HEADRACE, *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._running[name] = process
        (self.folder / f"{name}.pid").write_text(str(process.pid))
        return process.pid

    def output(self, name: str) -> Path:
        """Return the file of a program's output."""
        return self.folder / f"{name}.log"

    def alive(self, name: str) -> bool:
        """Return whether a background program still runs."""
        return name in self._running and self._running[name].poll() is None

    def kill(self, name: str) -> int:
        """End a program by SIGKILL; return its pid."""
        process = self._running.pop(name)
        process.kill()
        process.wait()
        return process.pid

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> str:
        """End a program as its operator would, by force when it takes too long; return its output."""
        process = self._running.pop(name)
        process.send_signal(number)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return self.output(name).read_text(errors="replace")

    def stop_all(self) -> None:
        """End every background program, the last one started first."""
        for name in reversed(list(self._running)):
            self.stop(name)

    def run(self, *command: str, ok: tuple[int, ...] = (0,)) -> str:
        """Run `headrace command` to its end; return its standard output.

        Raises:
            Misconfigured: `demo-step`, with the end of its output, when its exit code is not one of `ok`.
        """
        done = subprocess.run([*HEADRACE, *command], env=self.environment, capture_output=True, check=False)
        if done.returncode not in ok:
            tail = (done.stdout + done.stderr).decode(errors="replace")[-2000:]
            raise Misconfigured(
                "demo-step",
                f"`headrace {' '.join(command)}` ended with {done.returncode}:\n{tail}",
                "See its message above.",
            )
        return done.stdout.decode()

    def facts(self, *command: str, ok: tuple[int, ...] = (0,)) -> Any:
        """Run `headrace command --json` and return what it printed."""
        return orjson.loads(self.run(*command, "--json", ok=ok))

    def wait(self, what: str, reached: Callable[[], bool], seconds: float = 120.0) -> float:
        """Wait until `reached`, which may raise Transient meanwhile; return how long it took, seconds.

        Raises:
            Transient: `demo-waited`, naming `what`, when that takes too long.
            Misconfigured: `demo-step`, when a background program ends meanwhile.
        """
        start = time.monotonic()
        while not _holds(reached):
            self._check()
            if time.monotonic() > start + seconds:
                raise Transient(
                    "demo-waited", f"Waited {seconds:.0f} s for {what}.", f"Look at the outputs in {self.folder}."
                )
            time.sleep(0.1)
        return time.monotonic() - start

    def _check(self) -> None:
        for name, process in self._running.items():
            if process.poll() is not None:
                tail = self.output(name).read_text(errors="replace")[-2000:]
                raise Misconfigured(
                    "demo-step", f"{name} ended by itself with {process.returncode}:\n{tail}", "See its message above."
                )


def _holds(reached: Callable[[], bool]) -> bool:
    try:
        return reached()
    except Transient:
        return False


def inherited() -> dict[str, str]:
    """Return our environment without what leads to servers that are not the demo's own: it loads into them and removes them."""
    return {
        name: value
        for name, value in os.environ.items()
        if name == "HEADRACE_STACK" or not (name.startswith("HEADRACE_") or name in _ELSEWHERE)
    }


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Within it, our death, even by SIGKILL, ends the programs and the stack whose files are in `folder`."""
    program = "import sys; from headrace_shop.processes import watch; watch(sys.argv[1])"
    command = [sys.executable, "-c", program, str(folder)]
    watcher = subprocess.Popen(command, env=inherited(), stdin=subprocess.PIPE, start_new_session=True)
    said = _WELL
    try:
        yield
    except KeyboardInterrupt:  # somebody interrupted the cleaning up
        said = b""
        raise
    finally:
        watcher.communicate(said)


def watch(folder: str) -> None:
    """Wait for the end of standard input; unless all is well then, end what `folder` names, and remove it."""
    if sys.stdin.buffer.read() == _WELL:
        return
    for file in Path(folder).glob("*.pid"):
        pid = int(file.read_text())
        with suppress(OSError):
            if b"headrace" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
    subprocess.run([*HEADRACE, "stack", "down", "--remove", "--dir", f"{folder}/stack"], check=False)
    shutil.rmtree(folder, ignore_errors=True)
