"""Find a Java runtime that can run the servers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from headrace.errors import Misconfigured

OLDEST = 21
MODULE = "jdk.incubator.vector"
_FOLDERS = ("/usr/lib/jvm", "/usr/java", "/opt", "/opt/java", "~/.sdkman/candidates/java")


@cache
def find() -> Path:
    """Return the home of the newest Java that is at least `OLDEST` and has the module that Elasticsearch needs.

    Raises:
        Misconfigured: `no-java`, with what was looked at.
    """
    seen = {home: _version(home) for home in dict.fromkeys(_homes())}
    fit = [(version, home) for home, (version, complete) in seen.items() if version >= OLDEST and complete]
    if fit:
        return max(fit)[1]
    found = ", ".join(_describe(home, *seen[home]) for home in seen) or "none"
    raise Misconfigured(
        "no-java",
        f"Kafka and Elasticsearch need Java {OLDEST} or newer with the module {MODULE}; found: {found}.",
        "Install one (Debian: apt-get install openjdk-21-jdk-headless; or a Temurin JDK), or point JAVA_HOME at one.",
    )


def _homes() -> Iterator[Path]:
    if "JAVA_HOME" in os.environ:
        yield Path(os.environ["JAVA_HOME"]).resolve()
    on_path = shutil.which("java")
    if on_path:
        yield Path(on_path).resolve().parent.parent
    for folder in _FOLDERS:
        for java in sorted(Path(folder).expanduser().glob("*/bin/java")):
            yield java.resolve().parent.parent


def _version(home: Path) -> tuple[int, bool]:
    """Return the major version, 0 if it does not run, and whether it has the module."""
    try:
        run = subprocess.run(
            [home / "bin/java", "--list-modules"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0, False
    major = re.search(r"^java\.base@(\d+)", run.stdout, re.MULTILINE)
    return int(major[1]) if major else 0, f"{MODULE}@" in run.stdout


def _describe(home: Path, version: int, complete: bool) -> str:
    if not version:
        return f"{home} (older than 9, or it does not run)"
    lacking = "" if complete else f" without {MODULE}"
    return f"{home} (Java {version}{lacking})"
