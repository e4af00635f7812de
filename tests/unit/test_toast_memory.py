"""What capture remembers of large values (S7)."""

from __future__ import annotations

from typing import Any

from headrace_capture import toast

T = "public.docs"


def test_memory_is_bounded() -> None:
    """The key that was seen longest ago is forgotten first."""

    class Wide:
        name = T
        wide = (0,)

    table: Any = Wide()
    memory = toast.Memory(most=5_000)
    for key in (b"1", b"2", b"3"):
        memory.changed(table, key, key, [b"x" * 2_000], 2_000)
    row: list[Any] = [toast.UNCHANGED]
    memory.recall(table, b"1", row)
    assert row == [toast.UNCHANGED]
    memory.recall(table, b"3", row)
    assert row == [b"x" * 2_000]
