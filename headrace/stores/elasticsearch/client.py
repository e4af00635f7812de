"""The client of Elasticsearch, its errors by how one recovers from them, and what is in an index and in a hit."""

from __future__ import annotations

import re
import shlex
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from elasticsearch import (
    ApiError,
    AuthenticationException,
    AuthorizationException,
    Elasticsearch,
    NotFoundError,
    TransportError,
)
from elasticsearch.serializer import NdjsonSerializer

from headrace.change import Row, Version
from headrace.consumer import Generation, ViewRow
from headrace.errors import Misconfigured, Transient, Wiped
from headrace.settings import Settings, bad_address, masked

_TIMEOUT = 30
_NAMED = re.compile(r"index \[([^\]]+)\]")
_UNBLOCK = '{"index.blocks.read_only_allow_delete":null,"index.blocks.write":null,"index.blocks.read_only":null}'


class _Whole(NdjsonSerializer):
    """Sends a bulk as it is: by default it is copied twice, line by line."""

    def dumps(self, data: Any) -> bytes:
        """Return what is sent."""
        return data if isinstance(data, bytes) else super().dumps(data)


def client(settings: Settings) -> Elasticsearch:
    """Return a client that does not repeat anything by itself. Raises Misconfigured: `bad-setting`."""
    tls: dict[str, Any] = {"ssl_context": _trusting(settings)} if settings.elasticsearch_ca else {}
    try:
        return Elasticsearch(
            settings.elasticsearch,
            request_timeout=_TIMEOUT,
            max_retries=0,
            retry_on_timeout=False,
            serializers={_Whole.mimetype: _Whole()},
            **tls,
            api_key=settings.elasticsearch_api_key or None,
        )
    except ValueError as error:
        remedy = "Write it as http://host:9200 or https://user:password@host:9200."
        raise bad_address("HEADRACE_ELASTICSEARCH", settings.elasticsearch, error, remedy) from error


def _trusting(settings: Settings) -> ssl.SSLContext:
    """Return what makes certificates be held against HEADRACE_ELASTICSEARCH_CA and nothing else."""
    if not settings.elasticsearch.lower().startswith("https:"):
        said = f"HEADRACE_ELASTICSEARCH_CA is set, and HEADRACE_ELASTICSEARCH={masked(settings.elasticsearch)!r} is not https."
        raise Misconfigured("bad-setting", said, "Change one of the two.")
    try:
        context = ssl.create_default_context(cafile=settings.elasticsearch_ca)
    except OSError as error:  # of the file, or of ssl
        said = f"HEADRACE_ELASTICSEARCH_CA={settings.elasticsearch_ca!r} cannot be read as certificates: {error}."
        raise Misconfigured("bad-setting", said, "Name a file in PEM.") from error
    # The authorities that Elasticsearch 8 makes do not say what their key is for.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


@contextmanager
def errors(settings: Settings, missing: Exception | None = None) -> Iterator[None]:
    """Turn the client's errors into ours, by how one recovers from them."""
    try:
        yield
    except NotFoundError as error:
        raise missing or Wiped("view-wiped", f"An index is gone: {error.message}.") from error
    except ApiError as error:
        if is_block(error.status_code, str(error)):
            raise blocked(settings, _why(error)) from error
        if isinstance(error, AuthenticationException | AuthorizationException):
            raise Misconfigured(
                "elasticsearch-refused",
                f"Elasticsearch: {_why(error)}.",
                "Change HEADRACE_ELASTICSEARCH or the API key.",
            ) from error
        if error.status_code in (409, 429) or error.status_code >= 500:
            raise Transient("elasticsearch-busy", f"Elasticsearch is busy: {_why(error)}.", "See its log.") from error
        raise Misconfigured(
            "elasticsearch-refused", f"Elasticsearch: {_why(error)}.", "Change the mappings or settings of the store."
        ) from error
    except TransportError as error:
        if "CERTIFICATE_VERIFY_FAILED" in error.message:
            said, remedy = f"Elasticsearch is not trusted: {error.message}", "Change HEADRACE_ELASTICSEARCH_CA."
            raise Transient("elasticsearch-untrusted", f"{said}.", remedy) from error
        raise Transient(
            "elasticsearch-away", f"Elasticsearch does not answer: {error.message}.", "See HEADRACE_ELASTICSEARCH."
        ) from error


def is_block(status: int, error: str) -> bool:
    """Whether an index takes no writes: its disk is nearly full, or somebody wants it so. One that only starts answers 503."""
    return status in (403, 429) and "cluster_block_exception" in error


def blocked(settings: Settings, why: str) -> Transient:
    """Return what that means: Elasticsearch takes the block of a full disk away by itself, and no other."""
    index = _NAMED.search(why)
    run = _changing(settings, index[1] if index else "_all", _UNBLOCK)
    return Transient(
        "elasticsearch-blocked",
        f"Elasticsearch blocks writes: {why}.",
        f"Free its disk. If the block stays when there is room, run: {run}",
    )


def _changing(settings: Settings, index: str, change: str) -> str:
    """Return the command that changes the settings of an index; what is secret stands in it by its variable."""
    key = ' -H "Authorization: ApiKey $HEADRACE_ELASTICSEARCH_API_KEY"' if settings.elasticsearch_api_key else ""
    authority = f" --cacert {shlex.quote(settings.elasticsearch_ca)}" if settings.elasticsearch_ca else ""
    secret = masked(settings.elasticsearch) != settings.elasticsearch
    at = "$HEADRACE_ELASTICSEARCH" if secret else settings.elasticsearch.rstrip("/")
    return f"curl -X PUT{authority}{key} -H 'content-type: application/json' \"{at}/{index}/_settings\" -d '{change}'"


def _why(error: ApiError) -> str:
    body = error.body
    return reason_of(body["error"]) if isinstance(body, dict) and isinstance(body.get("error"), dict) else str(error)


def reason_of(error: Mapping[str, Any]) -> str:
    """Return what Elasticsearch says of an error, with its cause."""
    cause = error.get("caused_by") or {}
    return f"{error.get('reason')} {cause.get('reason', '')}".strip()


def wiped(index: str) -> Wiped:
    """Return what it means that an index is gone, or was restored, or has no position."""
    return Wiped("view-wiped", f"The index {index} is gone, or its position is; it is built anew.")


def body_of(hit: Mapping[str, Any]) -> Row:
    """Return the document of a hit as it was rendered."""
    return {name: value for name, value in hit["_source"].items() if name != "headrace"}


def hits_of(
    server: Elasticsearch, index: str, query: Mapping[str, Any], size: int, **how: Any
) -> list[Mapping[str, Any]]:
    """Return the hits of a query."""
    answer = server.search(
        index=index,
        query=query,
        size=size,
        version=True,
        track_total_hits=False,
        allow_partial_search_results=False,  # what a shard that is away has would look missing
        **how,
    )
    hits: list[Mapping[str, Any]] = answer["hits"]["hits"]
    return hits


def row_of(hit: Mapping[str, Any]) -> ViewRow:
    """Return a hit as a row of the view."""
    return ViewRow("", hit["_id"], body_of(hit), Version.unpacked(hit["_version"]))


def sequence_of(found: Mapping[str, Any]) -> dict[str, int]:
    """Return by what the next write says that it follows this one."""
    return {"if_seq_no": found["_seq_no"], "if_primary_term": found["_primary_term"]}


def held(server: Elasticsearch, alias: str) -> list[Generation]:
    """Return the generations behind an alias, of whatever consumer."""
    found = server.indices.get(index=f"{alias}-g*", features="aliases,mappings")
    numbers = {index: index.removeprefix(f"{alias}-g") for index in found}
    made = [
        Generation(of["consumer"], int(numbers[index]), of["fingerprint"], alias in facts["aliases"])
        for index, facts in found.items()
        if (of := about(facts)) and numbers[index].isdecimal()
    ]
    return sorted(made, key=lambda generation: generation.number)


def drop_aliases(server: Elasticsearch, index: str, names: Sequence[str]) -> None:
    """Take aliases away from an index."""
    if names:  # in a body, of any size
        server.indices.update_aliases(actions=[{"remove": {"index": index, "aliases": names}}])


def settings_of(server: Elasticsearch, index: str) -> Mapping[str, Any]:
    """Return the settings of an index."""
    said: Mapping[str, Any] = server.indices.get_settings(index=index)[index]["settings"]["index"]
    return said


def live(server: Elasticsearch, alias: str) -> list[str]:
    """Return the indices that an alias points at."""
    found = server.options(ignore_status=404).indices.get_alias(name=alias)
    return list(found) if found.meta.status == 200 else []


def about(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return what an index says of the generation that it is; nothing when headrace did not make it."""
    said: dict[str, str] = facts["mappings"].get("_meta", {}).get("headrace", {})
    return said


def check_durable(settings: Settings, index: str, has: Mapping[str, Any]) -> None:
    """Refuse an index that answers before it is on disk: after a crash it may have the position and not the documents (S22)."""
    if has.get("translog", {}).get("durability", "request").lower() != "request":
        run = _changing(settings, index, '{"index.translog.durability":"request"}')
        raise Misconfigured(
            "index-not-durable",
            f"The index {index} has index.translog.durability=async: a crash can take documents from below its position.",
            f"Take it out of the store's settings, and run: {run}; then headrace verify.",
        )
