"""What holds for all unit tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from headrace.documents import local


@pytest.fixture(autouse=True, scope="session")
def committed_loads() -> Iterator[None]:
    """A load is committed with each batch, so that a kill finds something to go on from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "RARELY_SECONDS", 0.0)
        yield
