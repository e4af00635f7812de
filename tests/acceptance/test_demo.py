"""`make demo ONCE=1`: the whole of it holds, and nothing stays behind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 900
"""Longer than it takes on two cores beside the other tests and their servers."""


@pytest.mark.timeout(SECONDS + 60)
def test_the_demo_holds_and_leaves_no_process_and_no_file() -> None:
    command = [sys.executable, "-m", "headrace", "demo", "--once"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-5000:]
    (folder,) = re.findall(r"^  in (/\S+)$", done.stdout, re.MULTILINE)
    closing = re.search(r"log (\d+), dual writes (\d+): all of it held", done.stdout)
    assert closing, said[-5000:]
    assert int(closing[1]) == 0 < int(closing[2])
    assert not Path(folder).exists()
    assert of_the_demo(folder) == []


def of_the_demo(folder: str) -> list[str]:
    """Return the command line of each process that has the folder in it or in its environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command, environ = ((entry / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:  # it has ended
            continue
        if folder.encode() in command + environ:
            found.append(command.replace(b"\0", b" ").decode())
    return found
