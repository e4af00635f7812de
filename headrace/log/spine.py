"""The checkpoints of a source, made whole as they are read (S16).

With many partitions most checkpoints name only the topics touched since an earlier one, their *base*: a complete one that names all of
them. They add up from the base on, each by itself, so that compaction may remove any of those between. One whose base is not there is
passed over: the next that names every topic is never far.
"""

from __future__ import annotations

from dataclasses import replace

from headrace import codec
from headrace.change import Checkpoint


class Spine:
    """Reads checkpoints in the order of their offsets.

    Attributes:
        passed_over: The offset of the last one whose base is not known, -1 when there was none.
    """

    def __init__(self, known: Checkpoint | None = None) -> None:
        """Go on after `known`, a checkpoint with the ends of every topic."""
        self._known = known
        self.passed_over = -1

    def take(self, value: bytes | None, offset: int, appended: int) -> Checkpoint | None:
        """Return the checkpoint with the ends of every topic; None for a tombstone, or when its base is not known."""
        if value is None:
            return None
        read = codec.decode_checkpoint(value, offset, appended)
        if read.base != read.version.lsn:
            known = self._known
            if known is None or (known.version.epoch, known.base) != (read.version.epoch, read.base):
                self.passed_over = offset
                return None
            read = replace(read, ends=known.ends | read.ends)
        if read.complete:
            self._known = read
        return read
