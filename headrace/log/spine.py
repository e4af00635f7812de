"""The checkpoints of a source: which ends their records name, and how they are made whole as they are read (S16).

With many partitions most checkpoints name only the topics touched since an earlier one, their *base*: a complete one that names all of
them. They add up from the base on, each by itself, so that compaction may remove any of those between. One whose base is not there is
passed over: the next that names every topic is never far.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from headrace import codec
from headrace.change import Checkpoint
from headrace.log.tail import read_to_end
from headrace.log.topics import Topics, checkpoints_topic
from headrace.settings import Settings

WHOLE_PARTITIONS = 256
"""Up to so many partitions every checkpoint names the ends of all of them; above, one in WHOLE_EVERY does."""
WHOLE_EVERY = 100


def kept(settings: Settings, topics: Topics, tick: Callable[[], None]) -> deque[bytes]:
    """Return the keys of the checkpoints that are in their topic, oldest first; `tick` is called meanwhile.

    A key that was tombstoned is no longer to be trimmed; a later value of the same key moves it to the end.
    """
    keys: dict[bytes, None] = {}
    topic = checkpoints_topic(settings.source)
    # Somebody may have removed old ones: nobody needs them.
    (start,) = topics.begins({topic: 1})[topic]
    for record in read_to_end(settings, {(topic, 0): start}, idle=tick):
        tick()
        keys.pop(record.key, None)
        if record.value is not None:
            keys[record.key] = None
    return deque(keys)


def outdated(keys: deque[bytes], most: int) -> list[bytes]:
    """Take the oldest of some checkpoints' keys away once they are twice as many, and return those to be tombstoned.

    The last state of an earlier epoch stays: a view that stands behind it, and not at it, has what the log lost.
    """
    if len(keys) < 2 * most:
        return []
    read = [(key, codec.decode_key(key)) for key in keys]
    last = {said["epoch"]: key for key, said in read if "partial" not in said}
    stay = {key for epoch, key in last.items() if epoch < read[-1][1]["epoch"]}
    return [key for key in (keys.popleft() for _ in range(most)) if key not in stay]


class Named:
    """Chooses which ends the records of a writer's checkpoints name: with many partitions only those touched since its base."""

    def __init__(self) -> None:
        """Begin with a base."""
        self._base: Checkpoint | None = None
        self._since = 0

    def choose(self, checkpoint: Checkpoint) -> tuple[Checkpoint, set[str] | None]:
        """Return the checkpoint with its base, and the topics whose ends its record names (None for all).

        A base is complete, for the key of half a transaction or half a snapshot is written again and again. A cut at the version of the
        base replaces its record, and so is the base from then on.
        """
        if not checkpoint.complete or sum(map(len, checkpoint.ends.values())) <= WHOLE_PARTITIONS:
            return checkpoint, None
        base = self._base
        self._since += 1
        if base is None or base.version == checkpoint.version or self._since >= WHOLE_EVERY:
            self._base, self._since = checkpoint, 0
            return checkpoint, None
        touched = {topic for topic, ends in checkpoint.ends.items() if base.ends.get(topic) != ends}
        return replace(checkpoint, base=base.version.lsn), touched


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
