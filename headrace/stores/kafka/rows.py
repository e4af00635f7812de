"""Records of a stream as they are read, whoever has written them: verify is to tell what somebody has done to the topic of documents."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Final

from headrace import codec
from headrace.change import NOWHERE, Row, Version
from headrace.codec import Headers
from headrace.consumer import ViewRow
from headrace.errors import Misconfigured
from headrace.log.tail import Record


class Rows:
    """The newest document of each key in each partition at one moment, on disk in SQLite's temporary database [I10].

    An id may be there twice: in a partition that is not its own somebody else has put it, or it was its own before there were more.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        """Keep what they say in the end."""
        self.since = time.monotonic()
        self._db = sqlite3.connect("", check_same_thread=False)
        self._db.execute(
            "CREATE TABLE docs (id TEXT, key BLOB, part INT, body BLOB, version INT, PRIMARY KEY (id, key, part)) WITHOUT ROWID"
        )
        found = (
            (id_of(each.key), each.key, each.partition, each.value, version_of(each.headers).packed())
            for each in records
        )
        self._db.executemany("INSERT OR REPLACE INTO docs VALUES (?, ?, ?, ?, ?)", found)

    def named(self, ids: Sequence[str]) -> list[ViewRow]:
        """Return the documents of some ids."""
        query = "SELECT id, body, version FROM docs WHERE id = ? AND body IS NOT NULL"
        return [_row(found) for id_ in ids for found in self._db.execute(query, (id_,))]

    def next(self, after: str | None, limit: int) -> list[ViewRow]:
        """Return the documents that follow an id; more than `limit` where there are several of the last id."""
        than = ">=" if after is None else ">"  # the empty text is an id too
        query = f"SELECT id, body, version FROM docs WHERE id {than} ? AND body IS NOT NULL ORDER BY id LIMIT ?"
        found = [_row(found) for found in self._db.execute(query, (after or "", limit))]
        if len(found) < limit:
            return found
        last = found[-1].key
        return [row for row in found if row.key < last] + self.named([last])

    def keys(self) -> Iterator[bytes]:
        """Yield the keys of all documents, as they are in the topic."""
        return (key for (key,) in self._db.execute("SELECT DISTINCT key FROM docs WHERE body IS NOT NULL"))


def id_of(key: bytes) -> str:
    """Return the id that is a record's key; one that is not UTF-8 is nobody's, and shown as near as can be."""
    return key.decode(errors="replace")


def headers_of(version: Version) -> Headers:
    """Return what a record says of the state that it shows."""
    return [("epoch", str(version.epoch).encode()), ("lsn", str(version.lsn).encode())]


def version_of(headers: Sequence[tuple[str, bytes]]) -> Version:
    """Undo `headers_of`; NOWHERE for what is not such."""
    named = dict(headers)
    with suppress(KeyError, TypeError, ValueError, Misconfigured):  # not there, null, no number, or too large a one
        return Version.unpacked(Version(int(named["epoch"]), int(named["lsn"])).packed())
    return NOWHERE


LIVE: Final = b"live"
_TYPES: Final = {"consumer": str, "fingerprint": str, "generation": int, "topic": str}


def generation_key(number: int) -> bytes:
    """Return the key of what is said of a generation."""
    return f"g{number}".encode()


def facts_of(record: Record) -> dict[str, Any] | None:
    """Return what a record says of the generations of a stream; None for what is not such."""
    with suppress(ValueError, TypeError, KeyError):  # no JSON, or none of ours
        said: dict[str, Any] = codec.loads(record.value or b"")
        live = record.key == LIVE
        named = ("generation", "topic") if live else ("generation", "consumer", "fingerprint")
        ours = all(isinstance(said[name], _TYPES[name]) for name in named)
        if ours and (live or record.key == generation_key(said["generation"])):
            return said
    return None


def _row(found: tuple[str, bytes, int]) -> ViewRow:
    id_, body, version = found
    return ViewRow("", id_, _body(body), Version.unpacked(version))


def _body(value: bytes) -> Row:
    with suppress(ValueError):
        body: Any = codec.loads(value)
        if isinstance(body, dict):
            return body
    return {"@error": value.decode(errors="replace")}
