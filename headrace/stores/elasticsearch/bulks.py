"""What is sent to Elasticsearch at once: actions, each the lines of a bulk that write a document, gathered up to a number and a size.
And what it means that one of them failed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from elasticsearch import Elasticsearch, NotFoundError

from headrace import codec
from headrace.change import Row
from headrace.errors import Poison, Transient
from headrace.settings import Settings
from headrace.stores import Doc
from headrace.stores.elasticsearch.client import blocked, is_block, reason_of, sequence_of

BULK_DOCS = 1000
_BULK_BYTES = 8 * 1024 * 1024
_INDEX = b'{"index":{"_id":%b,"version":%d,"version_type":"external_gte"}}\n{"headrace":{"id":%b}%b\n'
_TOO_LARGE = 413
POSITION = "headrace:position"
"""The id of the document that is the position."""
OURS: Final = {
    "properties": {
        "id": {"type": "keyword", "index": False},  # to sort by: nothing is found by it
        "kind": {"type": "keyword"},
        "at": {"type": "long"},
        "state": {"type": "object", "enabled": False},
    }
}
"""How the fields of the store itself are mapped."""
_ID_BYTES = 512
"""Elasticsearch refuses a whole bulk for a longer id."""
_SHARE = re.compile(r"operation_bytes=(\d+), max_\w+_bytes=(\d+)")
"""In what Elasticsearch says when operations have taken their share of its heap: how large this one is, and the share."""


class TooLarge(Exception):
    """A bulk is larger than the server ever takes."""


class Action(NamedTuple):
    """What is done to a document: its id, and the lines of a bulk that say so."""

    id: str
    lines: bytes


def written(doc: Doc) -> Action:
    """Return what writes a document, or its delete. Raises Poison: `document-refused`, of one that cannot be in an index."""
    if not is_id(doc.id):
        said = f"The id {doc.id[:100]!r} is empty, of more than {_ID_BYTES} bytes or the store's own: no document may have it."
        raise Poison("document-refused", said, "Define another id(table, key).", cursor=("", doc.id))
    if doc.body is not None and "headrace" in doc.body:
        said = f"Document {doc.id!r} has a field `headrace`, which is where the store keeps its own."
        raise Poison("document-refused", said, "Rename it in render.", cursor=("", doc.id))
    id_ = codec.dumps(doc.id)
    ours = id_ if doc.body is not None else b'%b,"kind":"deleted","at":%d' % (id_, time.time())
    body = b"{}" if doc.body is None else doc.text or codec.dumps(doc.body)
    rest = body[1:] if body == b"{}" else b"," + body[1:]
    return Action(doc.id, _INDEX % (id_, doc.version.packed(), ours, rest))


def is_id(id_: str) -> bool:
    """Whether a document of an index may have this id."""
    return bool(id_) and id_ != POSITION and (len(id_) * 4 <= _ID_BYTES or len(id_.encode()) <= _ID_BYTES)


def bulks(actions: Iterable[Action]) -> Iterator[list[Action]]:
    """Yield what goes together."""
    held: list[Action] = []
    size = 0
    for action in actions:
        if held and (len(held) == BULK_DOCS or size + len(action.lines) > _BULK_BYTES):
            yield held
            held, size = [], 0
        held.append(action)
        size += len(action.lines)
    if held:
        yield held


def never_fits(status: int, reason: str) -> bool:
    """Whether something is refused that is larger than a request may be, or than all of what operations may have of the heap."""
    share = _SHARE.search(reason)
    return status == _TOO_LARGE or (share is not None and int(share[1]) > int(share[2]))


def state_of(server: Elasticsearch, index: str, **how: Any) -> tuple[Row, dict[str, int]] | None:
    """Return what the position's document says, and its sequence; None where there is none."""
    try:
        found = server.get(index=index, id=POSITION, **how)
    except NotFoundError:
        return None
    return found["_source"]["headrace"]["state"], sequence_of(found.body)


def refused(server: Elasticsearch, target: str, bulk: bytes) -> list[dict[str, Any]]:
    """Send a bulk; return the items that are not written."""

    def post(answer: str) -> Any:
        return server.bulk(index=target, require_alias=True, operations=bulk, filter_path=answer)  # type: ignore[arg-type]

    if not post("errors")["errors"]:
        return []
    # Which ones, and why: sent again, it says so. What has been written is written again, equal.
    found = [next(iter(item.values())) for item in post("items.*._id,items.*.status,items.*.error")["items"]]
    return [item for item in found if item["status"] >= 300]


def judge(
    item: Mapping[str, Any], settings: Settings, index: str, consumer: str, moved: Callable[[], Exception]
) -> None:
    """Raise what an item that failed means. A version conflict is fine: an older write has lost."""
    status, error = item["status"], item.get("error") or {}
    reason = f"{error.get('type')}: {reason_of(error)}"
    if status == 409:
        return
    if status == 404:
        raise moved()
    if never_fits(status, reason):
        raise TooLarge
    if is_block(status, reason):
        raise blocked(settings, reason)
    if status in (429, 403) or status >= 500:
        raise Transient("elasticsearch-busy", f"Elasticsearch does not take {item['_id']}: {reason}.", "See its log.")
    raise Poison(
        "document-refused",
        f"Elasticsearch refuses document {item['_id']!r} of {index}: {reason}.",
        f"Change render or the mappings of {consumer}, then: headrace rebuild {consumer}",
        cursor=("", item["_id"]),
    )


def halves(bulk: Sequence[Action], index: str, consumer: str) -> tuple[Sequence[Action], Sequence[Action]]:
    """Return the parts of a bulk that is too large for the server. Raises Poison: `document-too-large`, of one that has no parts."""
    middle = len(bulk) // 2
    if middle:
        return bulk[:middle], bulk[middle:]
    (action,) = bulk
    raise Poison(
        "document-too-large",
        f"Document {action.id!r} of {index} has {len(action.lines)} bytes, more than Elasticsearch takes at once.",
        f"Render less, then: headrace rebuild {consumer}; or give Elasticsearch more, then: headrace parked retry {consumer} --all",
        cursor=("", action.id),
    )
