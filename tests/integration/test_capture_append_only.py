"""Tables without a key (S10): left out unless named; then each row once in the log, keyed by its position; and what is refused."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import replace
from typing import Any

import orjson
import psycopg
import pytest
from psycopg import errors as pg

from headrace.change import Checkpoint, Row
from headrace.errors import Misconfigured
from headrace.log import CutWriter, Log
from headrace.settings import Settings
from headrace_capture import catalog, setup, teardown
from tests.fixtures.capture import (
    Running,
    capturing,
    changes,
    eventually,
    execute,
    loopback,
    prepare,
    refused,
    replay,
    rows,
)

T = "public.events"
EVENTS = "CREATE TABLE events (what text, n int, big text)"
SOME = "INSERT INTO events SELECT 'same', i % 3, NULL FROM generate_series(1, 30) i"


class Died(BaseException):
    """The process is gone."""


class DyingLog(Log):
    """A log whose writer dies instead of sealing once more."""

    def __init__(self, settings: Settings, cuts: int) -> None:
        super().__init__(settings)
        self.left = cuts

    def writer(self) -> CutWriter:
        writer = super().writer()
        seal = writer.seal

        def mortal(**named: Any) -> Checkpoint:
            if not self.left:
                raise Died
            self.left -= 1
            return seal(**named)

        writer.seal = mortal
        return writer


def prepare_append_only(settings: Settings, *statements: str, table: str = "events") -> setup.Plan:
    """Run statements, then what `headrace setup --append-only TABLE --apply` does."""
    execute(settings, *statements)
    with closing(catalog.connect(settings.dsn)) as connection:
        made = setup.plan(connection, settings, [], "", [table])
        setup.apply(connection, made)
    return made


def as_counted(found: list[Row]) -> Counter[bytes]:
    """Rows without a key are a multiset."""
    return Counter(orjson.dumps(row, option=orjson.OPT_SORT_KEYS) for row in found)


def equal(settings: Settings, table: str = "events") -> None:
    """The log's live rows are Postgres's, each as often as it is there."""
    selected = [row for (row,) in rows(settings, f"SELECT row_to_json(t) FROM {table} t")]
    assert as_counted(list(replay(settings, f"public.{table}").values())) == as_counted(selected)


def test_snapshot_stream_and_restarts_hold_each_row_once(settings: Settings) -> None:
    """Rows that are equal are still several; a rollback, COPY, large values, and a table with a key beside it."""
    prepare_append_only(settings, EVENTS, SOME, "CREATE TABLE items (id int PRIMARY KEY)")
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(
            settings,
            SOME,
            "INSERT INTO events VALUES ('large', 1, repeat(md5('x'), 500))",
            "INSERT INTO items VALUES (1)",
        )
        execute(settings, f"BEGIN; {SOME}; ROLLBACK")
        capture.reach()
    equal(settings)
    with psycopg.connect(settings.dsn) as connection, connection.cursor().copy("COPY events FROM STDIN") as copy:
        for n in range(500):
            copy.write_row(["copied", n, None])
    with capturing(settings) as capture:
        capture.reach()
    equal(settings)
    assert Counter(change.op for change in changes(settings, T)) == {"r": 30, "c": 531}
    assert Log(settings).schemas()[T, 1].key == ()


def test_a_row_is_keyed_by_its_position(settings: Settings) -> None:
    """Commit LSN and ordinal; in a snapshot its consistent point and a number below zero, so that both can be at one LSN."""
    prepare_append_only(settings, EVENTS, SOME)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, SOME)
        capture.reach()
    log = changes(settings, T)
    assert [orjson.loads(change.key) for change in log] == [
        {"lsn": change.version.lsn, "ordinal": change.ordinal if change.read is None else -1 - at}
        for at, change in enumerate(log)
    ]


def test_a_transaction_that_spans_cuts_goes_on_where_it_was(settings: Settings) -> None:
    """Stopped between two cuts of one transaction: the same rows have the same keys when Postgres sends it again."""
    settings = replace(settings, cut_records=7)
    prepare_append_only(settings, EVENTS)
    log = DyingLog(settings, cuts=100)
    running = Running(settings, log)
    running.reach()
    log.left = 6
    execute(settings, "INSERT INTO events SELECT 'one', i, NULL FROM generate_series(1, 100) i")
    eventually("capture dies", lambda: running.error)
    running.join()
    assert 0 < len(replay(settings, T)) < 100
    with capturing(settings) as capture:
        capture.reach()
    equal(settings)
    assert len(changes(settings, T)) == 100


def test_truncate_empties_it(settings: Settings) -> None:
    """A delete for each row, rows of before and after in the same transaction."""
    prepare_append_only(settings, EVENTS, SOME)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, SOME, f"BEGIN; {SOME}; TRUNCATE events; INSERT INTO events VALUES ('after', 1); COMMIT")
        capture.reach()
    equal(settings)
    assert [row["what"] for row in replay(settings, T).values()] == ["after"]


def test_a_snapshot_that_begins_again_leaves_nothing_of_the_first(settings: Settings) -> None:
    """Its rows have other positions: the first attempt's are deleted (S6)."""
    prepare_append_only(settings, EVENTS, SOME.replace("30", "5000"))
    small = replace(settings, cut_records=1000)
    running = Running(small, DyingLog(small, cuts=3))
    eventually("capture dies in the snapshot", lambda: running.error)
    running.join()
    assert 0 < len(replay(settings, T)) < 5000
    execute(settings, "INSERT INTO events VALUES ('between', 0, NULL)")
    with capturing(settings) as capture:
        capture.reach()
    equal(settings)


def test_setup_says_which_statements_will_fail_and_they_do(settings: Settings) -> None:
    """Also those that cascade to it; teardown lets them go on."""
    parent = "CREATE TABLE parents (id int PRIMARY KEY)"
    child = "CREATE TABLE events (parent int REFERENCES parents ON DELETE CASCADE, n int UNIQUE)"
    made = prepare_append_only(
        settings, parent, child, "INSERT INTO parents VALUES (1)", "INSERT INTO events VALUES (1, 1)"
    )
    (said,) = [warning for warning in made.warnings if "append-only" in warning]
    assert (
        "UPDATE, DELETE, MERGE and ON CONFLICT DO UPDATE of it, DELETE of public.parents, which cascades to it" in said
    )
    failing = [
        "UPDATE events SET n = 2",
        "DELETE FROM events",
        "MERGE INTO events USING parents ON true WHEN MATCHED THEN DELETE",
        "INSERT INTO events VALUES (1, 1) ON CONFLICT (n) DO UPDATE SET n = 3",
        "DELETE FROM parents",
    ]
    for statement in failing:
        with pytest.raises(pg.ObjectNotInPrerequisiteState, match="replica identity"):
            execute(settings, statement)
    execute(settings, "INSERT INTO events VALUES (1, 2) ON CONFLICT DO NOTHING", "TRUNCATE events")
    with closing(catalog.connect(settings.dsn)) as connection:
        teardown.run(connection, settings, teardown.plan(connection, settings))
    execute(settings, *failing)


def test_it_is_captured_only_when_named_and_stays_so(settings: Settings) -> None:
    """Without the option it is left out, and told how to; a second run has nothing to do and still warns."""
    prepare(settings, EVENTS, "CREATE TABLE items (id int PRIMARY KEY)")
    with closing(catalog.connect(settings.dsn)) as connection:
        (left,) = setup.plan(connection, settings, []).left_out
        assert f"say also: --append-only {T}" in left.remedy
        setup.apply(connection, setup.plan(connection, settings, [], "", [T]))
        again = setup.plan(connection, settings, [])
    assert (again.statements, again.left_out) == ([], [])
    assert [fact["table"] for fact in again.facts()["tables"] if fact["append_only"]] == [T]
    assert any("refuses" in warning for warning in again.warnings)


def test_one_that_was_dropped_and_made_anew_is_captured_again_where_it_is_named(settings: Settings) -> None:
    """Setup remembers that it was append-only once, and it is not published now."""
    prepare_append_only(settings, EVENTS, "CREATE TABLE items (id int PRIMARY KEY)")
    execute(settings, "DROP TABLE events", EVENTS)
    with closing(catalog.connect(settings.dsn)) as connection:
        made = setup.plan(connection, settings, [], "", [T])
        setup.apply(connection, made)
        assert (made.append_only, made.left_out) == ([T], [])
        assert T in {table.full_name for table in catalog.published_tables(connection, settings.publication)}
        assert setup.plan(connection, settings, [], "", [T]).statements == []


@pytest.mark.parametrize(
    ("ddl", "code"),
    [
        ("ALTER TABLE events REPLICA IDENTITY FULL", "append-only-full"),
        ("ALTER TABLE events ADD PRIMARY KEY (what)", "append-only-key"),
        ("ALTER TABLE events ADD PRIMARY KEY (what) DEFERRABLE", "append-only-key"),
        (
            "ALTER TABLE events ALTER n SET NOT NULL, ADD UNIQUE (n); ALTER TABLE events REPLICA IDENTITY USING INDEX events_n_key",
            "append-only-key",
        ),
    ],
)
def test_what_is_not_append_only_is_refused(settings: Settings, ddl: str, code: str) -> None:
    with pytest.raises(Misconfigured) as error:
        prepare_append_only(settings, EVENTS, ddl)
    assert error.value.code == code
    assert ("headrace setup --table public.events --apply" in error.value.remedy) == (code == "append-only-key")
    assert rows(settings, "SELECT FROM pg_publication") == []


def test_what_is_no_longer_append_only_stops_capture_before_anything_is_wrong(settings: Settings) -> None:
    """FULL lets updates through, and their old rows name no row of the log."""
    prepare_append_only(settings, EVENTS, SOME)
    running = Running(settings)
    running.hear("streaming")
    execute(settings, "ALTER TABLE events REPLICA IDENTITY FULL", "UPDATE events SET n = 5")
    error = eventually("capture stops", lambda: running.error)
    running.join()
    assert error.code == "append-only-full"
    assert refused(settings).code == "append-only-full"


def test_partitions_without_a_key_are_one_table(settings: Settings) -> None:
    prepare_append_only(
        settings,
        "CREATE TABLE events (at int, what text) PARTITION BY RANGE (at)",
        "CREATE TABLE events_1 PARTITION OF events FOR VALUES FROM (0) TO (10)",
        "CREATE TABLE events_2 PARTITION OF events FOR VALUES FROM (10) TO (20)",
        "INSERT INTO events SELECT i % 20, 'x' FROM generate_series(1, 50) i",
    )
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "INSERT INTO events SELECT i % 20, 'x' FROM generate_series(1, 50) i")
        capture.reach()
    equal(settings)
    assert Log(settings).tables() == [T]


def test_s10_changes_of_a_foreign_partition_are_not_in_the_wal_and_the_table_is_not_exact_until_it_is_detached(
    settings: Settings,
) -> None:
    """Only a table without a key can have one."""
    made = prepare_append_only(
        settings,
        *loopback(settings),
        "CREATE TABLE behind (what text, n int)",
        "CREATE TABLE events (what text, n int) PARTITION BY RANGE (n)",
        "CREATE TABLE near PARTITION OF events FOR VALUES FROM (0) TO (10)",
        "CREATE FOREIGN TABLE far PARTITION OF events FOR VALUES FROM (10) TO (20) SERVER here OPTIONS (table_name 'behind')",
        "INSERT INTO events VALUES ('near', 1), ('far', 11)",
    )
    mend = "ALTER TABLE public.events DETACH PARTITION public.far"
    assert [warning for warning in made.warnings if warning.endswith(f"until: {mend}")]
    with capturing(settings) as capture:
        assert capture.hear(f"{T} stays inexact").endswith(mend)
        execute(settings, "INSERT INTO events VALUES ('near', 2), ('far', 12)")
        assert capture.reach().inexact == (T,)
        assert sorted(row["n"] for row in replay(settings, T).values()) == [1, 2, 11]
        execute(settings, mend)
        eventually("it is exact", lambda: capture.reach().inexact == ())
    assert sorted(row["n"] for row in replay(settings, T).values()) == [1, 2]
