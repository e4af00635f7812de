"""Fixtures by family, one file each in tests/fixtures."""

from __future__ import annotations

pytest_plugins = ["tests.fixtures.stack"]
