"""What is sent to Elasticsearch at once: actions, each the lines of a bulk that write a document, gathered up to a number and a size."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from headrace import codec
from headrace.errors import Poison
from headrace.stores import Doc

BULK_DOCS = 1000
_BULK_BYTES = 8 * 1024 * 1024
_INDEX = b'{"index":{"_id":%b,"version":%d,"version_type":"external_gte"}}\n{"headrace":{"id":%b}%b\n'
_TOO_LARGE = 413
_SHARE = re.compile(r"operation_bytes=(\d+), max_\w+_bytes=(\d+)")
"""In what Elasticsearch says when operations have taken their share of its heap: how large this one is, and the share."""


class TooLarge(Exception):
    """A bulk is larger than the server ever takes."""


class Action(NamedTuple):
    """What is done to a document: its id, and the lines of a bulk that say so."""

    id: str
    lines: bytes


def written(doc: Doc) -> Action:
    """Return what writes a document, or its delete. Raises Poison: `document-refused`, of one that has what is ours."""
    if doc.body is not None and "headrace" in doc.body:
        raise Poison(
            "document-refused",
            f"Document {doc.id!r} has a field `headrace`, which is where the store keeps its own.",
            "Rename it in render.",
            cursor=("", doc.id),
        )
    id_ = codec.dumps(doc.id)
    ours = id_ if doc.body is not None else b'%b,"kind":"deleted","at":%d' % (id_, time.time())
    body = b"{}" if doc.body is None else doc.text or codec.dumps(doc.body)
    rest = body[1:] if body == b"{}" else b"," + body[1:]
    return Action(doc.id, _INDEX % (id_, doc.version.packed(), ours, rest))


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
