"""Verify, again and again, while all that may happen to rows and processes does: it never calls a right view wrong.

Tables with keys of several columns, of text, without a key and partitioned; transactions that stay open, keys that change, TRUNCATE, and
columns that come and go; capture and the views started again; three partitions, small cuts, small pages. What verify may say beside
that all is right is that it cannot say: a table was altered meanwhile, the view did not come that far in time, or no process ran it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from random import Random
from typing import Any

import psycopg
import pytest

from headrace.control import Control
from headrace.errors import HeadraceError
from headrace.log import Log
from headrace.runner import rows as asked
from headrace.settings import Settings
from headrace.stores.kafka import KafkaTopic
from headrace_verify.verify import Verifier
from tests.fixtures.capture import capturing, eventually, now
from tests.fixtures.documents_deep import COLUMNS, Deep
from tests.fixtures.meanwhile import Body, meanwhile
from tests.fixtures.seeds import seeds, steps
from tests.fixtures.serving import await_live, serving
from tests.fixtures.verified import Found, Warehouse
from tests.integration.test_capture_append_only import prepare_append_only

SEEDS = seeds("1")
STEPS = steps(1)
AWAY = {"consumer-not-running", "no-live-generation", "no-answer", "view-behind"}
"""What may be said where processes end meanwhile."""
_IDS = 40


class Streamed(Deep):
    """Documents of several levels."""

    store = KafkaTopic("load-deep", partitions=3)


VIEWS: dict[str, type[Any]] = {"documents": Streamed, "warehouse": Warehouse}


def prepared(settings: Settings) -> None:
    made = [
        f"CREATE TABLE {t} ({', '.join(f'{n} {kind}' for n, kind in of.items())}, PRIMARY KEY (id))"
        for t, of in COLUMNS.items()
    ]
    prepare_append_only(
        settings,
        *made,
        "CREATE TABLE pairs (a text, b numeric, n int, big text, PRIMARY KEY (b, a))",
        "CREATE TABLE parted (id int PRIMARY KEY, n int) PARTITION BY RANGE (id)",
        "CREATE TABLE part1 PARTITION OF parted FOR VALUES FROM (0) TO (20)",
        "CREATE TABLE part2 PARTITION OF parted FOR VALUES FROM (20) TO (1000)",
        "CREATE TABLE events (what text, n int)",
        "INSERT INTO events SELECT 'same', i % 3 FROM generate_series(1, 30) i",
        "INSERT INTO parted SELECT i, i FROM generate_series(1, 40) i",
        "INSERT INTO pairs SELECT 'k' || i, i % 5 + 0.50, i, repeat(md5(i::text), 100) FROM generate_series(1, 40) i",
        "INSERT INTO categories SELECT i, nullif(i % 7, 0), 'c' || i FROM generate_series(1, 20) i",
        "INSERT INTO products SELECT i, nullif(i % 25, 0), 'p' || i FROM generate_series(1, 40) i",
        "INSERT INTO reviews SELECT i, i % 40, nullif(i % 6, 0), nullif(i % 3, 0) = 1, i % 11 FROM generate_series(1, 80) i",
        "INSERT INTO comments SELECT i, i % 80, chr(97 + i % 3) FROM generate_series(1, 80) i",
        "INSERT INTO product_tags SELECT i, i % 40, i % 9 FROM generate_series(1, 60) i",
        "INSERT INTO tags SELECT i, 't' || i FROM generate_series(1, 8) i",
    )


def statement(chance: Random) -> str:
    """Return a statement that changes rows."""
    some = lambda: chance.randint(1, _IDS)  # noqa: E731
    return chance.choice(
        [
            f"UPDATE products SET category_id = {some()} WHERE id = {some()}",
            f"UPDATE reviews SET product_id = {some()}, paid = {some()}.10 WHERE id % {_IDS} = {some()}",
            f"UPDATE reviews SET hidden = NOT hidden WHERE id = {some()}",
            f"UPDATE comments SET review_id = {some()} WHERE id = {some()}",
            f"UPDATE categories SET parent_id = {some()} WHERE id = {some()}",
            f"DELETE FROM {chance.choice(list(COLUMNS))} WHERE id = {some()}",
            f"INSERT INTO tags VALUES ({some()}, 'new') ON CONFLICT DO NOTHING",
            f"INSERT INTO product_tags VALUES ({some()}, {some()}, {some()}) ON CONFLICT DO NOTHING",
            f"INSERT INTO products VALUES ({some()}, {some()}, 'new') ON CONFLICT DO NOTHING",
            f"INSERT INTO reviews VALUES ({some()}, {some()}, {some()}, false, 1.5) ON CONFLICT DO NOTHING",
            f"UPDATE products SET id = id + 1000 WHERE id = {some()}",
            "UPDATE products SET id = id - 1000 WHERE id > 1000 AND NOT EXISTS (SELECT FROM products p WHERE p.id = products.id - 1000)",
            f"UPDATE pairs SET b = b + 1 WHERE a = 'k{some()}'",
            f"UPDATE pairs SET n = n + 1 WHERE a = 'k{some()}'",
            f"INSERT INTO pairs VALUES ('k{some()}', {some()}, 1, repeat('y', 3000)) ON CONFLICT DO NOTHING",
            f"DELETE FROM pairs WHERE a = 'k{some()}'",
            f"UPDATE parted SET id = id + 100 WHERE id = {some()} AND NOT EXISTS (SELECT FROM parted p WHERE p.id = parted.id + 100)",
            f"UPDATE parted SET n = n + 1 WHERE id < {some()}",
            f"INSERT INTO parted VALUES ({some()}, 1) ON CONFLICT DO NOTHING",
            "INSERT INTO events SELECT 'more', i % 2 FROM generate_series(1, 3) i",
            *([f"TRUNCATE {chance.choice(['tags', 'events', 'parted', 'pairs', 'comments'])}"] if chance.random() < 0.15 else []),
        ]
    )  # fmt: skip


def _load(settings: Settings, chance: Random, stop: threading.Event, *, slow: bool) -> None:
    """Run transactions, some of which stay open, or come to nothing."""
    with psycopg.connect(settings.dsn) as connection:
        connection.execute("SET lock_timeout = '2s'")
        connection.commit()
        while not stop.is_set():
            with suppress(psycopg.Error):
                for _ in range(chance.choice([1, 1, 2, 5])):
                    connection.execute(statement(chance).encode())
                    if slow:
                        stop.wait(chance.random())
                if chance.random() < 0.9:
                    connection.commit()
            connection.rollback()
            stop.wait(0.02)


def _migrate(settings: Settings, chance: Random, stop: threading.Event) -> None:
    """Let columns come and go, of which none is declared."""
    number = 0
    while not stop.wait(3 * chance.random()):
        table = chance.choice(["pairs", "parted", "events", "comments"])
        with suppress(psycopg.Error), psycopg.connect(settings.dsn) as connection:
            connection.execute("SET lock_timeout = '1s'")
            connection.execute(f"ALTER TABLE {table} ADD COLUMN x{number} int".encode())
            connection.commit()
            connection.execute(f"ALTER TABLE {table} DROP COLUMN x{chance.randint(0, number)}".encode())
        number += 1


class Running:
    """Capture and the views, which are started again now and then."""

    def __init__(self, settings: Settings, stack: ExitStack) -> None:
        self._settings = settings
        self._capture, self._views = stack.enter_context(ExitStack()), stack.enter_context(ExitStack())
        self._capture.enter_context(capturing(settings)).reach()
        self.control = self._views.enter_context(serving(settings, **VIEWS))
        await_live(self.control, *VIEWS)

    def restart(self, chance: Random, stop: threading.Event) -> None:
        while not stop.wait(1 + 4 * chance.random()):
            if chance.random() < 0.6:
                self._capture.close()
                stop.wait(chance.random())
                self._capture.enter_context(capturing(self._settings))
            else:
                self._views.close()
                self._views.enter_context(serving(self._settings, **VIEWS))

    def shown(self, lsn: int) -> bool:
        """Whether readers of all views see so much."""
        reports = self.control.reports()
        return all(any(each.live and each.version.lsn >= lsn for each in reports[name]) for name in VIEWS)


def said(settings: Settings) -> list[str]:
    """Compare each view by rows and by counts; return why that could not be, of those of which it could not."""
    log, refused = Log(settings), list[str]()
    verifier = Verifier(log, Control(log), lambda *_: None, 120)
    for name, consumer in VIEWS.items():
        with noting(refused):
            found = Found(verifier, name, consumer)
            assert found.clean, (name, found.wrong, found.undecided, found.notes)
        with noting(refused):
            (counted,) = verifier.count({name: consumer})
            assert not counted.differing, (name, counted)
    return refused


@contextmanager
def noting(refused: list[str]) -> Iterator[None]:
    """Note an error of headrace's own."""
    try:
        yield
    except HeadraceError as error:
        refused.append(error.code)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_view_is_never_called_wrong(settings: Settings, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = Random(seed)
    monkeypatch.setattr(asked, "_MOST_ROWS", chance.choice([7, 50, 500]))
    settings = replace(settings, partitions=3, cut_records=chance.choice([3, 100, settings.cut_records]))
    prepared(settings)
    with ExitStack() as stack:
        running = Running(settings, stack)
        bodies: list[Body] = [
            lambda stop: _load(settings, Random(seed + 1), stop, slow=False),
            lambda stop: _load(settings, Random(seed + 2), stop, slow=True),
        ]
        may: set[str] = set()
        if chance.random() < 0.5:
            bodies.append(lambda stop: _migrate(settings, Random(seed + 3), stop))
            may |= {"table-altered"}
        if chance.random() < 0.5:
            bodies.append(lambda stop: running.restart(Random(seed + 4), stop))
            may |= AWAY
        with meanwhile(*bodies):
            for _ in range(STEPS):
                assert may.issuperset(said(settings))
        lsn = now(settings)
        eventually("both show it", lambda: running.shown(lsn), 180)
        assert not said(settings)
