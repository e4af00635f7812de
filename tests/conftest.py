"""Fixtures by family, one file each in tests/fixtures: all of them are there for every test."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Who runs the tests in the background of a script has SIGINT ignored, and so would every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is.
settings.register_profile("headrace", deadline=None)
settings.load_profile("headrace")

# They import each other before pytest comes to the last of them.
pytest.register_assert_rewrite("tests.fixtures")

pytest_plugins = [
    f"tests.fixtures.{path.stem}"
    for path in sorted((Path(__file__).parent / "fixtures").glob("*.py"))
    if path.stem != "__init__"
]
