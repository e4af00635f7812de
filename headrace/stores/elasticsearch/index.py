"""Documents in Elasticsearch: an index a generation, an alias for readers.

`<alias>-g<N>` is generation N; the alias points at the live one and is swapped in one cluster state. Everything is written through
an alias of who writes, ``<index>-write-<owner>``, with `require_alias`: an index that somebody deleted is never made by a write, and
what is on its way from a process that was replaced or killed finds no alias, or the versions of its documents refused (S21).

*Versions.* Documents are written with `external_gte` versions (S1). A delete is a document too, ``{"headrace": {"kind":
"deleted"}}`` under its version, because Elasticsearch forgets the version of a deleted id after a minute (S21); it is
removed after a day.

*Position.* A bulk is not atomic, so the position is a document of its own, written after every item succeeded, with
`if_seq_no`: each write proves that it is still the one that this process wrote (S22). It names the index's UUID (an
index that was restored or made again is another), whether readers saw what it covers when it was written, and its *owner*, which `open`
takes, so that a process that was replaced meanwhile finds out at once. It covers what is on disk: an index with `translog.durability`
async is refused, when it is opened and, by the minute, when it is written.

*Visibility.* Indices never refresh by themselves; the store does with each position. So readers see the states at
positions, not what is half written, and what `write` has returned for can be read (S25). Only `open` shows, with the position
that is there, what a process had written beyond it before it ended; it is written again with the next position. An empty write costs no
refresh.

*Bulks.* Where more follows, some of them are on their way at once, so that Elasticsearch indexes while the next documents are
rendered; the call that ends it waits for all of them before it writes the position. No id is in two of them. A bulk that is larger than
Elasticsearch, or a proxy before it, ever takes goes in halves; a single document that is larger is poison.

The alias hides what has a `headrace.kind`. `headrace.id` repeats the id, because Elasticsearch does not sort by `_id`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from elasticsearch import ApiError, ConflictError, NotFoundError

from headrace import codec
from headrace.change import Position, Row
from headrace.consumer import Cursor, Generation, ViewRow
from headrace.errors import Misconfigured, Transient, Wiped
from headrace.settings import Settings
from headrace.stores import Doc, check_alone, of_another_source, source_held
from headrace.stores.elasticsearch.bulks import (
    BULK_DOCS,
    OURS,
    POSITION,
    Action,
    TooLarge,
    bulks,
    halves,
    is_id,
    judge,
    never_fits,
    refused,
    state_of,
    written,
)
from headrace.stores.elasticsearch.client import (
    about,
    check_durable,
    client,
    drop_aliases,
    errors,
    held,
    hits_of,
    live,
    row_of,
    sequence_of,
    settings_of,
    wiped,
)
from headrace.stores.elasticsearch.paging import INTERNAL, Paging
from headrace.stores.sending import MOST, Sending

_VISIBLE = {"bool": {"must_not": [INTERNAL]}}
_PAUSES = (0.1, 0.5, 1.0, 2.0, 4.0)
_MOMENTS = (0.0, 0.2, 0.5, 1.0)
_DELETED_SECONDS = 24 * 3600
_PURGE_SECONDS = 3600
_LOOK_SECONDS = 60.0


class ElasticsearchIndex:
    """A document store behind an alias.

    Args:
        alias: What readers search, the consumer's name by default; the indices are ``<alias>-g1`` and so on.
        mappings: As Elasticsearch takes them: ``{"properties": {...}}``. A field `headrace` is the store's own.
        settings: Index settings, e.g. ``{"number_of_replicas": 1}``.
    """

    def __init__(
        self, alias: str = "", *, mappings: Mapping[str, Any], settings: Mapping[str, Any] | None = None
    ) -> None:
        """Say where documents go; connects to nothing."""
        self.alias = alias
        self._mappings = mappings
        self._index_settings = {"number_of_shards": 1} | dict(settings or {})
        if "number_of_replicas" not in str(settings):  # it would be overridden
            self._index_settings.setdefault("auto_expand_replicas", "0-1")
        self._owner = self._other = ""
        self._index = ""
        self._uuid, self._one_shard = "", False
        self._position: str | None = None
        self._written: dict[str, int] = {}
        self._unseen = False
        self._purged = self._looked = 0.0

    def bind(self, settings: Settings, consumer: str) -> None:
        """Use the Elasticsearch of `settings`. Raises Misconfigured: `bad-setting`."""
        self._consumer, self._settings, self._source = consumer, settings, settings.source
        self.alias = self.alias or consumer
        self._sending = Sending("bulk", MOST)
        self._client = client(settings)

    def generations(self) -> list[Generation]:
        """Return the generations that the server holds."""
        with errors(self._settings):
            return [each for each in held(self._client, self.alias) if each.consumer == self._consumer]

    def open(self, generation: Generation) -> Position | None:
        """Take the index of `generation` if it is whole, else make it anew, empty. Raises Misconfigured: `view-of-another`."""
        self._owner, self._other = uuid.uuid4().hex, ""
        self._index = f"{self.alias}-g{generation.number}"
        self._paging = Paging(self._client, self._index)
        with errors(self._settings):
            others = [(f"{self.alias}-g{each.number}", each.consumer) for each in held(self._client, self.alias)]
            check_alone(generation.consumer, others)
            if self._find(generation):
                position = self._take()
                if position is not None or self._other:
                    return position
            self._make(generation)
        return None

    def write(self, docs: Sequence[Doc], position: Position | None, *, bulk: bool = False) -> None:
        """Write documents, then the position; then show both to readers, unless `bulk`.

        Raises:
            Transient: `elasticsearch-away`, `elasticsearch-busy`, `elasticsearch-blocked`; Wiped: `view-wiped`, `view-moved`.
            Poison: `document-refused`, with the id and Elasticsearch's reason; `document-too-large`.
            Misconfigured: `elasticsearch-refused`, `view-taken-over`, `view-of-another`, `index-not-durable`.
        """
        if self._other:
            raise of_another_source(f"The index {self._index}", self._other, self._source)
        with errors(self._settings):
            self._look()
            self._write_all((written(doc) for doc in docs if doc.body is not None or is_id(doc.id)), wait=not bulk)
            self._unseen = self._unseen or bool(docs)
            if position is not None:
                self._write_position(codec.encode_position(position).decode(), show=not bulk)
            if not bulk:
                self._purge()
                self._show()

    def arrive(self) -> None:
        """Wait until nothing is on its way; raise what one of them has raised."""
        with errors(self._settings):
            self._sending.arrive()

    def promote(self) -> None:
        """Swap the alias to this generation."""
        with errors(self._settings):
            others = [index for index in live(self._client, self.alias) if index != self._index]
            away = [{"remove": {"index": index, "alias": self.alias}} for index in others]
            add = {"add": {"index": self._index, "alias": self.alias, "filter": _VISIBLE}}
            self._client.indices.update_aliases(actions=[*away, add])

    def drop(self) -> None:
        """Delete the index, and with it what the alias says of it."""
        with errors(self._settings):
            self._client.options(ignore_status=404).indices.delete(index=self._index)

    def close(self) -> None:
        """Close the connections, whatever is still on its way."""
        self._client.close()

    def get(self, ids: Sequence[str]) -> Sequence[ViewRow]:
        """Return some documents as readers see them."""
        query = {"bool": {"must_not": [INTERNAL], "filter": [{"ids": {"values": ids}}]}}
        with errors(self._settings):
            return [row_of(hit) for hit in hits_of(self._client, self._index, query, len(ids))]

    def count(self) -> dict[str, int]:
        """Return how many documents readers see."""
        with errors(self._settings):
            found = self._client.search(  # `_count` leaves out a shard that is away
                index=self._index, query=_VISIBLE, size=0, track_total_hits=True, allow_partial_search_results=False
            )
            return {"": found["hits"]["total"]["value"]}

    def scan(self, after: Cursor | None, limit: int) -> Sequence[ViewRow]:
        """Return documents as readers see them, by id; what somebody else put there too."""
        with errors(self._settings):
            return self._paging.next(after[1] if after else None, limit)

    # Opening

    @property
    def _target(self) -> str:
        """The alias that this process writes through."""
        return f"{self._index}-write-{self._owner}"

    def _find(self, generation: Generation) -> bool:
        """Look for the index; refuse one of other code."""
        try:
            facts = self._client.indices.get(index=self._index)[self._index]
        except NotFoundError:
            return False
        of = about(facts)
        if (of.get("consumer"), of.get("fingerprint")) != (generation.consumer, generation.fingerprint):
            raise Misconfigured(
                "view-of-another",
                f"The index {self._index} was not made by {generation.consumer} {generation.fingerprint}.",
                "Delete that index, or give the consumer's store another alias.",
            )
        self._know(facts)
        self._other = source if (source := of.get("source", self._source)) != self._source else ""
        return True

    def _know(self, facts: Mapping[str, Any]) -> None:
        index = facts["settings"]["index"]
        check_durable(self._settings, self._index, index)
        self._looked = time.monotonic()
        self._uuid, self._one_shard = index["uuid"], index["number_of_shards"] == "1"

    def _look(self) -> None:
        """Look now and then whether the index is as durable as it was when it was opened: settings change while a view runs."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            check_durable(self._settings, self._index, settings_of(self._client, self._index))
            self._looked = time.monotonic()

    def _take(self) -> Position | None:
        """Become the owner of the position, and take the aliases of others away; None when there is no position of this index."""
        if (found := state_of(self._client, self._index)) is None:
            return None
        state, sequence = found
        position = codec.decode_position(state["position"]) if state["position"] else None
        source = source_held(state.get("source"), position, self._source)
        if state["uuid"] == self._uuid and source != self._source:
            self._other = source
            return position
        if state["uuid"] != self._uuid or position is None:
            return None
        self._client.indices.put_alias(index=self._index, name=self._target)
        self._written, self._unseen = sequence, True
        try:
            self._put_state(state["position"])
        except Exception:
            drop_aliases(self._client, self._index, [self._target])
            raise
        # Only now: who finds his alias gone finds the new owner too.
        aliases = self._client.indices.get_alias(index=self._index)[self._index]["aliases"]
        others = [name for name in aliases if name.startswith(f"{self._index}-write") and name != self._target]
        drop_aliases(self._client, self._index, others)
        self._show()
        return position

    def _make(self, generation: Generation) -> None:
        self._client.options(ignore_status=404).indices.delete(index=self._index)
        of = {"consumer": generation.consumer, "fingerprint": generation.fingerprint, "source": self._source}
        properties = {**self._mappings.get("properties", {}), "headrace": OURS}
        self._client.indices.create(
            index=self._index,
            mappings={**self._mappings, "properties": properties, "_meta": {"headrace": of}},
            settings={**self._index_settings, "refresh_interval": -1, "translog.durability": "request"},
            aliases={self._target: {}},
        )
        self._know(self._client.indices.get(index=self._index)[self._index])
        self._written = {}
        self._put_state(None)

    # Writing

    def _write_all(self, actions: Iterable[Action], *, wait: bool = True) -> None:
        """Send actions by id in bulks, and with `wait` see that Elasticsearch has them and all that went before."""
        if wait:
            self._sending.arrive()
        for bulk in bulks(actions):
            if wait:
                self._send(self._target, bulk)
            else:
                self._sending.send({action.id for action in bulk}, partial(self._send, self._target, bulk))

    def _send(self, target: str, bulk: Sequence[Action]) -> None:
        """Send a bulk, again while Elasticsearch is busy, up to a point: an error here begins a rebuild again."""
        for pause in _PAUSES:
            try:
                return self._send_once(target, bulk)
            except Transient as error:
                if error.code != "elasticsearch-busy":
                    raise
            time.sleep(pause)
        return self._send_once(target, bulk)

    def _send_once(self, target: str, bulk: Sequence[Action]) -> None:
        with errors(self._settings):
            try:
                for item in refused(self._client, target, b"".join(action.lines for action in bulk)):
                    judge(item, self._settings, self._index, self._consumer, self._moved)
            except (ApiError, TooLarge) as error:
                if isinstance(error, ApiError) and not never_fits(error.status_code, str(error)):
                    raise
                for half in halves(bulk, self._index, self._consumer):
                    self._send_once(target, half)

    def _write_position(self, position: str, *, show: bool) -> None:
        """Write the position if it is another; with `show` what is unseen of an index of one shard is shown by the same request."""
        if position == self._position:
            return
        show = show and self._unseen and self._one_shard
        try:
            self._put_state(position, refresh=show)
        except (ConflictError, NotFoundError) as error:
            raise self._moved() from error
        self._unseen = self._unseen and not show

    def _put_state(self, position: str | None, *, refresh: bool = False) -> None:
        state: Row = {"uuid": self._uuid, "owner": self._owner, "source": self._source, "position": position}
        state["shown"] = not self._unseen  # whether readers see what it covers already; else it is refreshed after it
        how: dict[str, Any] = dict(self._written) or {"op_type": "create"}
        document = {"headrace": {"kind": "position", "state": state}}
        written = self._client.index(
            index=self._target, id=POSITION, document=document, require_alias=True, refresh=refresh, **how
        )
        self._written = sequence_of(written.body)
        self._position = position

    def _moved(self) -> Exception:
        """Return what it means that position or alias are not this process's own. Who makes the index anew needs a moment for it."""
        owner = None
        for pause in _MOMENTS:
            time.sleep(pause)
            with suppress(NotFoundError):
                found, facts = state_of(self._client, self._index), settings_of(self._client, self._index)
                if found and found[0]["uuid"] == facts["uuid"]:  # a copy that was restored names the owner of then
                    owner = found[0]["owner"]
                    break
        if owner is None:
            return wiped(self._index)
        if owner == self._owner:
            return Wiped(
                "view-moved", f"The position of {self._index} is not the one last written, or its alias is gone."
            )
        return Misconfigured(
            "view-taken-over",
            f"Another process has opened {self._index} since.",
            f"Run the consumer {self._consumer} in one process only.",
        )

    def _show(self) -> None:
        if self._unseen:
            self._client.indices.refresh(index=self._index)
            self._unseen = False

    def _purge(self) -> None:
        """Remove deletes that are older than a day, if nothing has happened to them since: a thousand at each write until
        none is left, and then again in an hour."""
        if time.monotonic() - self._purged < _PURGE_SECONDS and self._purged:
            return
        old = {"range": {"headrace.at": {"lt": int(time.time()) - _DELETED_SECONDS}}}
        found = self._client.search(
            index=self._index, query=old, size=BULK_DOCS, source=False, seq_no_primary_term=True
        )
        hits = found["hits"]["hits"]
        self._write_all(
            Action(hit["_id"], b"%b\n" % codec.dumps({"delete": {"_id": hit["_id"], **sequence_of(hit)}}))
            for hit in hits
        )
        self._unseen = self._unseen or bool(hits)
        if len(hits) < BULK_DOCS:
            self._purged = time.monotonic()
