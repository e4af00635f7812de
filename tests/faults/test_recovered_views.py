"""Views over a log that parted from its source: they go on with the new epoch, and end equal to Postgres, row by row."""

from __future__ import annotations

import pytest

from headrace.change import format_lsn
from headrace.log import Log
from headrace_ops.elasticsearch import Elasticsearch
from headrace_ops.redis import Redis
from tests.fixtures.capture import execute, now
from tests.fixtures.processes import SMALL, System
from tests.fixtures.slots import drop_slot

GAP = (
    "DELETE FROM reviews WHERE id % 3 = 0",
    "DELETE FROM order_items WHERE order_id % 4 = 0",
    "UPDATE products SET name = name || ' of the gap' WHERE id % 5 = 0",
)


@pytest.mark.timeout(400)
def test_all_three_views_go_on(system: System, elasticsearch: Elasticsearch, redis_server: Redis) -> None:
    """The slot is lost with what came since; one command, while the views run on, and nothing is rebuilt."""
    assert elasticsearch
    assert redis_server
    system.run("shop", "load", *SMALL)
    system.up("search", "pages", "warehouse")
    generations = {view: system.report(view) for view in ("search", "pages", "warehouse")}
    token = f"1@{format_lsn(now(system.settings))}"
    system.kill("capture")
    drop_slot(system.settings)
    execute(system.settings, *GAP)
    ended = system.ask("capture")
    assert (ended.code, "headrace resnapshot --recover" in ended.err) == (3, True)
    assert system.ask("resnapshot", "--recover").code == 0
    system.start("capture", "capture")
    execute(system.settings, "UPDATE products SET name = name || ' beside' WHERE id % 7 = 0")
    log = Log(system.settings)

    def exact() -> bool:
        newest = log.newest_checkpoint(complete=True)
        return bool(newest and newest.version.epoch == 2 and not newest.inexact)

    system.waiting("every table was read again", exact)
    system.settle("search", "pages", "warehouse")
    system.verify()
    waited = system.ask("wait", "search", "--lsn", token)
    assert (waited.code, "token-void" in waited.err) == (3, True), waited
    for view, before in generations.items():
        after = system.report(view)
        assert before
        assert after
        assert (after.generation, before.version.epoch, after.version.epoch) == (before.generation, 1, 2)
