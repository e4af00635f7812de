"""What is parked: records that could not be done, set aside so that all others go on [I9].

One compacted topic, `headrace.parked`. A key names an entry for ever, ``{"source","name","generation","collection","key","at"}``, so that
a batch that comes again parks it again as the same; `at` is where the change stands in its topic, and empty for a document, of which only
the newest state matters. Its one writer is the runner of the view, as with control (S30); what a consumer that nobody can run any more
had parked, `headrace drop --all` takes away. Everybody may read it, with no process running [I13].
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from headrace import codec
from headrace.change import NOWHERE, Change, TableSchema, Version
from headrace.consumer import Cursor
from headrace.errors import Misconfigured
from headrace.log import Log
from headrace.log.plain import PlainWriter
from headrace.log.tail import BEGINNING, read_to_end
from headrace.log.topics import PARKED

_CUT_CHARACTERS = 64 * 1024


class Place(NamedTuple):
    """Records of a partition, from the offset of the first to that of the last."""

    topic: str
    partition: int
    first: int
    last: int


@dataclass(slots=True)
class Entry:
    """One record that is parked.

    Attributes:
        name, generation, collection, key, at: What it is; see above.
        code, reason, remedy: The error. Of a change that waits behind another of its key the code is empty.
        held: Tokens are answered up to here while it is parked.
        version: Of the change, or of the state in which the document could not be shown.
        body: The change as JSON, of a Debezium feed with the shape of its table; of a document its rows or what was made of them. The
            beginning of its text when it is `cut`.
        where: Where its records are in the log; of a document those among which they are.
        when: When it was parked, in ms since the Unix epoch.
    """

    name: str
    generation: int
    collection: str
    key: str
    at: str = ""
    code: str = ""
    reason: str = ""
    remedy: str = ""
    held: Version = NOWHERE
    version: Version = NOWHERE
    body: Any = None
    cut: bool = False
    where: list[Place] = field(default_factory=list)
    when: int = 0

    @property
    def cursor(self) -> Cursor:
        """Return what it is an entry of."""
        return self.collection, self.key

    def body_cut(self) -> Misconfigured:
        """Return the refusal of a change that is not there as a whole."""
        return Misconfigured(
            "parked-body-cut",
            f"The change of {self.collection} {self.key} was too large to be kept whole.",
            f"Run: headrace parked drop {self.name} --generation {self.generation} --collection {shlex.quote(self.collection)} "
            f"{pasted(self.key)}, then headrace resnapshot {shlex.quote(self.collection)}: it comes again. Where a delete of it waits too "
            f"(headrace parked show), nothing does: headrace rebuild {self.name}",
        )

    def change(self) -> Change:
        """Return the change that was parked. Raises Misconfigured: `parked-body-cut`."""
        if self.cut:
            raise self.body_cut()
        read = {name: said for name, said in self.body.items() if name != "shape"}
        return Change(**read | {"key": read["key"].encode(), "version": Version(*read["version"])})

    def shape(self) -> TableSchema | None:
        """Return the shape that the change names, where it was kept because no log has it (S28)."""
        said = None if self.cut else self.body.get("shape")
        return codec.decode_schema(codec.dumps(said)) if said else None


def pasted(word: str) -> str:
    """Return a word as the last of a command line that is pasted into a shell: it may begin as an option does."""
    return f"{'-- ' if word.startswith('-') else ''}{shlex.quote(word)}"


_IDENTITY = ("name", "generation", "collection", "key", "at")


class Shelf:
    """Reads and writes what is parked of one source."""

    def __init__(self, log: Log) -> None:
        """Connect to nothing yet."""
        self._log = log
        self._writer = PlainWriter(log.settings)

    def entries(self, name: str | None = None, generation: int | None = None, *, bodies: bool = True) -> list[Entry]:
        """Return what is parked of a view, of all when None: by view, generation and key, those of a key in the order of its changes.

        Without `bodies` it is little, however large the records are.

        Raises:
            Transient: `kafka-away`.
        """
        if PARKED not in self._log.topics.names():
            return []
        found: dict[bytes, Entry | None] = {}
        for record in read_to_end(self._log.settings, {(PARKED, 0): BEGINNING}):
            key = codec.loads(record.key)
            of_it = name in {None, key["name"]} and generation in {None, key["generation"]}
            if key.pop("source") == self._log.settings.source and of_it:
                entry = found[record.key] = _read(key, record.value) if record.value is not None else None
                if entry is not None and not bodies:
                    entry.body = None
        return sorted((entry for entry in found.values() if entry is not None), key=_order)

    def put(self, entry: Entry) -> None:
        """Write an entry, durably. Raises Transient: `kafka-away`."""
        value = {name: said for name, said in asdict(entry).items() if name not in _IDENTITY}
        self._writer.write(PARKED, self._key(entry), _fitting(value, self._log.settings.message_max_bytes))

    def remove(self, entries: Sequence[Entry]) -> None:
        """Take entries away, durably. Raises Transient: `kafka-away`."""
        for entry in entries:
            self._writer.write(PARKED, self._key(entry), None)

    def clear(self, name: str, generation: Callable[[int], bool]) -> None:
        """Take away what is parked of some generations of a view: they are gone, or begin from zero."""
        self.remove([entry for entry in self.entries(name, bodies=False) if generation(entry.generation)])

    def _key(self, entry: Entry) -> bytes:
        return codec.dumps({"source": self._log.settings.source} | {name: getattr(entry, name) for name in _IDENTITY})


def records_parked(name: str, generation: int, count: int) -> Misconfigured:
    """Return the refusal of what cannot be right while records are parked."""
    return Misconfigured(
        "records-parked",
        f"{count} record{'s are' if count > 1 else ' is'} parked in generation {generation} of {name}: it lacks them.",
        f"Run: headrace parked list {name}. Mend the cause, then: headrace parked retry {name} --all --generation {generation}",
    )


def _read(key: dict[str, Any], value: bytes) -> Entry:
    read = codec.loads(value)
    held, version = Version(*read["held"]), Version(*read["version"])
    return Entry(**key | read | {"held": held, "version": version, "where": [Place(*place) for place in read["where"]]})


def _order(entry: Entry) -> tuple[Any, ...]:
    place = (entry.where[0].partition, entry.where[0].first) if entry.where else (0, 0)
    return entry.name, entry.generation, entry.collection, entry.key, place


def _fitting(value: dict[str, Any], limit: int) -> bytes:
    """Return the bytes of an entry's value; of a body that is too large only the beginning of its text."""
    value |= {name: list(value[name]) for name in ("held", "version")} | {"where": list(map(list, value["where"]))}
    packed = codec.dumps(value, default=str)
    if len(packed) > limit:
        text = codec.dumps(value["body"], default=str)[:_CUT_CHARACTERS].decode(errors="ignore")
        packed = codec.dumps(value | {"body": text, "cut": True})
    return packed
