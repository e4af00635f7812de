"""Capture's sessions (S14): neither the server's settings nor row security shape what is in the log."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import pytest

from headrace.settings import Settings
from headrace_capture import catalog
from tests.fixtures.capture import capturing, execute, prepare, refused, replay, rows

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text, n int)"
T = "public.items"


def test_s14_the_servers_settings_do_not_shape_values(settings: Settings) -> None:
    """A database that prints dates, intervals, floats, bytes and money in its own way: snapshot and stream say the same."""
    name = settings.dsn.rpartition("/")[2]
    odd = {
        "DateStyle": "German",
        "IntervalStyle": "sql_standard",
        "TimeZone": "Asia/Tokyo",
        "extra_float_digits": "-3",
        "bytea_output": "escape",
    }
    execute(settings, *[f"ALTER DATABASE {name} SET {setting} = '{value}'" for setting, value in odd.items()])
    values = "'2024-02-03 04:05:06.7+00', '2024-02-03', '1 day 2 hours', 0.1::float8 + 0.2, '\\x00ff'"
    prepare(
        settings,
        "CREATE TABLE items (id int PRIMARY KEY, at timestamptz, day date, took interval, f float8, raw bytea)",
        f"INSERT INTO items VALUES (1, {values})",
    )
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, f"INSERT INTO items VALUES (2, {values})")
        capture.reach()
    first, second = ({k: v for k, v in row.items() if k != "id"} for row in replay(settings, T).values())
    assert (
        first
        == second
        == {
            "at": "2024-02-03T04:05:06.7+00:00",
            "day": "2024-02-03",
            "took": "1 day 02:00:00",
            "f": 0.30000000000000004,
            "raw": "AP8=",
        }
    )


@pytest.mark.parametrize("connect", [catalog.connect, catalog.connect_replication])
def test_s14_every_connection_sets_what_shapes_a_value(
    settings: Settings, connect: Callable[[str], catalog.Connection]
) -> None:
    """Money too. Whether a server has a locale with other money depends on its machine; C and POSIX print the same, and all have both."""
    name = settings.dsn.rpartition("/")[2]
    odd = {"lc_monetary": "POSIX", "DateStyle": "German", "row_security": "on", "search_path": "public"}
    execute(settings, *[f"ALTER DATABASE {name} SET {setting} = '{value}'" for setting, value in odd.items()])
    assert rows(settings, "SHOW lc_monetary") == [("POSIX",)]
    with closing(connect(settings.dsn)) as connection:
        said = {setting: connection.execute(f"SHOW {setting}".encode()).fetchone() for setting in odd}
    assert said == {"lc_monetary": ("C",), "DateStyle": ("ISO, MDY",), "row_security": ("off",), "search_path": ("",)}


def test_s14_row_security_is_an_error_not_an_empty_snapshot(settings: Settings) -> None:
    """COPY by a role under row security shows no rows and no error; row_security=off makes it refuse."""
    role = f"r_{settings.source}"
    prepare(settings, ITEMS, "INSERT INTO items VALUES (1, 'hidden', 1)", "ALTER TABLE items ENABLE ROW LEVEL SECURITY")
    execute(settings, f"CREATE ROLE {role} LOGIN REPLICATION PASSWORD 'x'", f"GRANT SELECT ON items TO {role}")
    try:
        error = refused(replace(settings, dsn=settings.dsn.replace("//postgres@", f"//{role}:x@")))
        assert error.code == "postgres-rights"
        assert "row-level security" in error.message
    finally:
        execute(settings, f"DROP OWNED BY {role}", f"DROP ROLE {role}")
