"""Fixtures by family, one file each in tests/fixtures: all of them are there for every test."""

from __future__ import annotations

import signal
from pathlib import Path

# Who runs the tests in the background of a script has SIGINT ignored, and so would every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = [
    f"tests.fixtures.{path.stem}"
    for path in sorted((Path(__file__).parent / "fixtures").glob("*.py"))
    if path.stem != "__init__"
]
