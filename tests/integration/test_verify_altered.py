"""Verify beside DDL: what the log learns of tables while a view is compared, and tables that are published and not captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from headrace.change import Row, Version
from headrace.consumer import ViewRow
from headrace.control import Control
from headrace.documents import Document, DocumentConsumer, Node
from headrace.errors import Transient
from headrace.log import Log
from headrace.settings import Settings
from headrace.stores.kafka import KafkaTopic
from headrace.waiting import reached
from headrace_verify.ledger import MISSING
from headrace_verify.postgres import connect, without_key
from headrace_verify.verify import Verifier
from tests.fixtures.capture import capturing, eventually, execute, now, prepare
from tests.fixtures.serving import await_live, serving
from tests.fixtures.silent import ATTACH, HIGH, LOW, PARTS, ROWS, fingerprint
from tests.fixtures.verified import ITEMS, Mirror, T, found, kept, meddle
from tests.integration.test_capture_append_only import prepare_append_only

PARTED = "public.parts"


class Whole(DocumentConsumer):
    """Rows with all of their columns."""

    document = Document(T)
    store = KafkaTopic("verify-whole")

    def render(self, row: Node) -> Row:
        return dict(row)


class Altering(Control):
    """Lets a migration reach the view before the view is looked at."""

    def __init__(self, log: Log, settings: Settings, *statements: str) -> None:
        super().__init__(log)
        self._alter = lambda: execute(settings, *statements)
        self._settings = settings

    def _altered(self, name: str) -> None:
        self._alter()
        reached(self, name, Version(1, now(self._settings)), 60)

    def scan(self, name: str, generation: int | None = None, timeout: float = 60.0) -> Iterator[ViewRow]:
        self._altered(name)
        yield from super().scan(name, generation, timeout)

    def counts(self, name: str, generation: int, timeout: float = 150.0) -> tuple[Version, dict[str, int]]:
        self._altered(name)
        return super().counts(name, generation, timeout)


def made(settings: Settings, table: str) -> tuple[str, ...]:
    """Return a migration that brings a captured table."""
    return (
        f"CREATE TABLE {table} (id int PRIMARY KEY)",
        f"ALTER PUBLICATION {settings.publication} ADD TABLE {table}",
        f"INSERT INTO {table} VALUES (1)",
    )


def test_a_view_that_knows_a_table_or_column_since_is_not_called_wrong(settings: Settings) -> None:
    """Compared: a table more, whole rows with a column more; counted: a table more. Where nothing differs the migration is no matter."""
    prepare(settings, ITEMS, f"INSERT INTO {T} SELECT i, i, 'x' FROM generate_series(1, 30) i")

    def asked(*statements: str) -> Verifier:
        return Verifier(log, Altering(log, settings, *statements), lambda *_: None, 60)

    def ended(compared: Callable[[], Iterator[Any]]) -> tuple[str, str]:
        with pytest.raises(Transient) as refused:
            list(compared())
        return refused.value.code, refused.value.message.partition(" ")[0]

    with capturing(settings) as capture, serving(settings, mirror=Mirror, whole=Whole) as control:
        capture.reach()
        await_live(control, "mirror", "whole")
        log = Log(settings)
        new = asked(*made(settings, "one")), asked(*made(settings, "two"))
        assert ended(lambda: new[0].verify({"mirror": Mirror})) == ("table-altered", "public.one")
        assert ended(lambda: new[1].count({"mirror": Mirror})) == ("table-altered", "public.two")
        wider = f"ALTER TABLE {T} ADD COLUMN note text", f"UPDATE {T} SET n = n WHERE id = 1"
        assert ended(lambda: asked(*wider).verify({"whole": Whole})) == ("table-altered", T)
        again = f"ALTER TABLE {T} ADD COLUMN more text", f"UPDATE {T} SET n = n WHERE id = 1"
        (outcome,) = asked(*again).verify({"mirror": Mirror})
        assert not any(outcome.ledger.counts().values())
        outcome.close()
        assert found(settings, Whole, "whole").clean


@pytest.mark.usefixtures("often")
def test_rows_that_came_silently_and_were_read_again_are_counted_again(settings: Settings) -> None:
    """With a partition that was attached: the log has them as read, like those that were there before."""

    class Attaching(Control):
        """Lets the first look at the view wait until it has the new partition."""

        attached = False

        def counts(self, name: str, generation: int, timeout: float = 150.0) -> tuple[Version, dict[str, int]]:
            if not self.attached:
                execute(settings, *ATTACH.split("; "))
                eventually(
                    "the view has them", lambda: super(Attaching, self).counts(name, generation)[1][PARTED] == 23
                )
                self.attached = True
            return super().counts(name, generation, timeout)

    prepare(settings, PARTS, LOW, HIGH, ROWS)
    with kept(settings, Mirror):
        eventually("it knows the partitions", lambda: "leaves" in fingerprint(settings, PARTED))
        log = Log(settings)
        (counted,) = Verifier(log, Attaching(log), lambda *_: None, 60).count({"view": Mirror})
    assert counted.found == counted.expected == {PARTED: 23}


def test_what_is_published_and_left_out_keeps_no_table_from_being_compared(settings: Settings) -> None:
    """Capture says so of a table without a key that it can use, or in a schema with a dot: the log never knows it."""
    execute(
        settings,
        ITEMS,
        f"INSERT INTO {T} VALUES (1, 1, 'x')",
        "CREATE TABLE audit (n int)",
        "CREATE TABLE late (id int PRIMARY KEY DEFERRABLE)",
        "CREATE TABLE named (id int NOT NULL UNIQUE)",
        "ALTER TABLE named REPLICA IDENTITY USING INDEX named_id_key",
        "INSERT INTO audit VALUES (1)",
        "INSERT INTO named VALUES (1)",
        'CREATE SCHEMA "a.b" CREATE TABLE t (id int PRIMARY KEY)',
        'INSERT INTO "a.b".t VALUES (1)',
        f"CREATE PUBLICATION {settings.publication} FOR ALL TABLES",
    )
    with kept(settings, Mirror):
        seen = found(settings, Mirror)
        assert (seen.clean, seen.rows) == (True, 2)
        assert [note for note in seen.notes if "left out" in note] == [
            f"public.{name} is published and left out (no usable key): not compared" for name in ("audit", "late")
        ]
        assert not [note for note in seen.notes if "a.b.t" in note]
        log = Log(settings)
        (counted,) = Verifier(log, Control(log), lambda *_: None, 60).count({"view": Mirror})
        assert (counted.found, counted.differing) == ({T: 1, "public.named": 1}, {})
        meddle(settings, "DELETE FROM rows WHERE collection = ?", T)
        assert [d.kind for d in found(settings, Mirror).wrong] == [MISSING]


def test_what_capture_has_not_read_yet_is_not_left_out(settings: Settings) -> None:
    """It is read by a key, by another index that is the replica identity, or was named as append-only."""
    execute(settings, "CREATE TABLE named (id int NOT NULL UNIQUE)", "CREATE TABLE audit (n int)")
    execute(settings, "ALTER TABLE named REPLICA IDENTITY USING INDEX named_id_key")
    prepare_append_only(settings, ITEMS, "CREATE TABLE events (n int)")
    tables = {T, "public.named", "public.events", "public.audit"}
    with connect(settings) as connection:
        assert without_key(connection, settings.publication, tables) == {"public.audit"}
        assert without_key(connection, "another", tables) == {"public.audit", "public.events"}
