"""The last step of a value from Postgres into the codec's form, where SQL cannot take it: json that readers refuse, which the log keeps as
text, and arrays of types whose JSON differs from their text."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import orjson

from headrace import codec

Finish = Callable[[str], Any]


def finish_of(base: str, element: str) -> Finish | None:
    """Return what finishes a text of a type, or each one of an array with such elements; None where SQL has finished it."""
    return (_ELEMENTS if element else _SCALARS).get(element or base)


def finished(finish: Finish, value: Any) -> Any:
    """Finish a value, which may be an array or NULL."""
    if isinstance(value, list):
        return [finished(finish, item) for item in value]
    return None if value is None else finish(value)


def finished_key(finish: Finish, value: Any) -> Any:
    """Finish a value of a key: a document, or an array of such, is its text where readers would round it, and two keys could be one."""
    if finish is not _document:
        return finished(finish, value)
    text = _spliced(value)
    read = orjson.loads(text)
    before, after = (json.loads(each, parse_float=Decimal) for each in (text, orjson.dumps(read)))
    return read if before == after else text


def _spliced(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_spliced, value))}]"
    if value is None:
        return "null"
    return value if _document(value) != value else orjson.dumps(value).decode()


def _document(text: str) -> Any:
    return codec.document(text.encode())


_SCALARS: dict[str, Finish] = {"json": _document, "jsonb": _document}
_ELEMENTS: dict[str, Finish] = _SCALARS | {
    "bytea": lambda text: base64.b64encode(bytes.fromhex(text[2:])).decode(),
}
