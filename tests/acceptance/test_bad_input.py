"""What people get wrong: each is a short error that names the setting and the remedy, a non-zero exit, and nothing is lost."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from headrace.settings import Settings
from headrace_ops import ports
from headrace_ops.postgres import Postgres
from tests.fixtures.capture import execute, rows
from tests.fixtures.processes import SMALL, Ended, System

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, body text)"
LINES = 6
"""Of an error, at most."""


def said(ended: Ended, code: int, *words: str) -> None:
    """Hold an ended command against what it must have said."""
    assert ended.code == code, ended
    assert "Traceback" not in ended.err
    assert len(ended.err.splitlines()) <= LINES, ended.err
    for word in ("error:", "ops/runbook.md", *words):
        assert word in ended.err, f"{word!r} is not in {ended.err}"


@pytest.mark.parametrize("command", [("setup",), ("capture",), ("shop", "load")])
def test_a_dsn_that_does_not_answer(system: System, command: tuple[str, ...]) -> None:
    nobody = f"postgresql://postgres@127.0.0.1:{ports.choose()}/nobody"
    said(system.ask(*command, environ={"HEADRACE_DSN": nobody}), 5, "HEADRACE_DSN")


def test_a_wrong_password(system: System) -> None:
    role = f"r_{system.settings.source}"
    execute(system.settings, f"CREATE ROLE {role} LOGIN PASSWORD 'right'")
    wrong = system.settings.dsn.replace("//postgres@", f"//{role}:mistaken@")
    try:
        ended = system.ask("setup", environ={"HEADRACE_DSN": wrong})
    finally:
        execute(system.settings, f"DROP ROLE {role}")
    said(ended, 3, "HEADRACE_DSN", "password")
    assert "mistaken" not in ended.err


@pytest.fixture
def replica_level(postgres: Postgres) -> Iterator[None]:
    """Postgres with wal_level=replica, as it comes."""
    with psycopg.connect(postgres.address(), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET wal_level = 'replica'")
    postgres.stop()
    postgres.start()
    yield
    with psycopg.connect(postgres.address(), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM RESET wal_level")
    postgres.stop()
    postgres.start()


def test_no_logical_wal_level(system: System, replica_level: None) -> None:
    del replica_level
    execute(system.settings, ITEMS)
    for command in (("setup", "--apply"), ("capture",)):
        said(system.ask(*command), 3, "wal_level", "logical", "restart")


def test_a_table_without_a_key_is_left_out_with_a_warning_and_what_to_do(system: System) -> None:
    settings = system.settings
    execute(settings, ITEMS, "CREATE TABLE keyless (n int)", "INSERT INTO keyless VALUES (1)")
    ended = system.ask("setup", "--apply")
    assert ended.code == 0, ended
    assert "public.keyless" in ended.out
    assert "PRIMARY KEY" in ended.out + ended.err
    assert rows(settings, "SELECT tablename FROM pg_publication_tables") == [("items",)]
    execute(settings, "UPDATE keyless SET n = 2")  # I1: the application's statements go on
    said(system.ask("setup", "--table", "public.keyless", "--apply"), 3, "public.keyless", "key")


def test_an_unknown_consumer(system: System) -> None:
    said(system.ask("run", "serach"), 3, "serach", "search", "--consumer")
    said(system.ask("run", "--consumer", "nowhere.py:View"), 3, "nowhere.py:View", "--consumer")
    said(system.ask("verify", "serach"), 3, "serach")


def test_an_unknown_setting_and_a_bad_value(system: System, tmp_path: Path) -> None:
    said(system.ask("status", environ={"HEADRACE_KAFAK": "x:1"}), 3, "HEADRACE_KAFAK", "HEADRACE_KAFKA")
    said(system.ask("status", environ={"HEADRACE_CUT_MS": "soon"}), 3, "HEADRACE_CUT_MS", "soon")
    (tmp_path / "headrace.toml").write_text("kafak = 'x:1'\n")
    said(system.ask("status", cwd=tmp_path), 3, "KAFAK", "HEADRACE_KAFKA")
    (tmp_path / "headrace.toml").write_text("kafka = \n")
    said(system.ask("status", cwd=tmp_path), 3, "headrace.toml")


@pytest.mark.usefixtures("redis_server")
def test_a_template_with_an_error(system: System, settings: Settings, tmp_path: Path) -> None:
    """In its syntax: the consumer does not start. When it renders: it stops. The remedy that it prints helps."""
    folder = tmp_path / "templates"
    shutil.copytree(settings.templates, folder)
    broken = System(replace(settings, templates=str(folder)), tmp_path)
    system.run("shop", "load", *SMALL)
    system.run("setup", "--apply")
    system.start("capture", "capture")
    page = folder / "product.html"
    whole = page.read_text()
    broken_syntax, broken_value = "{% if %}" + whole, whole.replace("<h1>", "<h1>{{ product.nothing.at.all }}")
    for text, where in ((broken_syntax, "product.html:1"), (broken_value, "product.html:")):
        page.write_text(text)
        ended = broken.ask("run", "pages")
        assert ended.code in (3, 4), ended
        said(ended, ended.code, where, "template")
    page.write_text(whole)
    try:
        broken.start("pages", "run", "pages")
        broken.waiting("the pages to be served", lambda: bool(broken.control.running("pages")))
        assert "headrace rebuild pages" in ended.err
        broken.run("rebuild", "pages", "--wait")
        broken.verify("pages")
    finally:
        broken.stop_all()


def test_a_row_larger_than_a_message_may_be_stops_capture_and_nothing_is_lost(system: System) -> None:
    execute(system.settings, ITEMS, "INSERT INTO items VALUES (1, 'x')")
    system.run("setup", "--apply")
    execute(system.settings, "INSERT INTO items VALUES (2, repeat('x', 50000))")
    limited = {"HEADRACE_MESSAGE_MAX_BYTES": "20000"}
    said(system.ask("capture", environ=limited), 3, '{"id":2}', "HEADRACE_MESSAGE_MAX_BYTES")
    system.start("capture", "capture")
    system.start("warehouse", "run", "warehouse")
    system.wait("the warehouse to be live", lambda: system.is_live("warehouse"))
    system.settle("warehouse")
    assert system.verify("warehouse")["warehouse"]["rows"] == 2


def test_a_server_that_does_not_answer_is_named_with_its_setting(system: System) -> None:
    execute(system.settings, ITEMS)
    system.run("setup", "--apply")
    said(system.ask("capture", environ={"HEADRACE_KAFKA": f"127.0.0.1:{ports.choose()}"}), 5, "HEADRACE_KAFKA")
    said(system.ask("sql", "SELECT 1"), 5, "headrace run warehouse")
    said(system.ask("rebuild", "search"), 3, "headrace run search")
