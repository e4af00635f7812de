"""From Postgres's text to natural JSON, as bytes (docs/formats.md, *Values*).

Strategy: a converter is a function from one value's text to one value's JSON, chosen once for each column by its type. A row is
then one `%` over a template that already holds the column names, so no dict is built on the way. Snapshot and stream use the
same converters on the same text (S14 fixes the settings that shape it), so one row is the same bytes whichever way it came.
"""

from __future__ import annotations

import json
import re
from binascii import b2a_base64
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Final

import orjson

from headrace.codec import parse

Converter = Callable[[bytes], bytes]

NULL: Final = b"null"


def _text(value: bytes, dumps: Callable[[str], bytes] = orjson.dumps) -> bytes:
    return dumps(value.decode())


def _as_is(value: bytes) -> bytes:
    return value


def _quoted(value: bytes) -> bytes:
    """For text of digits and punctuation, which needs no escapes."""
    return b'"%b"' % value


def _bool(value: bytes) -> bytes:
    return b"true" if value[0] == b"t"[0] else b"false"  # NULL fails, as it should


def _float(value: bytes) -> bytes:
    # NaN, Infinity and -Infinity are no JSON numbers.
    return b'"%b"' % value if value[-1] in b"Ny" else value


def _json(value: bytes) -> bytes:
    """Splice the document in as it is: numbers keep all of their digits.

    Postgres's json admits what readers refuse (a lone surrogate, a number beyond a double, too many levels): that is kept as text.
    """
    if len(value) < _SMALL and not _SUSPECT.search(value):
        return value
    try:
        parse(value)
    except orjson.JSONDecodeError:
        return _text(value)
    return value


_SMALL: Final = 300
"""Below this many bytes a document is neither too deep nor, without an exponent, beyond a double."""
_SUSPECT: Final = re.compile(rb"[0-9][eE]|\\u")


def _timestamp(value: bytes) -> bytes:
    return b'"%b"' % value.replace(b" ", b"T", 1)  # as Postgres's own JSON; of a year BC the second blank stays


def _timestamptz(value: bytes) -> bytes:
    return b'"%b"' % value.replace(b" ", b"T", 1).replace(b"+00", b"+00:00", 1)  # the session's time zone is UTC


def _bytea(value: bytes) -> bytes:
    return b'"%b"' % b2a_base64(bytes.fromhex(value[2:].decode()), newline=False)


_SCALARS: Final[dict[str, Converter]] = {
    "bool": _bool,
    "int2": _as_is,
    "int4": _as_is,
    "int8": _as_is,
    "oid": _as_is,
    "float4": _float,
    "float8": _float,
    "numeric": _quoted,
    "date": _quoted,
    "time": _quoted,
    "timetz": _quoted,
    "timestamp": _timestamp,
    "timestamptz": _timestamptz,
    "uuid": _quoted,
    "bytea": _bytea,
    "json": _json,
    "jsonb": _json,
}
_VECTORS: Final = frozenset({"int2vector", "oidvector"})
_NAMES_END: Final = re.compile(r'[\w"]$')


def converter(base: str, element: str = "") -> Converter:
    """Return the converter of a type.

    Args:
        base: The type's name below all domains: ``int4``, ``_text``; a type that has no natural JSON stays its text.
        element: The same for the elements of an array, with their delimiter behind it where that is no comma: ``box;``.
    """
    if element and base not in _VECTORS:
        name, delimiter = (element, b",") if _NAMES_END.search(element) else (element[:-1], element[-1:].encode())
        return _array(converter(name), delimiter)
    return _SCALARS.get(base, _text)


def key_converter(base: str, element: str = "") -> Converter:
    """Return the converter of a key's column: canonical, so that equal keys are equal bytes whoever encodes them."""
    inner = converter(base, element)
    if base in {"float4", "float8"} or element in {"float4", "float8"}:
        return lambda value: orjson.dumps(orjson.loads(inner(value)))
    if base in _DOCUMENTS or element in _DOCUMENTS:
        return lambda value: _canonical(inner(value))
    return inner


_DOCUMENTS: Final = frozenset({"json", "jsonb"})


def _canonical(document: bytes) -> bytes:
    """Return the document as every codec writes it; as its text where that would round a number, and two keys could be one."""
    made = orjson.dumps(orjson.loads(document))
    before, after = (json.loads(text, parse_float=Decimal) for text in (document, made))
    return made if before == after else _text(document)


COPIED: Final[dict[Converter, bytes]] = {_as_is: b"%b", _quoted: b'"%b"'}
"""Converters that copy the text, and what they make of it."""


def template(names: Sequence[str], places: Sequence[bytes] = ()) -> bytes:
    """Return an object's JSON with a ``%b`` for each value, or with that value's own of `places`."""
    keys = [orjson.dumps(name).replace(b"%", b"%%") for name in names]
    return b"{%b}" % b",".join(b"%b:%b" % pair for pair in zip(keys, places or [b"%b"] * len(keys), strict=True))


def _array(element: Converter, delimiter: bytes) -> Converter:
    def convert(value: bytes) -> bytes:
        # Bounds other than 1 come first, as in [0:1]={3,4}: JSON's arrays have none.
        start = value.index(b"=") + 1 if value[:1] == b"[" else 0
        parts: list[bytes] = []
        end = _elements(value, start, parts, element, delimiter[0])
        if end != len(value):
            raise ValueError(f"an array's text ends at {end} of {len(value)}")
        return b"".join(parts)

    return convert


_OPEN, _CLOSE, _QUOTE, _BACKSLASH = b'{}"\\'


def _elements(text: bytes, at: int, out: list[bytes], element: Converter, delimiter: int) -> int:
    """Append the JSON of the array that begins at `at`; return where it ends."""
    out.append(b"[")
    at += 1
    while text[at] != _CLOSE:
        if text[at] == delimiter:
            out.append(b",")
            at += 1
        elif text[at] == _OPEN:
            at = _elements(text, at, out, element, delimiter)
        elif text[at] == _QUOTE:
            value, at = _unquote(text, at + 1)
            out.append(element(value))
        else:
            value, at = _bare(text, at, delimiter)
            out.append(NULL if value == b"NULL" else element(value))
    out.append(b"]")
    return at + 1


def _unquote(text: bytes, at: int) -> tuple[bytes, int]:
    """Read a quoted element from after its quote; return it and where it ends."""
    end = text.index(b'"', at)
    if text.find(b"\\", at, end) < 0:
        return text[at:end], end + 1
    value = bytearray()
    while text[at] != _QUOTE:
        at += text[at] == _BACKSLASH
        value.append(text[at])
        at += 1
    return bytes(value), at + 1


def _bare(text: bytes, at: int, delimiter: int) -> tuple[bytes, int]:
    end = at
    while text[end] != delimiter and text[end] != _CLOSE:
        end += 1
    return text[at:end], end
