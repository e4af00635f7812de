"""A consumer's process dies between any two steps of opening and applying: the next one goes on, and the view ends equal to Postgres.

Log and stores are real. (Of capture's cuts the same is shown in test_capture_steps.py. DuckDB is called so often that here a process
dies before every third call only; test_warehouse_kill.py takes all of them, without a log.)
"""

from __future__ import annotations

import itertools
from contextlib import closing

import psycopg
import pytest

from headrace import plugins
from headrace.log import Log
from headrace.settings import Settings
from headrace_shop import database
from headrace_verify.expected import everything, expectation
from headrace_verify.postgres import connect, moment, published
from tests.fixtures.capture import capturing, execute, prepare
from tests.fixtures.dying import DIED, serve, shown

EDITS = """
    BEGIN;
    UPDATE reviews SET product_id = 1 + {n} % 3, stars = 1 + {n} % 5 WHERE id = 1;
    UPDATE products SET price = {n}, category_id = 1 + {n} % 2 WHERE id = 2;
    DELETE FROM reviews WHERE id = 1000 + {n} - 1;
    INSERT INTO reviews (id, product_id, author, stars, body) VALUES (1000 + {n}, 3, 'A', 1 + {n} % 5, 'b');
    DELETE FROM products WHERE id = 2000 + {n} - 1;
    INSERT INTO products (id, category_id, name, description, price, stock) VALUES (2000 + {n}, 1, 'p', 'd', 1, 1);
    COMMIT
"""


@pytest.mark.parametrize(("name", "every"), [("search", 1), ("pages", 1), ("warehouse", 3)])
@pytest.mark.usefixtures("elasticsearch", "redis_server")
def test_killed_between_any_two_steps_of_an_apply(settings: Settings, name: str, every: int) -> None:
    with psycopg.connect(settings.dsn) as connection:
        database.create(connection)
        database.load(connection, database.Amounts(12, 30, 2, 2), 1)
    prepare(settings)
    with capturing(settings) as capture:
        capture.reach()
        assert serve(settings, name) == 0
        for step in itertools.count(1, every):
            execute(settings, EDITS.format(n=step))
            capture.reach()
            ended = serve(settings, name, step)
            assert ended in (0, DIED), f"step {step}"
            if ended == 0:
                break
            assert serve(settings, name) == 0
            assert _as_shown(settings, name) == _as_selected(settings, name), f"killed before step {step}"
    assert _as_shown(settings, name) == _as_selected(settings, name)
    assert step > 10, "an open and an apply have more steps than that"


def _as_shown(settings: Settings, name: str) -> dict[str, object]:
    return {f"{row.collection} {row.key}": row.value for row in shown(settings, name)}


def _as_selected(settings: Settings, name: str) -> dict[str, object]:
    """Return the documents as SQL joins and `render` make them."""
    log = Log(settings)
    shapes = {table: schema for (table, _), schema in sorted(log.schemas().items())}
    with closing(connect(settings)) as connection, moment(connection):
        sent = published(connection, settings.publication)
        made = expectation(connection, plugins.load(name), name, settings, shapes, sent)
        return {f"{each.row.collection} {each.row.key}": each.row.value for each in everything(made, connection)}
