"""The schema registry, by Confluent's own client and serializers: Confluent's API, which others speak too (Apicurio).

A value is a zero byte, four bytes of the schema's id, and Avro. The subject of a table's values is ``<topic>-value``. Ids are
kept for ever once they were asked for, as a registry never gives one twice; so reading asks once for each schema.
One that was replaced does: so `Values` holds a schema against the shape that the record names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx2
import orjson
from confluent_kafka.schema_registry import SchemaRegistryClient, SchemaRegistryError, topic_subject_name_strategy
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

from headrace.change import Row
from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace.log.avro import Avro, schema_id
from headrace.settings import Settings, bad_address, masked

_SECONDS = 10
_UNKNOWN_SCHEMA = 40403


class Registry:
    """The registry at `settings.schema_registry`."""

    def __init__(self, settings: Settings) -> None:
        """Connect to nothing yet. Raises Misconfigured: `bad-setting`."""
        self._said = settings.schema_registry
        self._address = masked(self._said)
        told = {"url": settings.schema_registry, "timeout": _SECONDS, "max.retries": 0}
        if settings.schema_registry_ca:
            told["ssl.ca.location"] = settings.schema_registry_ca
        try:
            self._client = SchemaRegistryClient(told)
        except OSError as error:  # of the file, or of ssl
            said = (
                f"HEADRACE_SCHEMA_REGISTRY_CA={settings.schema_registry_ca!r} cannot be read as certificates: {error}."
            )
            raise Misconfigured("bad-setting", said, "Name a file in PEM.") from error
        except ValueError as error:
            raise self._no_address(error) from error
        self._reader = AvroDeserializer(self._client)

    def writer(self, topic: str, schema: Avro) -> Callable[[Row], bytes]:
        """Register the schema of a topic's values; return what turns an envelope into a value.

        Raises:
            Transient: `registry-away`.
            Misconfigured: `schema-refused`, `registry-refuses`.
        """
        by_topic = {"subject.name.strategy": topic_subject_name_strategy}
        serialize = AvroSerializer(self._client, orjson.dumps(schema).decode(), conf=by_topic)
        context = SerializationContext(topic, MessageField.VALUE)

        def write(envelope: Row) -> bytes:
            with self._errors(f"{topic}-value"):  # the first call registers
                value = serialize(envelope, context)
            assert isinstance(value, bytes)
            return value

        return write

    def read(self, value: bytes) -> Row:
        """Return the envelope in Avro's types.

        Raises:
            Transient: `registry-away`.
            Misconfigured: `schema-unknown`, `registry-refuses`.
        """
        with self._errors(f"schema {schema_id(value)}"):
            envelope: Row = self._reader(value)
        return envelope

    def schema(self, number: int) -> Avro:
        """Return a schema by its id. Raises as `read`."""
        with self._errors(f"schema {number}"):
            return orjson.loads(self._client.get_schema(number).schema_str or "")

    def another(self, number: int, about: str) -> Misconfigured:
        """Return the refusal of a schema that is not the one which a record of `about` was written with."""
        return Misconfigured(
            "schema-unknown",
            f"Schema {number} of the registry at {self._address} is not that of {about}, whose records name it: "
            "the registry was replaced or emptied.",
            "Let HEADRACE_SCHEMA_REGISTRY name the registry that capture wrote to.",
        )

    @contextmanager
    def _errors(self, about: str) -> Iterator[None]:
        try:
            yield
        except SchemaRegistryError as error:
            raise self._translated(error, about) from error
        except httpx2.HTTPError as error:
            raise self._away(f"{error!r}") from error
        except httpx2.InvalidURL as error:
            raise self._no_address(error) from error

    def _translated(self, error: SchemaRegistryError, about: str) -> HeadraceError:
        said = f"{error.error_message} (HTTP {error.http_status_code})"
        if error.http_status_code >= 500 or error.http_status_code == 429:
            return self._away(said)
        if error.http_status_code in (409, 422):
            return Misconfigured(
                "schema-refused",
                f"The registry at {self._address} refuses the new schema of {about}: {said}.",
                f"Set the compatibility of the subject {about} to NONE, then start capture again.",
            )
        if error.error_code == _UNKNOWN_SCHEMA:
            return Misconfigured(
                "schema-unknown",
                f"The registry at {self._address} does not know {about}, which a record in the log names.",
                "Let HEADRACE_SCHEMA_REGISTRY name the registry that capture wrote to.",
            )
        return Misconfigured(
            "registry-refuses",
            f"The registry at {self._address} refuses {about}: {said}.",
            "Change HEADRACE_SCHEMA_REGISTRY; it takes user and password as http://user:password@host:port/path.",
        )

    def _no_address(self, error: Exception) -> Misconfigured:
        return bad_address("HEADRACE_SCHEMA_REGISTRY", self._said, error, "Write http://host:port/path.")

    def _away(self, said: str) -> Transient:
        return Transient(
            "registry-away",
            f"The schema registry at {self._address} does not answer: {said}.",
            "Change HEADRACE_SCHEMA_REGISTRY_CA."
            if "CERTIFICATE_VERIFY_FAILED" in said
            else "Check HEADRACE_SCHEMA_REGISTRY and the registry.",
        )
