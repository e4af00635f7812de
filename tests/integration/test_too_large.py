"""Documents and bulks that are larger than Elasticsearch takes in one request: nothing is lost, and nothing else waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest

from headrace.change import Row, Version
from headrace.consumer import Generation
from headrace.documents import Node
from headrace.errors import Poison
from headrace.log import Log
from headrace.parked import Shelf
from headrace.settings import Settings
from headrace.stores import Doc
from headrace.stores.elasticsearch import ElasticsearchIndex
from headrace_ops import guard
from headrace_ops.elasticsearch import Elasticsearch
from tests.fixtures.capture import eventually, execute
from tests.fixtures.parked import Unlucky
from tests.fixtures.shelf import await_parked, differing, documents, films, parked, retried
from tests.integration.test_store_elasticsearch import at

LARGE, HEAVY, WIDE = 2_000_000, 900_000, 300_000
"""Characters: more than a request may have; more, some times as many, than operations may take of the heap; enough that few go together."""


class Small(Elasticsearch):
    """Takes requests of 1 MB, and operations that take 3 MB of its heap."""

    def prepare(self) -> None:
        super().prepare()
        with (self.conf / "elasticsearch.yml").open("a") as conf:
            conf.write("http.max_content_length: 1mb\nindexing_pressure.memory.limit: 3mb\n")


@pytest.fixture(scope="module")
def small() -> Iterator[str]:
    """The address of a server of this module's own."""
    with guard.temporary("headrace-elasticsearch-", [Small.name]) as folder:
        server = Small(folder, spread=True)
        server.start()
        yield server.address()


class Texts(Unlucky):
    store = ElasticsearchIndex("texts", mappings={"properties": {"n": {"type": "text", "index": False}}})

    def render(self, row: Node) -> Row:
        return self.body(row)


@pytest.mark.parametrize("bulk", [False, True])
def test_a_bulk_that_is_too_large_goes_in_parts(small: str, bulk: bool) -> None:
    docs = [Doc(str(number), {"n": "x" * WIDE}, Version(1, 5)) for number in range(9)]
    store = ElasticsearchIndex("halves", mappings={"properties": {}})
    store.bind(replace(Settings(), elasticsearch=small), "halves")
    with closing(store):
        store.open(Generation("halves", 1 + bulk, "abc"))
        store.write(docs, None, bulk=bulk)
        store.write([], at(5))
        assert [row.value["n"] for row in store.scan(None, 100)] == ["x" * WIDE] * 9
        for size in (LARGE, HEAVY):
            wide = Doc("wide", {"n": "x" * size}, Version(1, 6))
            with pytest.raises(Poison, match=rf"'wide'.* {size // 1000}\d\d\d bytes") as error:
                store.write([*docs, wide], at(6))
            assert (error.value.code, error.value.cursor) == ("document-too-large", ("", "wide"))


def test_a_document_that_is_too_large_is_parked_and_the_others_go_on(settings: Settings, small: str) -> None:
    """From zero and live, amid others; mended by the row."""
    settings = replace(settings, elasticsearch=small)
    before = (f"UPDATE films SET n = repeat('x', {WIDE})", f"UPDATE films SET n = repeat('x', {LARGE}) WHERE id = 3")
    with films(settings, before=before, texts=Texts) as (capture, control):
        await_parked(control, "texts", 1)
        (entry,) = Shelf(Log(settings)).entries("texts")
        assert (entry.key, entry.code, len(entry.body["n"])) == ("3", "document-too-large", LARGE)
        assert sorted(documents(control, "texts")) == ["1", "2", "4", "5", "6"]
        execute(settings, f"UPDATE films SET n = repeat('y', CASE id WHEN 5 THEN {HEAVY} ELSE {WIDE} END) WHERE id > 3")
        await_parked(control, "texts", 2)
        found = documents(control, "texts")
        assert {id_: found[id_]["n"][0] for id_ in ("1", "4", "5", "6")} == {"1": "x", "4": "y", "5": "x", "6": "y"}
        execute(settings, "UPDATE films SET n = 'short' WHERE id IN (3, 5)")
        capture.reach()
        eventually("they were read", lambda: (retried(control, "texts"), parked(settings, "texts"))[1] == [])
        assert differing(settings, "texts", Texts) == []
