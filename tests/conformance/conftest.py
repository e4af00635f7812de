"""Every test of the suite waits less for what it knows."""

from __future__ import annotations

import pytest

from headrace.documents import local
from headrace.stores.redis import pages


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is kept out is so however long it waits, the dead hold no lock, and no reader has taken the pointer by itself."""
    monkeypatch.setattr(local, "LOCKED_SECONDS", 0.2)
    monkeypatch.setattr(pages, "_GRACE_SECONDS", 0.05)
