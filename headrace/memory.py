"""How a process that moves much data uses its memory: said once, before its threads begin."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

_M_ARENA_MAX = -8
_COLLECT_AFTER = 200_000


def use_few_arenas() -> None:
    """Let glibc's threads share two pools of memory (mallopt(3)). By default each of librdkafka's has its own, in which holes stay: in a
    TRUNCATE of ten million rows they grew by some MB a minute [I10]."""
    with suppress(AttributeError, OSError):  # another libc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def collect_rarely() -> None:
    """Let the garbage collector, which is for cycles, look after many more new objects than by default: changes and documents come by the
    ten thousand and go by themselves, and looking at each of them several times was a fifth of a consumer's time."""
    gc.set_threshold(_COLLECT_AFTER)
