"""`headrace why` on real servers: each row's transaction is the one that Postgres names, its place the one that the log has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest

from headrace.change import Change, format_lsn, parse_lsn
from headrace.control import Control
from headrace.documents import Document, Many, One
from headrace.log import Log
from headrace.parked import Shelf
from headrace.settings import Settings, environment
from tests.fixtures.capture import eventually, execute, now, prepare, rows
from tests.fixtures.parked import Found as Parking
from tests.fixtures.parked import forbid
from tests.fixtures.serving import serving
from tests.fixtures.verified import ITEMS, SHOP, Mirror, Products, kept

pytestmark = pytest.mark.usefixtures("elasticsearch")


def why(settings: Settings, *args: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "headrace", "why", *args]
    env = os.environ | environment(settings) | {"COLUMNS": "120"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout or done.stderr


def shown(settings: Settings, control: Control) -> None:
    """Wait until readers see all that is committed."""
    lsn = now(settings)
    eventually("the view shows it", lambda: control.reports()["view"][0].version.lsn >= lsn)


def newest(settings: Settings, table: str, key: str) -> Change:
    return [change for change in Log(settings).scan(table) if change.key.decode() == key][-1]


def checked(settings: Settings, row: dict[str, Any], id_: int) -> None:
    """Hold a row that is told against Postgres and the log."""
    table = row["table"]
    (xmin,) = rows(settings, f"SELECT xmin::text::int FROM {table} WHERE id = {id_}")[0]
    change = newest(settings, table, f'{{"id":{id_}}}')
    assert row["key"] == {"id": id_}
    assert row["row"] == change.row
    assert (row["xid"] or xmin, row["read"]) == (xmin, change.read or "stream"), "a snapshot's rows have no transaction"
    assert (row["topic"], row["partition"], row["offset"], row["ordinal"]) == (
        Log(settings).topic_of(table),
        change.partition,
        change.offset,
        change.ordinal,
    )
    assert row["commit"] == {"epoch": change.version.epoch, "lsn": format_lsn(change.version.lsn)}


def test_a_document_is_told_with_its_rows_and_where_each_came_from(settings: Settings) -> None:
    prepare(
        settings,
        *SHOP,
        "INSERT INTO categories VALUES (5, 'kitchen')",
        "INSERT INTO products VALUES (1, 'kettle', 5), (2, 'hidden', 5)",
        "INSERT INTO reviews SELECT i, 1, 1 + i % 5, 'fine' FROM generate_series(1, 30) i",
    )
    with kept(settings, Products) as control:
        before = time.time() * 1000
        execute(
            settings,
            "WITH a AS (UPDATE reviews SET stars = 5 WHERE id = 7) UPDATE products SET name = 'pot' WHERE id = 1",
        )
        shown(settings, control)
        after = time.time() * 1000
        told = json.loads(why(settings, "view", "1", "--limit", "7", "--json"))
        root = told["made_from"]
        reviews, category = root["joins"]["reviews"], root["joins"]["category"]
        checked(settings, root, 1)
        checked(settings, category["rows"][0], 5)
        for id_, row in enumerate(reviews["rows"], 1):
            checked(settings, row, id_)
        assert (root["read"], category["rows"][0]["read"]) == ("stream", "snapshot")
        assert root["xid"] == reviews["rows"][6]["xid"]
        assert category["rows"][0]["applied"] <= before, "each when it was applied"
        assert int(before) <= root["applied"] <= after
        assert root["ordinal"] != reviews["rows"][6]["ordinal"]
        assert (reviews["count"], len(reviews["rows"]), category["count"]) == (30, 7, 1)
        assert told["document"]["value"] == {"name": "pot", "category": "kitchen", "reviews": 30, "stars": 92 / 30}
        assert parse_lsn(told["document"]["version"]["lsn"]) > parse_lsn(root["commit"]["lsn"])
        assert not told["waits"]

        people = why(settings, "view", "1", "--limit", "2")
        for words in ("what readers see", '"pot"', "30 rows of public.reviews", "… and 28 more", "from the snapshot"):
            assert words in people, people
        hidden = why(settings, "view", "2")
        assert "readers see nothing under this key" in hidden
        assert "render returned no document" in hidden
        assert "no rows of it are kept" in why(settings, "view", "3", code=1)
    with serving(settings, view=Products) as control:
        eventually("it runs again", lambda: any(not each.ended for each in control.reports()["view"]))
        assert json.loads(why(settings, "view", "1", "--json"))["made_from"]["applied"] == root["applied"]


def test_a_document_that_is_parked_is_told_with_its_reason(settings: Settings) -> None:
    """It is not said to wait: nothing shows it before somebody tries it again."""
    prepare(
        settings,
        "CREATE TABLE films (id int PRIMARY KEY, n int)",
        "CREATE TABLE reviews (id int PRIMARY KEY, film_id int)",
        "INSERT INTO films VALUES (1, 1), (2, 2), (3, 3)",
    )
    forbid(settings, 3, 13)
    with kept(settings, Parking) as control:
        execute(settings, "UPDATE films SET n = 13 WHERE id = 1")
        eventually("two are parked", lambda: len(Shelf(Log(settings)).entries("view")) == 2)
        told = json.loads(why(settings, "view", "1", "--json"))
        assert (told["parked"]["code"], told["waits"]) == ("render-failed", False)
        assert "13 is not to be rendered" in told["parked"]["reason"]
        assert (told["document"]["value"]["n"], told["made_from"]["row"]["n"]) == (1, 13)
        people = why(settings, "view", "1")
        assert "headrace parked show view --generation 1 1" in people
        assert "wait to be shown" not in people
        assert "render returned no document" not in why(settings, "view", "3")
        assert json.loads(why(settings, "view", "2", "--json"))["parked"] is None
        forbid(settings)
        control.ask("view", "retry")
        assert json.loads(why(settings, "view", "1", "--json"))["parked"] is None


class Turned(Products):
    """The same joins, which other code numbers otherwise."""

    document = Document(
        "public.products",
        reviews=Many("public.reviews", by="product_id"),
        category=One("public.categories", on="category_id"),
    )


def test_rows_that_other_code_keeps_are_not_read_as_its_own(settings: Settings) -> None:
    prepare(
        settings,
        *SHOP,
        "INSERT INTO categories VALUES (1, 'kitchen')",
        "INSERT INTO products VALUES (1, 'kettle', 1), (2, 'pot', 1)",
        "INSERT INTO reviews VALUES (1, 1, 5, 'fine'), (2, 1, 4, 'good')",
    )
    with kept(settings, Products):
        assert json.loads(why(settings, "view", "1", "--json"))["made_from"]["joins"]["reviews"]["count"] == 2
    with serving(settings, view=Turned) as control:
        eventually("it is stale", lambda: any(each.phase == "stale" for each in control.reports().get("view", [])))
        told = json.loads(why(settings, "view", "1", "--json"))
        assert (told["document"]["value"]["name"], told["made_from"], told["stale"]) == ("kettle", None, True)
        assert "kept by other code" in why(settings, "view", "1")


def test_a_view_that_keeps_no_rows_tells_its_row(settings: Settings) -> None:
    prepare(settings, ITEMS, "INSERT INTO items VALUES (1, 10, 'a')")
    with kept(settings, Mirror):
        told = json.loads(why(settings, "view", '{"id":1}', "--table", "public.items", "--json"))
        assert told["document"]["value"]["n"] == 10
        assert told["made_from"] is None
        why(settings, "view", '{"id":2}', "--table", "public.items", code=1)
        assert "view has rows of public.items" in why(settings, "view", '{"id":1}', "--table", "items", code=2)
