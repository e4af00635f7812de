"""Verify of tables without a key (S10, S27): multisets, exact while rows come, are truncated, and are written anew."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from headrace.change import Row, Version
from headrace.control import Control
from headrace.documents import Document, DocumentConsumer, Many, Node, count
from headrace.log import Log
from headrace.settings import Settings
from headrace.stores.elasticsearch import ElasticsearchIndex
from headrace_verify.expected import everything, expectation
from headrace_verify.ledger import EXTRA, MISSING, Ledger
from headrace_verify.postgres import connect, moment
from headrace_verify.verify import Verifier
from headrace_verify.view import write
from tests.fixtures.capture import Running, capturing, eventually, execute, rows
from tests.fixtures.resnapshots import ask, done
from tests.fixtures.serving import await_live, serving
from tests.fixtures.verified import Found, Mirror, closing_sync, found, kept, loaded, meddle
from tests.integration.test_capture_append_only import EVENTS, SOME, T, prepare_append_only


def test_rows_changed_removed_and_doubled_are_found(settings: Settings) -> None:
    """Equal rows are several. A row of Postgres is named by what it holds, one of the view by its key."""
    prepare_append_only(settings, EVENTS, SOME, f"INSERT INTO events VALUES ('lone', 7, '{'x' * 300}')")
    with kept(settings, Mirror):
        assert found(settings, Mirror).clean
        meddle(settings, "UPDATE rows SET value = json_set(value, '$.n', 8) WHERE value LIKE '%lone%'")
        one = "SELECT {} FROM rows WHERE value LIKE '%\"n\":{},%' ORDER BY key LIMIT 1"
        meddle(settings, f"DELETE FROM rows WHERE key IN ({one.format('key', 0)})")
        double = one.format('number, collection, \'{"lsn":9,"ordinal":9}\', value, epoch, lsn', 1)
        meddle(settings, f"INSERT INTO rows SELECT * FROM ({double})")
        seen = found(settings, Mirror)
        (lone,) = [change.key.decode() for change in Log(settings).scan(T) if change.row and change.row["n"] == 7]
    assert (seen.rows, seen.undecided) == (31, [])
    extra, missing = ([d.key for d in seen.wrong if d.kind == kind] for kind in (EXTRA, MISSING))
    assert {d.collection for d in seen.wrong} == {T}
    assert len(extra) == len(missing) == 2
    assert lone in extra
    assert {key.partition(" (row")[0] for key in missing} == {
        '{"big":null,"n":0,"what":"same"}',
        f'{{"big":"{"x" * 192}…',
    }


def test_it_is_exact_while_rows_come(settings: Settings) -> None:
    """Many of them equal; what is wrong is found whatever comes around it."""
    prepare_append_only(settings, EVENTS, "INSERT INTO events SELECT 'x', i % 5, NULL FROM generate_series(1, 3000) i")
    with (
        kept(settings, Mirror),
        loaded(
            settings,
            lambda chance: f"INSERT INTO events VALUES ('x', {chance.randint(0, 4)}, NULL)",
            lambda _: "INSERT INTO events SELECT 'x', i % 5, NULL FROM generate_series(1, 20) i",
            lambda _: "SELECT pg_sleep(0.01)",
        ),
    ):
        for _ in range(3):
            assert found(settings, Mirror).clean
        meddle(settings, "DELETE FROM rows WHERE key = (SELECT min(key) FROM rows)")
        seen = found(settings, Mirror)
    assert [d.kind for d in seen.wrong] == [MISSING]
    assert not seen.undecided


def test_a_commit_that_the_snapshot_does_not_see_is_left_out(settings: Settings) -> None:
    """It waits for a standby: in the view long ago, and not to be seen in Postgres (S7). So there is nothing to decide."""
    prepare_append_only(settings, EVENTS, SOME)
    with kept(settings, Mirror) as control:
        with psycopg.connect(settings.dsn, autocommit=True) as waiting, closing_sync(settings):
            waiting.execute("SET synchronous_commit = on")
            thread = threading.Thread(target=_unheard, args=(waiting, SOME))
            thread.start()
            eventually("the view has it", lambda: len(list(control.scan("view"))) == 60)
            assert rows(settings, "SELECT count(*) FROM events") == [(30,)]
            assert found(settings, Mirror).clean
            waiting.cancel()
            thread.join(30)
        assert found(settings, Mirror).rows == 60


def _unheard(connection: psycopg.Connection[Any], statement: str) -> None:
    connection.execute(statement.encode())


class Between(Verifier):
    """Lets something happen after the snapshot and before the view is looked at, the first time."""

    def __init__(self, settings: Settings, timeout: float, happens: Callable[[], None]) -> None:
        log = Log(settings)
        super().__init__(log, Control(log), lambda *_: None, timeout)
        self._happens = [happens]

    def _await(self, *args: Any) -> None:
        super()._await(*args)
        while self._happens:
            self._happens.pop()()


def truncated(settings: Settings, capture: Running) -> None:
    execute(settings, "TRUNCATE events", "INSERT INTO events VALUES ('after', 1, NULL)")
    capture.reach()


def read_again(settings: Settings, capture: Running) -> None:
    execute(settings, SOME)
    ask(settings, tables=[T])
    done(settings, capture, T)


@pytest.mark.parametrize("happens", [truncated, read_again])
def test_rows_that_go_meanwhile_let_the_table_be_compared_again(
    settings: Settings, happens: Callable[[Settings, Running], None]
) -> None:
    """Or are undecided, when there is no time for it: neither wrong nor clean."""
    prepare_append_only(settings, EVENTS, SOME)
    with capturing(settings) as capture, serving(settings, view=Mirror) as control:

        def happening() -> None:
            happens(settings, capture)
            end = Log(settings).newest_checkpoint(complete=True)
            assert end
            eventually("the view has it", lambda: control.running("view")[0].version >= end.version)

        capture.reach()
        await_live(control, "view")
        seen = Found(Between(settings, 60, happening), "view", Mirror)
        assert (seen.wrong, seen.undecided) == ([], [])
        assert seen.rows == rows(settings, "SELECT count(*) FROM events")[0][0]
        seen = Found(Hasty(settings, happening), "view", Mirror)
        assert not seen.wrong
        assert seen.undecided
        assert found(settings, Mirror).clean
        (counted,) = Between(settings, 60, happening).count({"view": Mirror})
        assert counted.differing == {}


class Hasty(Between):
    """Has no time to compare again."""

    def __init__(self, settings: Settings, happens: Callable[[], None]) -> None:
        super().__init__(settings, 60, happens)

    def _compare_without_key(self, *args: Any) -> None:
        self._timeout = 0.0
        super()._compare_without_key(*args)


def test_values_mean_the_same_as_in_json(settings: Settings) -> None:
    """Whole floats, documents, arrays, and rows from before a column."""
    prepare_append_only(
        settings,
        "CREATE TABLE events (f float8, r real, j jsonb, a int[], t timestamptz, b bytea)",
        """INSERT INTO events VALUES (1, 2.5, '{"b": 1.0, "a": [1e2]}', '{1,NULL}', now(), 'x')""",
        "INSERT INTO events VALUES (1e300, 'NaN', 'null', '{}', NULL, NULL)",
    )
    with kept(settings, Mirror):
        execute(settings, "ALTER TABLE events ADD COLUMN more text", "INSERT INTO events (more) VALUES ('x'), (NULL)")
        assert found(settings, Mirror).clean


class Clicked(DocumentConsumer):
    """Products with their clicks."""

    document = Document("public.products", clicks=Many("public.clicks", by="product_id"))
    store = ElasticsearchIndex("clicked", mappings={})

    def render(self, row: Node) -> Row:
        return {"clicks": count(row.clicks)}


def test_a_row_without_a_key_that_goes_excuses_every_document_that_holds_one(settings: Settings) -> None:
    """The delete does not say which document it was in."""
    clicks = ("CREATE TABLE clicks (product_id int)", "INSERT INTO clicks VALUES (1), (1), (2)")
    products = ("CREATE TABLE products (id int PRIMARY KEY)", "INSERT INTO products VALUES (1), (2), (3)")
    prepare_append_only(settings, *clicks, *products, table="clicks")
    with capturing(settings) as capture:
        capture.reach()
        execute(settings, "TRUNCATE clicks")
        capture.reach()
    log, ledger = Log(settings), Ledger()
    shapes = {schema.table: schema for schema in log.schemas().values()}
    execute(settings, clicks[1])
    with connect(settings) as connection, moment(connection):
        expected = expectation(connection, Clicked, "clicked", settings, shapes, dict.fromkeys(shapes))
        write(ledger, everything(expected, connection))
    gone = [change for change in log.scan("public.clicks") if change.row is None]
    assert len({change.key for change in gone}) == 3
    for change in gone:
        assert change.version > Version(1, 0)
        assert {key for _, key, _ in ledger.holders(*expected.member(change))} == {"1", "2"}
    ledger.close()
