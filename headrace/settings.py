"""Settings: one documented table, read from the environment and `headrace.toml`.

Each field below is the setting `HEADRACE_<NAME>` in the environment and `<name>` in `headrace.toml`
(of the current folder, or the file that HEADRACE_CONFIG names). The environment wins. An unknown name in either is refused,
but for what Kubernetes tells of Services in the environment.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from headrace.errors import Misconfigured

__all__ = ["Settings", "load"]

_PREFIX = "HEADRACE_"
_OUTSIDE = frozenset({"HEADRACE_CONFIG", "HEADRACE_STACK"})
"""Names of the environment that are not settings: where the settings are, and which backend runs the local stack."""

_SERVICE_LINK = re.compile(
    r"HEADRACE_(\w+_)?(SERVICE_HOST=.*|SERVICE_PORT(_\w+)?=\d+|PORT=[a-z]+://.*|PORT_\d+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?=.*)"
)
"""What Kubernetes puts into every container for a Service that is called headrace or headrace-…: no setting's name ends so."""

_LARGEST = 1_000_000_000 - 1024 * 1024
"""What librdkafka sends at most, less the room for key, headers and framing."""

_CONNECTING = (
    "security.",
    "sasl.",
    "ssl.",
    "enable.ssl.",
    "https.ca.",
    "client.",
    "socket.",
    "broker.address.",
    "reconnect.",
)
"""How the properties of librdkafka begin that say how to connect. The others are headrace's: what it promises rests on them."""
_SECRET = re.compile(r"password|passphrase|secret|pem|private|config")


def _setting(default: Any, doc: str, most: int | None = None, *, least: int = 0) -> Any:
    return field(default=default, metadata={"doc": doc, "most": most, "least": least})


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that can be set, with its default."""

    source: str = _setting("main", "name of the captured database; prefix of its topics")
    dsn: str = _setting("postgresql://postgres@127.0.0.1:5432/postgres", "how capture and verify reach Postgres")
    slot: str = _setting("headrace", "replication slot in the source")
    publication: str = _setting("headrace", "publication in the source")
    kafka: str = _setting("127.0.0.1:9092", "bootstrap servers of Kafka, comma separated")
    kafka_options: str = _setting(
        "", 'how to connect to Kafka, librdkafka\'s properties as JSON: {"security.protocol": "SASL_SSL", ...}'
    )
    feed: str = _setting(
        "headrace", "who writes the log: headrace, or debezium: a connector whose topic.prefix is the source"
    )
    codec: str = _setting(
        "json", "how capture writes values: json, or avro with a schema registry; both are always read"
    )
    schema_registry: str = _setting(
        "http://127.0.0.1:8081/apis/ccompat/v7", "address of the schema registry (Confluent's API), for values in Avro"
    )
    schema_registry_ca: str = _setting(
        "", "file of the authority (PEM) that the registry's certificate is held against"
    )
    elasticsearch: str = _setting("http://127.0.0.1:9200", "address of Elasticsearch")
    elasticsearch_ca: str = _setting("", "file of the authority (PEM) that Elasticsearch's certificate is held against")
    elasticsearch_api_key: str = _setting("", "API key for Elasticsearch, in place of user and password in its address")
    redis: str = _setting("redis://127.0.0.1:6379/0", "address of Redis")
    state: str = _setting("./.headrace", "folder for what consumers keep locally; may be lost, is rebuilt from the log")
    warehouse: str = _setting("./.headrace/warehouse.duckdb", "file of the warehouse")
    warehouse_memory: str = _setting("2GB", "most memory that DuckDB may use")
    warehouse_listen: str = _setting("127.0.0.1:8790", "where the warehouse process answers SQL")
    templates: str = _setting("./templates", "folder of the Jinja2 templates of the pages")
    partitions: int = _setting(1, "partitions of a new table topic; never changed afterwards", least=1)
    replication: int = _setting(0, "replicas of a topic when it is made, not afterwards; 0: as many as the broker says")
    snapshot_connections: int = _setting(2, "connections that read the initial snapshot")
    cut_ms: int = _setting(200, "longest time a cut stays open, ms")
    cut_records: int = _setting(20_000, "most records in a cut", least=1)
    message_max_bytes: int = _setting(16 * 1024 * 1024, "largest record; a larger row stops capture", _LARGEST)
    min_compaction_lag_ms: int = _setting(3_600_000, "how long every record stays in the log at least, ms")
    delete_retention_ms: int = _setting(
        7 * 24 * 3_600_000, "how long a tombstone stays, ms; the longest a consumer may be away"
    )
    heartbeat_ms: int = _setting(10_000, "how often capture writes a heartbeat into the source, ms; 0 turns it off")
    batch_records: int = _setting(10_000, "most changes handed to a consumer at once")
    parked_limit: int = _setting(
        100, "most records of a generation that are parked; one more stops the consumer, with 0 the first one does"
    )

    def path(self, name: str) -> Path:
        """Return `<state>/<name>`, with its parent made."""
        path = Path(self.state).expanduser() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def load(environ: Mapping[str, str] | None = None, *, config: Path | None = None) -> Settings:
    """Read the settings.

    Args:
        environ: The environment; `os.environ` when None.
        config: The file; else the one that HEADRACE_CONFIG names, else `headrace.toml` here if there is one.

    Raises:
        Misconfigured: `unknown-setting`, `bad-setting`, `config-file`.
    """
    environ = os.environ if environ is None else environ
    named = config or (Path(environ["HEADRACE_CONFIG"]) if "HEADRACE_CONFIG" in environ else None)
    values = _read_file(named) if named else _read_file(Path("headrace.toml"), optional=True)
    values |= {
        name.removeprefix(_PREFIX).lower(): text
        for name, text in environ.items()
        if name.startswith(_PREFIX) and name not in _OUTSIDE and not _SERVICE_LINK.fullmatch(f"{name}={text}")
    }
    known = {f.name: f for f in fields(Settings)}
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"Did you mean {_PREFIX}{close[0].upper()}?" if close else "`headrace settings` lists them."
            raise Misconfigured("unknown-setting", f"There is no setting {_PREFIX}{name.upper()}.", meant)
    return Settings(**{name: _value(known[name], value) for name, value in values.items()})


def environment(settings: Settings) -> dict[str, str]:
    """Return the settings that differ from their defaults as variables of the environment."""
    return {
        f"{_PREFIX}{f.name.upper()}": str(getattr(settings, f.name))
        for f in fields(settings)
        if getattr(settings, f.name) != f.default
    }


def masked(value: str) -> str:
    """Hide the password of an address: of a URL, with or without its scheme, and in each of the forms that libpq takes."""
    value = re.sub(r"(^|://)([^:/@\s]*:)\S*@", r"\1\2***@", value)
    return re.sub(r"(?i)(password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&]+)", r"\1***", value)


def shown(name: str, value: str) -> str:
    """Return the value of a setting, named as in the environment, for people to see: without what is secret in it."""
    if name == "HEADRACE_ELASTICSEARCH_API_KEY":
        return value and "***"
    if name == "HEADRACE_KAFKA_OPTIONS" and value:
        options = kafka_options(value).items()
        told = {key: masked(one) if isinstance(one, str) else one for key, one in options}
        return json.dumps(told | {key: "***" for key, _ in options if _SECRET.search(key)})
    return masked(value)


def kafka_options(text: str) -> dict[str, str | int | bool]:
    """Read HEADRACE_KAFKA_OPTIONS. Raises Misconfigured: `bad-setting`; what it says quotes no value."""
    why = ""
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        found, why = None, f": {error}"
    if not isinstance(found, dict):
        remedy = 'Write it as {"security.protocol": "SASL_SSL", "sasl.username": …}.'
        raise Misconfigured("bad-setting", f"HEADRACE_KAFKA_OPTIONS is no JSON object{why}.", remedy)
    for name, value in found.items():
        if not name.startswith(_CONNECTING):
            said = f"HEADRACE_KAFKA_OPTIONS may not set {name}: it is for how to connect"
            raise Misconfigured(
                "bad-setting", f"{said}.", f"Take it out; what begins with {', '.join(_CONNECTING)} may be."
            )
        if not isinstance(value, str | int):
            raise Misconfigured(
                "bad-setting", f"{name} in HEADRACE_KAFKA_OPTIONS is no text, number or true/false.", "Change it."
            )
    return found


def bad_address(name: str, value: str, error: Exception, remedy: str) -> Misconfigured:
    """Return the refusal of a setting that a client cannot read; its words may quote the password that was in it."""
    why = "" if "@" in value else f": {error}"
    return Misconfigured("bad-setting", f"{name}={masked(value)!r} is no address{why}.", remedy)


def table() -> list[tuple[str, str, str]]:
    """Return every setting as (variable, default, meaning): what `headrace settings` prints."""
    return [(f"{_PREFIX}{f.name.upper()}", str(f.default), f.metadata["doc"]) for f in fields(Settings)]


def _read_file(path: Path, *, optional: bool = False) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        if optional:
            return {}
        raise Misconfigured("config-file", f"There is no file {path}.", "Change HEADRACE_CONFIG.") from error
    except UnicodeDecodeError:  # its words hold bytes of the file
        raise Misconfigured("config-file", f"{path} cannot be read: it is not UTF-8.", "Mend the file.") from None
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise Misconfigured("config-file", f"{path} cannot be read: {error}.", "Mend the file.") from error


def _value(setting: Field[Any], value: Any) -> Any:
    if setting.name == "kafka_options":
        value = json.dumps(value, default=str) if isinstance(value, dict) else str(value)
        kafka_options(value)
    wanted = int if setting.type in (int, "int") else str
    if isinstance(value, list | dict):  # of what may be an address with its password
        kind, name = type(value).__name__.replace("dict", "table"), f"{_PREFIX}{setting.name.upper()}"
        raise Misconfigured("bad-setting", f"{name} is a {kind}, not one value.", setting.metadata["doc"])
    if wanted is str:
        return str(value)
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if number < 0:
        raise Misconfigured(
            "bad-setting", f"{_PREFIX}{setting.name.upper()}={value!r} is not a whole number.", setting.metadata["doc"]
        )
    most, least = setting.metadata["most"], setting.metadata["least"]
    if number < least or (most is not None and number > most):
        beyond = f"less than {least}" if number < least else f"more than {most}"
        raise Misconfigured(
            "bad-setting", f"{_PREFIX}{setting.name.upper()}={value!r} is {beyond}.", setting.metadata["doc"]
        )
    return number
