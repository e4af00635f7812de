"""The values of records, in either codec: JSON, or Avro with a schema registry. Keys are canonical JSON in both.

Reading asks no setting: a value that begins with a zero byte is Avro, and nothing in JSON does. So a log may change its codec
in the middle. Writing goes through `AvroCutWriter` where HEADRACE_CODEC says so; capture makes the same JSON in either case, and
what is compiled for a table is compiled once for each of its schema versions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from functools import cached_property
from typing import TYPE_CHECKING, Final

from confluent_kafka import KafkaException

from headrace import codec
from headrace.change import Row, TableSchema
from headrace.codec import Headers
from headrace.errors import Misconfigured, Poison, Transient
from headrace.log.avro import Packer, Unpacker, schema_id, schema_of
from headrace.log.topics import Topics, topic_of
from headrace.log.writer import CutWriter
from headrace.settings import Settings

if TYPE_CHECKING:
    from headrace.log.registry import Registry

CODECS: Final = ("json", "avro")
_Shapes = dict[tuple[str, int], TableSchema]
_BROKEN: Final = (KafkaException, KeyError, TypeError, ValueError, IndexError, EOFError, StopIteration)
"""What the reader of Avro raises for bytes that are none."""
_SCHEMA_SECONDS = 15.0


def learn(shapes: _Shapes, wanted: Collection[tuple[str, int]], known: Callable[[], _Shapes]) -> None:
    """Add to `shapes` what is in the log until `wanted` are there: there is no order between topics (S13).

    Raises:
        Transient: `schema-not-there`.
    """
    deadline = time.monotonic() + _SCHEMA_SECONDS
    while set(wanted) - shapes.keys():
        shapes.update(known())
        if (missing := set(wanted) - shapes.keys()) and time.monotonic() > deadline:
            table, version = min(missing)
            raise Transient("schema-not-there", f"Version {version} of {table} is not in the schemas topic.")


class Values:
    """Reads values. One for each log: what it learns of schemas it keeps."""

    def __init__(self, settings: Settings, known: Callable[[], _Shapes]) -> None:
        """Connect to the registry at the first value in Avro; `known` returns the schema versions that are in the log."""
        self._settings, self._known = settings, known
        self._shapes: _Shapes = {}
        self._unpackers: dict[tuple[str, int, int], Unpacker] = {}

    @cached_property
    def registry(self) -> Registry:
        """Return the schema registry."""
        # Only logs in Avro need it, and it takes long to import.
        from headrace.log.registry import Registry  # noqa: PLC0415

        return Registry(self._settings)

    def envelope(self, value: bytes, table: str, version: int) -> Row:
        """Return the envelope of a value of a table's schema version, its rows in natural JSON.

        Raises:
            ValueError: it is in neither codec.
            Transient: `registry-away`, `schema-not-there`.
            Misconfigured: `schema-unknown`, `registry-refuses`.
        """
        if value[:1] != b"\0":
            return codec.envelope(value)
        unpacker, read = self._read(value, table, version)
        return unpacker.envelope(read)

    def members(self, value: bytes, table: str, version: int) -> dict[str, bytes]:
        """Return the columns of a value's row, each as its JSON; raises as `envelope`."""
        if value[:1] != b"\0":
            return codec.members(value, b"after")
        unpacker, read = self._read(value, table, version)
        return unpacker.members(read)

    def _read(self, value: bytes, table: str, version: int) -> tuple[Unpacker, Row]:
        number = schema_id(value)
        unpacker = self._unpackers.get((table, version, number)) or self._compile(table, version, number)
        try:
            return unpacker, self.registry.read(value)
        except _BROKEN as error:
            raise ValueError(f"not a value in Avro of schema {number}: {error!r}") from error

    def _compile(self, table: str, version: int, number: int) -> Unpacker:
        """Compile a schema of the registry, if it is the record's: a new registry gives the ids of the old one to other schemas."""
        learn(self._shapes, {(table, version)}, self._known)
        wanted = Unpacker(schema_of(self._settings.source, self._shapes[table, version]))
        schema = self.registry.schema(number)
        try:
            found = Unpacker(schema)
        except _BROKEN:
            found = None
        if found is None or found.shape != wanted.shape:
            raise self.registry.another(number, f"version {version} of {table}")
        self._unpackers[table, version, number] = found
        return found


class AvroCutWriter(CutWriter):
    """Writes cuts whose values are Avro: it is given JSON like every writer, and packs it by the schema version that the record names."""

    def __init__(self, settings: Settings, topics: Topics, registry: Registry, known: Callable[[], _Shapes]) -> None:
        """Use `registry`; `known` returns the schema versions that are in the log."""
        super().__init__(settings, topics)
        self._registry = registry
        self._known = known
        self._shapes: _Shapes = {}
        self._packed: dict[tuple[str, int], Callable[[bytes], bytes]] = {}

    def schema(self, schema: TableSchema) -> None:
        """See `CutWriter.schema`."""
        self._shapes[schema.table, schema.version] = schema
        super().schema(schema)

    def produce(self, topic: str, key: bytes, value: bytes | None, headers: Headers) -> None:
        """See `CutWriter.produce`.

        Raises:
            Transient: `registry-away`.
            Misconfigured: `schema-refused`, `registry-refuses`.
            Poison: `bad-value`.
        """
        if value is not None:
            place = topic, int(dict(headers)["schema"])
            packed = self._packed.get(place) or self._compile(*place)
            try:
                value = packed(value)
            except (KeyError, TypeError, ValueError) as error:
                raise Poison(
                    "bad-value",
                    f"The row {key.decode()} for {topic} does not fit its Avro schema: {error}.",
                    "Report this as a defect.",
                ) from error
        super().produce(topic, key, value, headers)

    def _compile(self, topic: str, version: int) -> Callable[[bytes], bytes]:
        """Compile a schema version of a table; its schema is registered with the first row."""
        source = self._settings.source
        if not any(topic_of(source, table) == topic and known == version for table, known in self._shapes):
            self._shapes |= self._known()
        shape = next(s for s in self._shapes.values() if topic_of(source, s.table) == topic and s.version == version)
        envelope, write = Packer(shape).envelope, self._registry.writer(topic, schema_of(source, shape))

        def packed(value: bytes) -> bytes:
            return write(envelope(value))

        self._packed[topic, version] = packed
        return packed


def writer(settings: Settings, topics: Topics, values: Values, known: Callable[[], _Shapes]) -> CutWriter:
    """Return the writer of cuts in the codec of the settings, closed. Raises Misconfigured: `bad-setting`."""
    if settings.codec not in CODECS:
        raise Misconfigured(
            "bad-setting", f"HEADRACE_CODEC={settings.codec!r} is not {' or '.join(CODECS)}.", "Change HEADRACE_CODEC."
        )
    if settings.codec == "json":
        return CutWriter(settings, topics)
    return AvroCutWriter(settings, topics, values.registry, known)
