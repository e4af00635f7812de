"""From a node to a document, by a plugin's `render`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from headrace import codec
from headrace.change import Row, Version
from headrace.documents.declaration import Document, Node
from headrace.documents.local import LocalRows, Touched
from headrace.documents.paths import written_otherwise
from headrace.errors import HeadraceError, Misconfigured, Poison, described
from headrace.stores import Doc

_PLAIN: Final = frozenset({str, int, bool, type(None)})
"""Types whose values JSON gives back as they are."""


class Renders(Protocol):
    """What a `DocumentConsumer` is for who asks it for documents."""

    name: str

    def render(self, row: Node) -> Row | None:
        """See `DocumentConsumer`."""


def meant(local: LocalRows, id_of: Callable[[str, Row], str], touched: Touched, id_: str) -> Touched:
    """Return what the document `id_` of a root that is gone is of: a row that is there, where the key's type has changed (1 is "1" now)."""
    document = touched.document
    if touched.node is None and isinstance(document, Document):
        for key in written_otherwise(touched.key):
            node = local.nodes.root(document, key)
            if node is not None and id_of(document.table, key) == id_:
                return Touched(document, key, node)
    return touched


def rendered(consumer: Renders, touched: Touched, node: Node | None, id_: str, version: Version) -> Doc:
    """Return the document of a node in JSON values, as a reader gets it back; without a body when there is nothing to show.

    Raises:
        Poison: `render-failed`. Misconfigured: `render-result`.
    """
    if node is None:
        return Doc(id_, None, version)
    try:
        body = consumer.render(node)
        text = codec.dumps(body)
        simple = type(body) is dict and _PLAIN.issuperset(map(type, body.values()))
        plain = dict(body) if simple and body is not None else codec.loads(text)
    except HeadraceError:
        raise
    except Exception as error:
        raise Poison(
            "render-failed",
            f"{type(consumer).__name__}.render failed for {_named(touched)}: {_said(error)}.",
            f"Mend render, then: headrace rebuild {consumer.name}",
        ) from error
    if plain is None:
        return Doc(id_, None, version)
    if not isinstance(plain, dict):
        raise Misconfigured(
            "render-result",
            f"{type(consumer).__name__}.render returned {type(body).__name__} for {_named(touched)}.",
            "Return a mapping, or None for no document.",
        )
    return Doc(id_, plain, version, text)


def _said(error: Exception) -> str:
    if isinstance(error, AttributeError) and isinstance(error.obj, Node):
        return f"a row of {error.obj.table} has no join and no column {error.name!r}"
    return described(error)


def _named(touched: Touched) -> str:
    return f"{touched.document.table} {codec.dumps(touched.key).decode()}"
