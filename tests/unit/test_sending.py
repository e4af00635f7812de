"""Writes on their way: what failed does not stay in memory, and a busy server is asked so often as said, whatever the size of a bulk."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
from elastic_transport import ApiResponseMeta, HttpHeaders, NodeConfig
from elasticsearch import ApiError

from headrace.change import Version
from headrace.documents.unshown import Unshown
from headrace.errors import Poison, Transient
from headrace.settings import Settings
from headrace.stores import Doc
from headrace.stores.elasticsearch import ElasticsearchIndex, index
from headrace.stores.elasticsearch.bulks import is_id, written
from headrace.stores.sending import Sending


class Payload(list[str]):
    """Something large."""


def failing(payload: Payload) -> None:
    raise Poison("document-refused", f"{len(payload)} are refused.")


def test_what_failed_goes_without_the_garbage_collector() -> None:
    gc.disable()
    try:
        payload = Payload(["large"])
        sending, seen = Sending("writes", 2), weakref.ref(payload)
        sending.send({"1"}, lambda held=payload: failing(held))  # type: ignore[misc]
        with pytest.raises(Poison):
            sending.arrive()
        del payload
        assert seen() is None
    finally:
        gc.enable()


def test_a_document_that_is_noted_keeps_nothing_of_what_was_written_with_it() -> None:
    unshown, payload = Unshown(10), Payload(["large"])
    seen = weakref.ref(payload)
    try:
        failing(payload)
    except Poison as error:
        unshown.add(error, ("public.items", "1"), None)
    del payload
    gc.collect()
    assert unshown
    assert seen() is None


def test_the_parts_of_a_bulk_are_not_each_tried_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that takes one document at once, before a server that is busy."""
    store = ElasticsearchIndex("parts", mappings={})
    store.bind(Settings(), "parts")
    posts: list[bytes] = []

    def refused(_server: object, _target: str, bulk: bytes) -> Any:
        posts.append(bulk)
        status = 413 if bulk.count(b'"index"') > 1 else 503
        meta = ApiResponseMeta(status, "1.1", HttpHeaders(), 0.0, NodeConfig("http", "127.0.0.1", 9200))
        raise ApiError("busy", meta, {})

    monkeypatch.setattr(index, "refused", refused)
    monkeypatch.setattr(index, "_LOOK_SECONDS", math.inf)  # there is no server to look at
    monkeypatch.setattr(index, "_PAUSES", (0, 0))
    with pytest.raises(Transient, match="busy"):
        store.write([Doc(str(number), {"n": number}, Version(1, 1)) for number in range(8)], None)
    assert len(posts) == 3 * 4, "three times: eight, four, two, one"


def test_an_id_that_elasticsearch_does_not_take_is_poison_and_its_delete_is_nothing() -> None:
    """It refuses all of a bulk that has such an id."""
    long = "é" * 257
    with pytest.raises(Poison, match="of more than 512 bytes") as refused:
        written(Doc(long, {"n": 1}, Version(1, 1)))
    assert refused.value.cursor == ("", long)
    assert [is_id(id_) for id_ in (long, "é" * 256, "e" * 512, "e" * 513)] == [False, True, True, False]
    assert [is_id(id_) for id_ in ("", "headrace:position", " ")] == [False, False, True]


def test_a_field_that_is_the_stores_own_is_refused_by_name() -> None:
    with pytest.raises(Poison, match="headrace") as refused:
        written(Doc("7", {"headrace": 1}, Version(1, 1)))
    assert refused.value.cursor == ("", "7")
