"""`headrace teardown --topics`: what it says it would do is what it does, and nothing of anybody else goes with it."""

from __future__ import annotations

import orjson
from confluent_kafka.admin import AdminClient, NewTopic

from headrace.log import Log
from headrace_capture.slot import slot_facts
from tests.fixtures.capture import eventually, execute, rows
from tests.fixtures.processes import System


def test_it_names_its_topics_and_deletes_those_and_no_others(system: System) -> None:
    settings = system.settings
    execute(settings, "CREATE TABLE items (id int PRIMARY KEY, big text)", "INSERT INTO items VALUES (1, 'x')")
    system.run("setup", "--apply")
    system.start("capture", "capture")
    eventually("the snapshot is in the log", lambda: system.log.newest_checkpoint(complete=True))
    admin = AdminClient({"bootstrap.servers": settings.kafka})
    foreign = [f"{settings.source}.billing.invoices", f"{settings.source}.public", f"{settings.source}.a.b.c"]
    for made in admin.create_topics([NewTopic(name, 1, 1) for name in foreign]).values():
        made.result(30)
    ours = [f"{settings.source}.{name}" for name in ("public.items", "checkpoints", "schemas")]

    assert "Stop `headrace capture`" in system.ask("teardown", "--topics", "--yes").err
    assert system.ends("capture") == 0
    asked = system.ask("teardown", "--topics")
    assert asked.code == 2, "nobody is there to agree"
    would = orjson.loads(system.run("teardown", "--topics", "--json"))
    assert (would["slot"], would["topics"], would["applied"]) == (True, ours, False)
    assert any(statement.startswith("DROP PUBLICATION") for statement in would["statements"])
    assert all(f"delete the topic {topic}\n" in asked.out for topic in ours)
    assert not any(f"{topic}\n" in asked.out for topic in foreign)
    assert set(ours) <= Log(settings).topics.names(), "only said so far"
    assert slot_facts(settings)["exists"]

    assert "is gone" in system.run("teardown", "--topics", "--yes")
    eventually("our topics are gone", lambda: not set(ours) & Log(settings).topics.names())
    assert set(foreign) <= Log(settings).topics.names()
    assert not slot_facts(settings)["exists"]
    assert rows(settings, "SELECT pubname FROM pg_publication") == []
    assert "nothing of headrace is left" in system.run("teardown", "--topics", "--yes")
