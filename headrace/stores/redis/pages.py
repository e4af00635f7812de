"""Pages in Redis: a hash a page, a hash a generation, and a key that names the live generation.

| key                    | what                                                                          |
|------------------------|-------------------------------------------------------------------------------|
| `<prefix>:live`        | the number of the generation that readers see                                 |
| `<prefix>:generations` | the set of numbers                                                            |
| `<prefix>:g<N>`        | of generation N: consumer, fingerprint, source, owner (none: dropped), position, writes of its owner |
| `<prefix>:<N>:<id>`    | a page: the fields of its body, which are text, and its version in `@version` |

*Writing* is one Lua call for pages and position together, or several where there is much: the last of them has the position, and
readers of a live generation see the pages of those before already. Each first compares owner, position and how many there were with
what this process wrote last (S23): a FLUSHALL, a restart from an old dump or another process that has opened the generation since are
noticed before anything is written. So an older process never writes at all (S21) and a delete can simply remove the
page. Versions are text of a fixed width, because Lua's numbers are floats; an older one never replaces a newer one.

*Reading* is one Lua call for pointer and page together, so that a promotion is atomic for every reader.

Redis may lose its last seconds or everything; position and pages go together then, and what is missing is written again
[I6].
"""

from __future__ import annotations

import re
import sqlite3
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from headrace import codec
from headrace.change import NOWHERE, Position, Row
from headrace.consumer import Cursor, Generation, ViewRow
from headrace.errors import Misconfigured, Poison, Transient, Wiped
from headrace.settings import Settings
from headrace.stores import Doc, check_alone, of_another_source
from headrace.stores.redis import scripts
from headrace.stores.redis.client import client, errors, longest, text_version, version_text
from headrace.stores.scans import Scans
from headrace.stores.sending import Sending

_VERSION = "@version"
_WRITE_BYTES = 4 * 1024 * 1024
_ALWAYS_BYTES = 1024 * 1024
"""Of a text, that every Redis takes."""
_SCAN = 1000
_GRACE_SECONDS = 1.0
_LOOK_SECONDS = 60.0


class RedisPages:
    """A document store in Redis. Bodies are mappings of text to text: each entry is a field of the page's hash.

    Args:
        prefix: Begins every key; the consumer's name by default.
    """

    def __init__(self, prefix: str = "") -> None:
        """Say where pages go; connects to nothing."""
        self.prefix = prefix
        self._number = 0
        self._owner = ""
        self._other = ""
        self._position = ""
        self._writes = 0
        self._scans = Scans[_Ids]()
        self._tidy = False
        self._looked = 0.0

    def bind(self, settings: Settings, consumer: str) -> None:
        """Use the Redis of `settings`. Raises Misconfigured: `bad-setting`."""
        self._consumer = consumer
        self.prefix = self.prefix or consumer
        self._owner, self._source = uuid.uuid4().hex, settings.source
        self._sending = Sending("pages", 1)
        self._scans = Scans[_Ids]()  # not those of a store that this one was copied from
        self._redis = client(settings)
        self._write = self._redis.register_script(scripts.WRITE)

    def generations(self) -> list[Generation]:
        """Return the generations that the server holds; the first call finishes drops that were cut short."""
        with errors():
            held, dropped = self._held()
            if not self._tidy:  # a drop that was cut short, in a process before this one
                for generation in dropped:
                    if generation.consumer == self._consumer:
                        self._remove(generation.number)
                self._tidy = True
        return [generation for generation in held if generation.consumer == self._consumer]

    def open(self, generation: Generation) -> Position | None:
        """Become the owner of `generation`, unless it is of another source; clear its pages if it has no position.

        Raises:
            Misconfigured: `redis-may-evict`, `view-of-another`.
        """
        self._number = generation.number
        self._scans = Scans[_Ids]()
        with errors():
            self._check_policy()
            held, _ = self._held()
            check_alone(generation.consumer, [(self._state_of(each.number), each.consumer) for each in held])
            said, value, self._other = self._redis.eval(
                scripts.OPEN,
                3,
                self._state,
                self._generations,
                self._live,
                generation.consumer,
                generation.fingerprint,
                self._owner,
                generation.number,
                self._source,
            )
            if said == "another":
                raise Misconfigured(
                    "view-of-another",
                    f"{self._state} in Redis is of {value}, not of {generation.consumer} {generation.fingerprint}.",
                    "Give the consumer's store another prefix.",
                )
            self._position, self._writes = value, 0
            if not value and not self._other:
                self._unlink_pages(self._number, self._owner)
        return codec.decode_position(value) if value else None

    def write(self, docs: Sequence[Doc], position: Position | None, *, bulk: bool = False) -> None:
        """Write pages, and with the last of them the position.

        Raises:
            Transient: `redis-away`, `redis-busy`; Wiped: `view-wiped`, `view-moved`.
            Poison: `page-empty`, `page-not-text`, `document-too-large`.
            Misconfigured: `redis-refused`, `redis-may-evict`, `view-taken-over`, `view-of-another`.
        """
        after = codec.encode_position(position).decode() if position is not None else ""
        held: list[str | int] = []
        ids: set[str] = set()
        size = 0
        with errors():
            if time.monotonic() - self._looked > _LOOK_SECONDS:
                self._check_policy()
            for doc in docs:
                arguments = _arguments(doc)
                length = sum(map(len, (doc.body or {}).values()))
                if 4 * length > _ALWAYS_BYTES:  # of nearly all pages no text needs to be looked at
                    self._check_size(doc)
                if size > _WRITE_BYTES:
                    self._send_early(ids, held)
                    held, ids, size = [], set(), 0
                held += arguments
                ids.add(doc.id)
                size += length
            if bulk and position is None:
                self._send_early(ids, held)
            else:
                self._sending.arrive()
                self._send(held, after)

    def arrive(self) -> None:
        """Wait until nothing is on its way; raise what one of them has raised."""
        with errors():
            self._sending.arrive()

    def promote(self) -> None:
        """Move the pointer to this generation, if it is still there and this process's.

        Raises:
            Transient: `redis-away`, `redis-busy`; Wiped: `view-wiped`. Misconfigured: `redis-refused`, `view-taken-over`.
        """
        with errors():
            self._judge(self._redis.eval(scripts.PROMOTE, 2, self._state, self._live, self._owner, self._number))

    def drop(self) -> None:
        """Note that it is dropped; the pages go after a grace time, for readers that took the pointer by themselves."""
        with errors():
            self._redis.eval(scripts.DROP, 2, self._state, self._live, self._number)
        with suppress(Transient), errors():  # it is dropped: `generations` does the rest, in the next process
            self._remove(self._number)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def get(self, ids: Sequence[str]) -> Sequence[ViewRow]:
        """Return some pages as readers see them."""
        with errors():
            return self._read(ids)

    def count(self) -> dict[str, int]:
        """Return how many pages readers see."""
        with errors():
            return {"": _Ids(self._page_ids()).count()}

    def scan(self, after: Cursor | None, limit: int) -> Sequence[ViewRow]:
        """Return pages as readers see them, by id. A scan lists all ids when it begins: Redis has no order. A few take turns."""
        start = after[1] if after else None
        with errors():
            all_ids = self._scans.take(start)
            all_ids = all_ids or _Ids(self._page_ids())
            found: list[ViewRow] = []
            while len(found) < limit and (ids := all_ids.next(start, limit - len(found))):
                found += _told(ids, self._read(ids))
                start = ids[-1]
        if len(found) == limit:  # else it is at the end
            self._scans.put(found[-1].key, all_ids)
        return found

    # Writing

    @property
    def _live(self) -> str:
        return f"{self.prefix}:live"

    @property
    def _generations(self) -> str:
        return f"{self.prefix}:generations"

    @property
    def _state(self) -> str:
        return self._state_of(self._number)

    @property
    def _pages(self) -> str:
        return self._pages_of(self._number)

    def _state_of(self, number: int) -> str:
        return f"{self.prefix}:g{number}"

    def _pages_of(self, number: int) -> str:
        return f"{self.prefix}:{number}:"

    def _held(self) -> tuple[list[Generation], list[Generation]]:
        """Return the generations under the prefix, of whatever consumer, and those that are dropped and still have pages."""
        found: Any = self._redis.eval(scripts.GENERATIONS, 2, self._live, self._generations, f"{self.prefix}:g")
        held: list[Generation] = []
        dropped: list[Generation] = []
        for number, consumer, fingerprint, live, owner in sorted(found, key=lambda each: int(each[0])):
            generation = Generation(consumer, int(number), fingerprint, live == number)
            (held if owner else dropped).append(generation)
        return held, dropped

    def _check_size(self, doc: Doc) -> None:
        """Refuse a text that is longer than Redis takes: it breaks the connection off, at each attempt."""
        long = [text for text in (doc.body or {}).values() if 4 * len(text) > _ALWAYS_BYTES]
        size = max((len(text.encode(errors="replace")) for text in long), default=0)
        if size > _ALWAYS_BYTES and size > (most := longest(self._redis)):
            raise Poison(
                "document-too-large",
                f"Page {doc.id!r} has a field of {size} bytes, and Redis takes {most} (proto-max-bulk-len).",
                f"Render less, then: headrace rebuild {self._consumer}; or raise that, then: headrace parked retry {self._consumer} --all",
                cursor=("", doc.id),
            )

    def _send_early(self, ids: set[str], pages: list[str | int]) -> None:
        """Send pages, while the next ones are rendered: the position comes when they have arrived."""
        self._sending.send(ids, partial(self._send, pages, ""))

    def _send(self, pages: list[str | int], after: str) -> None:
        known = (self._pages, self._owner, self._position, after, self._writes)
        self._judge(self._write(keys=[self._state], args=[*known, *pages]))
        self._position, self._writes = after or self._position, self._writes + 1

    def _judge(self, said: Any) -> None:
        """Raise what an answer of a script means."""
        if said == "taken" and self._other:
            raise of_another_source(f"{self._state} in Redis", self._other, self._source)
        if said == "taken":
            raise Misconfigured(
                "view-taken-over",
                f"Another process has opened {self._state} in Redis since.",
                f"Run the consumer {self._consumer} in one process only.",
            )
        if said != "ok":
            raise Wiped(f"view-{said}", f"{self._state} in Redis is not what was last written: {said}.")

    def _check_policy(self) -> None:
        """Refuse a Redis that drops pages; `write` looks again now and then: it can be told to while a view runs."""
        facts: Any = self._redis.info("memory")
        policy = str(facts["maxmemory_policy"])
        # What is volatile-* evicts only keys with a time to live; ours have none.
        if policy.startswith("allkeys-"):
            raise Misconfigured(
                "redis-may-evict",
                f"Redis has maxmemory-policy {policy}: it may drop pages on its own.",
                "Run: redis-cli CONFIG SET maxmemory-policy noeviction, and in redis.conf; or use another Redis.",
            )
        self._looked = time.monotonic()

    def _remove(self, number: int) -> None:
        """Remove a dropped generation after the grace time, unless somebody opens it meanwhile."""
        time.sleep(_GRACE_SECONDS)
        self._unlink_pages(number, "")
        self._redis.eval(scripts.FORGET, 2, self._state_of(number), self._generations, number)

    def _unlink_pages(self, number: int, owner: str) -> None:
        """Remove the pages of a generation while it is `owner`'s; a dropped one is nobody's."""
        keys: list[str] = []
        for key in self._redis.scan_iter(match=_literally(self._pages_of(number)) + "*", count=_SCAN):
            keys.append(key)
            if len(keys) >= _SCAN:
                self._redis.eval(scripts.UNLINK, 1, self._state_of(number), owner, *keys)
                keys = []
        if keys:
            self._redis.eval(scripts.UNLINK, 1, self._state_of(number), owner, *keys)

    # Reading

    def _page_ids(self) -> Iterator[str]:
        for key in self._redis.scan_iter(match=_literally(self._pages) + "*", count=_SCAN):
            yield key.removeprefix(self._pages)

    def _read(self, ids: Sequence[str]) -> list[ViewRow]:
        pipeline = self._redis.pipeline(transaction=False)
        for id_ in ids:
            pipeline.hgetall(self._pages + id_)
        found = pipeline.execute(raise_on_error=False)
        return [_row(id_, fields) for id_, fields in zip(ids, found, strict=True) if fields]


class _Ids:
    """The ids of a generation at one moment, on disk in SQLite's temporary database [I10]."""

    def __init__(self, ids: Iterator[str]) -> None:
        self.since = time.monotonic()
        self._db = sqlite3.connect("", check_same_thread=False)
        self._db.execute("CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID")
        self._db.executemany("INSERT OR IGNORE INTO ids VALUES (?)", ((id_,) for id_ in ids))

    def count(self) -> int:
        (found,) = self._db.execute("SELECT count(*) FROM ids").fetchone()
        return int(found)

    def next(self, after: str | None, limit: int) -> list[str]:
        than = ">=" if after is None else ">"  # the empty text is an id too
        query = f"SELECT id FROM ids WHERE id {than} ? ORDER BY id LIMIT ?"
        return [id_ for (id_,) in self._db.execute(query, (after or "", limit))]


def _arguments(doc: Doc) -> list[str | int]:
    """Return a page as the write script takes it: id, version, number of fields, fields."""
    body = doc.body or {}
    if doc.body is not None and not body:
        raise Poison(
            "page-empty",
            f"Page {doc.id!r} has no field, and Redis keeps no hash without one.",
            "Have render return None for no page, or a field.",
            cursor=("", doc.id),
        )
    for name, value in body.items():
        if not isinstance(value, str) or name.startswith("@"):
            raise Poison(
                "page-not-text",
                f"Page {doc.id!r} has {name}={value!r}: fields are text, and their names do not begin with @.",
                "Have render return text only.",
                cursor=("", doc.id),
            )
    fields = [part for item in body.items() for part in item]
    return [doc.id, version_text(doc.version), len(body), *fields]


def _told(ids: Sequence[str], found: Sequence[ViewRow]) -> list[ViewRow]:
    """Return what was found, and in its place what has a key that is not UTF-8: its id is as near as can be, and finds nothing."""
    shown = {row.key: row for row in found}
    strange = {id_: ViewRow("", id_, {"@error": "its key is not UTF-8"}, NOWHERE) for id_ in ids if "\ufffd" in id_}
    return [row for id_ in ids if (row := shown.get(id_) or strange.get(id_))]


def _row(id_: str, fields: Any) -> ViewRow:
    if not isinstance(fields, dict):  # a key of another type, which somebody else put there
        return ViewRow("", id_, {"@error": str(fields)}, NOWHERE)
    body: Row = {name: value for name, value in fields.items() if name != _VERSION}
    return ViewRow("", id_, body, text_version(fields.get(_VERSION)))


def _literally(text: str) -> str:
    """Escape what means something in a pattern of Redis."""
    return re.sub(r"([*?\[\]\\^])", r"\\\1", text)
