"""Views of a log that changes its codec, and whose schema registry goes away: they wait for it, and hold what Postgres has."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from headrace.change import Row
from headrace.control import Control
from headrace.documents import Document, DocumentConsumer, Many, Node
from headrace.settings import Settings
from headrace.stores.kafka import KafkaTopic
from headrace_ops.registry import Registry
from tests.fixtures.capture import capturing, eventually, execute, prepare
from tests.fixtures.serving import await_live, serving
from tests.fixtures.verified import TYPES, VALUES, Warehouse, found

KINDS = ", ".join(f"k{n} {kind}" for n, kind in enumerate(VALUES))
MADE = (
    *TYPES,
    "CREATE TABLE makers (id int PRIMARY KEY, name text)",
    f"CREATE TABLE things (id serial PRIMARY KEY, maker_id int, extra text, {KINDS})",
    "INSERT INTO makers SELECT i, 'n' || i FROM generate_series(1, 3) i",
)
THING = f"INSERT INTO things (maker_id, {', '.join(f'k{n}' for n in range(len(VALUES)))}) VALUES (1, {', '.join(VALUES.values())})"
BARE = "INSERT INTO things (maker_id) VALUES (2)"
RENAMED = 'ALTER TABLE things RENAME extra TO "5 näme"'
MIGRATIONS = [
    "ALTER TABLE things ADD COLUMN more numeric[] DEFAULT '{{1.10,NULL},{NaN,2}}'",
    "ALTER TABLE things ALTER k1 TYPE text USING 'was ' || k1",
    "ALTER TABLE makers ADD COLUMN \"5 näme\" float8[] DEFAULT '{Infinity,1}'",
]


class Makers(DocumentConsumer):
    """Makers with their things."""

    document = Document("public.makers", things=Many("public.things", by="maker_id"))
    store = KafkaTopic("makers")

    def render(self, row: Node) -> Row:
        return {**row, "things": [dict(thing) for thing in row.things]}


VIEWS: dict[str, type[Any]] = {"warehouse": Warehouse, "makers": Makers}


def test_views_wait_for_a_registry_that_is_away_and_hold_what_postgres_has(
    settings: Settings, registry: Registry
) -> None:
    """From zero, and live: what they know they read on without it. Amid migrations, of a log that began in JSON."""
    avro = replace(settings, codec="avro")
    prepare(settings, *MADE, THING, BARE)
    with capturing(settings) as capture:
        capture.reach()
    with capturing(avro) as capture:
        execute(
            settings,
            THING,
            RENAMED,
            BARE,
            "DELETE FROM things WHERE id = 2",
            "UPDATE makers SET name = NULL WHERE id = 2",
        )
        capture.reach()
        registry.kill()
        with serving(settings, **VIEWS) as control:
            eventually("both wait", lambda: waits(control))
            registry.start()
            await_live(control, *VIEWS)
            equal(settings)
            registry.kill()
            execute(settings, BARE, "UPDATE makers SET id = 9 WHERE id = 2")
            capture.reach()
            eventually("what is known comes", lambda: 9 in ids(control))
            execute(settings, *MIGRATIONS, THING, "INSERT INTO makers VALUES (10)", "UPDATE things SET maker_id = 10")
            capture.hear("registry-away")
            registry.start()
            capture.reach()
            equal(settings)


def waits(control: Control) -> bool:
    """Whether each view says that it waits for the registry."""
    reports = control.reports()
    return all(any(report.code == "registry-away" for report in reports.get(name, [])) for name in VIEWS)


def ids(control: Control) -> set[int]:
    """Return the makers that readers see."""
    return {row.value["id"] for row in control.scan("makers")}


def equal(settings: Settings) -> None:
    """Each view is what Postgres has, as soon as nothing is to be read again."""
    for name in VIEWS:
        eventually(f"{name} is equal", partial(clean, settings, name))


def clean(settings: Settings, name: str) -> bool:
    """Whether verify finds nothing."""
    return found(settings, VIEWS[name], name).clean
