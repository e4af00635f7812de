"""Documents, pages and tables of a warehouse that cannot be done are parked; a retry ends in view == SELECT."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import redis

from headrace.errors import Misconfigured
from headrace.log import Log
from headrace.parked import Shelf
from headrace.settings import Settings
from headrace.stores.duckdb import Database, query
from headrace.stores.redis import PageReader
from tests.fixtures.capture import capturing, eventually, execute, prepare
from tests.fixtures.parked import Found, Housed, Paged, forbid
from tests.fixtures.serving import await_live, serving
from tests.fixtures.shelf import (
    FILMS,
    await_parked,
    command,
    differing,
    documents,
    documents_or_none,
    films,
    parked,
    report,
    retried,
    told,
)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Of three partitions a table the rows 1 and 3 are in the first, 2 is in the second."""
    return replace(settings, partitions=3)


@pytest.mark.usefixtures("elasticsearch")
def test_documents_that_cannot_be_rendered_or_are_refused_are_parked(settings: Settings) -> None:
    """At the first build, which goes live without them, and later; verify, which cannot compare, says so at once."""
    forbid(settings, "3")
    bad = ("UPDATE films SET n = 'no number' WHERE id = 5",)
    with films(settings, before=bad, found=Found) as (capture, control):
        await_parked(control, "found", 2)
        assert sorted(documents(control, "found")) == ["1", "2", "4", "6"]
        rendered, refused = Shelf(Log(settings)).entries("found")
        assert (rendered.collection, rendered.key, rendered.code) == ("public.films", "3", "render-failed")
        assert rendered.body == {"id": 3, "n": "3", "joined": {"reviews": [{"id": 3, "film_id": 3}]}}
        assert (refused.key, refused.code, refused.body["n"]) == ("5", "document-refused", "no number")
        for statement in (
            "INSERT INTO reviews VALUES (7, 3), (8, 4), (9, 5)",
            "UPDATE films SET n = 'none' WHERE id = 6",
        ):
            execute(settings, statement)
        await_parked(control, "found", 3)
        eventually("others go on", lambda: documents(control, "found")["4"]["reviews"] == [8])
        assert documents(control, "found")["6"]["n"] == "6", "the one before stays"
        with pytest.raises(Misconfigured) as told_so:
            differing(settings, "found", Found)
        assert told_so.value.code == "records-parked"
        assert "3 records are parked in generation 1 of found" in told_so.value.message
        # Their causes go: one by the row, of which the newest state counts, one by the code's outside. One stays.
        forbid(settings)
        execute(settings, "UPDATE films SET n = '55' WHERE id = 5", "DELETE FROM reviews WHERE id = 9")
        capture.reach()
        done = set[str]()
        eventually("they were read", lambda: done.update(retried(control, "found")) or done == {"3", "5"})
        execute(settings, "DELETE FROM films WHERE id = 6")
        capture.reach()
        eventually("a row that is gone is no document", lambda: retried(control, "found") == {"6"})
        assert differing(settings, "found", Found) == []


@pytest.mark.usefixtures("redis_server")
def test_a_page_that_is_no_text_is_parked_and_tokens_stop_before_it(settings: Settings) -> None:
    with films(settings, paged=Paged) as (capture, control), closing(PageReader(settings, "unlucky")) as pages:
        capture.reach()
        eventually("it has come there", lambda: pages.applied().lsn >= capture.reach().version.lsn)
        execute(settings, "UPDATE films SET n = NULL WHERE id = 2", "INSERT INTO reviews VALUES (7, 1)")
        said = await_parked(control, "paged", 1)
        (entry,) = Shelf(Log(settings)).entries("paged")
        assert (entry.key, entry.code) == ("2", "page-not-text")
        target = capture.reach().version
        eventually("others go on", lambda: (page := pages.get("1")) and page.etag == "1,7")
        assert pages.applied() == said.version == entry.held < target
        execute(settings, "UPDATE films SET n = 'two' WHERE id = 2", "INSERT INTO reviews VALUES (8, 2)")
        capture.reach()
        eventually("it was read", lambda: retried(control, "paged") == {"2"})
        eventually("tokens are answered again", lambda: pages.applied() >= target)
        assert differing(settings, "paged", Paged) == []


@pytest.mark.usefixtures("redis_server")
def test_documents_stay_parked_over_restarts_wipes_and_rebuilds(settings: Settings) -> None:
    forbid(settings, "3")
    prepare(settings, *FILMS)
    with capturing(settings) as capture:
        with serving(settings, paged=Paged) as control:
            await_live(control, "paged")
            await_parked(control, "paged", 1)
        with serving(settings, paged=Paged) as control:
            execute(settings, "INSERT INTO reviews VALUES (7, 3), (8, 4)")
            eventually("others go on", lambda: documents_or_none(control, "paged").get("4", {}).get("etag") == "8")
            assert await_parked(control, "paged", 1)
            assert "3" not in documents(control, "paged")
            with closing(redis.Redis.from_url(settings.redis)) as client:
                client.flushdb()
            execute(settings, "INSERT INTO reviews VALUES (9, 4)")
            eventually(
                "it is built anew", lambda: documents_or_none(control, "paged").get("4", {}).get("etag") == "8,9"
            )
            assert await_parked(control, "paged", 1), "the cause is there still"
            rebuilt = lambda: control.ask("paged", "rebuild") == {"generation": 2}  # noqa: E731  1 until that is live again
            eventually("another is begun", rebuilt)
            eventually("it is built", lambda: report(control, "paged", 2).phase == "following")
            await_parked(control, "paged", 1, generation=2)
            with pytest.raises(Misconfigured, match="parked in generation 2"):
                control.ask("paged", "promote")
            forbid(settings)
            assert control.ask("paged", "retry", {"generation": 2})["done"] == [["public.films", "3"]]
            control.ask("paged", "promote")
            assert differing(settings, "paged", Paged) == []
            capture.reach()


@pytest.mark.usefixtures("redis_server")
def test_a_document_that_is_dropped_stays_as_it_is_until_it_changes(settings: Settings) -> None:
    with films(settings, paged=Paged) as (capture, control):
        forbid(settings, "13")
        execute(settings, "UPDATE films SET n = '13' WHERE id = 2")
        await_parked(control, "paged", 1)
        lost = command(settings, "parked", "drop", "paged", "2")
        assert lost.exit_code == 2, "nobody agreed"
        assert "lost: document public.films 2 as it is now" in lost.stdout
        would = told(settings, "parked", "drop", "paged", "2", code=2)
        assert would == {
            "name": "paged",
            "generation": 1,
            "dropped": [["public.films", "2"]],
            "records": 1,
            "applied": False,
        }
        assert parked(settings, "paged") == ["2"]
        forbid(settings)
        assert told(settings, "parked", "drop", "paged", "2", "--yes") == would | {"applied": True}
        assert await_parked(control, "paged", 0)
        execute(settings, "INSERT INTO reviews VALUES (7, 1)")
        eventually("others go on", lambda: documents(control, "paged")["1"]["etag"] == "1,7")
        assert documents(control, "paged")["2"]["html"] == "2"
        assert [difference.key for difference in differing(settings, "paged", Paged)] == ["2"], "and verify says so"
        execute(settings, "INSERT INTO reviews VALUES (8, 2)")
        capture.reach()
        eventually("it changes", lambda: documents(control, "paged")["2"] == {"html": "13", "etag": "2,8"})
        assert differing(settings, "paged", Paged) == []


@pytest.mark.usefixtures("redis_server")
def test_many_at_once_are_found_in_one_pass_and_too_many_stop_it(settings: Settings) -> None:
    rendered: list[object] = []

    class Counting(Paged):
        def render(self, row: Any) -> Any:
            rendered.append(row["id"])
            return super().render(row)

    many = [str(n) for n in range(1001, 1061)]
    forbid(settings, *many[:40])
    prepare(settings, *FILMS, "INSERT INTO films SELECT i, i::text FROM generate_series(1001, 2000) i")
    with capturing(settings) as capture, serving(replace(settings, parked_limit=50), paged=Counting) as control:
        await_live(control, "paged")
        await_parked(control, "paged", 40)
        assert len(rendered) <= 2 * 1006, "once to find them, once without them"
        forbid(settings, *many)
        execute(settings, "INSERT INTO reviews SELECT i, i FROM generate_series(1001, 1060) i")
        capture.reach()
        eventually("it stops, and its process with it", lambda: control.reports()["paged"][0].ended)
        assert control.reports()["paged"][0].code == "too-many-parked"
        assert len(parked(settings, "paged")) == 40


def test_a_warehouse_names_the_tables_that_lack_something(settings: Settings) -> None:
    with films(settings, housed=Housed) as (capture, control):
        forbid(settings, "13")
        execute(settings, "UPDATE films SET n = '13' WHERE id = 2", "UPDATE films SET n = 'x' WHERE id = 1")
        await_parked(control, "housed", 1)
        capture.reach()
        asked = "SELECT id, n FROM films ORDER BY id LIMIT 2"
        eventually("others go on", lambda: answered(settings, asked).rows == [[1, "x"], [2, "2"]])
        found = answered(settings, asked)
        assert (found.parked, found.inexact) == (("public.films",), ())
        assert found.version == report(control, "housed").version
        forbid(settings)
        assert control.ask("housed", "retry")["done"]
        found = answered(settings, asked)
        assert (found.rows, found.parked) == ([[1, "x"], [2, "13"]], ())
        assert differing(settings, "housed", Housed) == []


def answered(settings: Settings, sql: str) -> Any:
    database = Database.opened(settings.warehouse, settings.warehouse_memory)
    try:
        return query(database, sql, rows=10, seconds=30)
    finally:
        database.release()
