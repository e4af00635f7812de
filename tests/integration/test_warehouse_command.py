"""`headrace sql`: what it prints, and what it says where there is no answer."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import pytest
from typer.testing import CliRunner

from headrace.cli import app
from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace_warehouse import Warehouse, endpoint
from headrace_warehouse.cli import sql
from tests.fixtures.endpoints import address, fill
from tests.integration.test_warehouse_sql import store

__all__ = ["store"]


@pytest.fixture
def at_warehouse(store: Warehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    store.promote()
    monkeypatch.setenv("HEADRACE_WAREHOUSE_LISTEN", address())


@pytest.fixture
def command() -> Any:
    app.command("sql")(sql)
    yield lambda *words: CliRunner().invoke(app, ["sql", *words])
    app.registered_commands.pop()


@pytest.mark.usefixtures("at_warehouse")
def test_the_command_prints_a_table_json_or_csv(command: Any) -> None:
    query = "SELECT id, price, NULL AS nothing, '[red]' AS markup FROM items WHERE id < 2 ORDER BY id"
    shown = command(query)
    assert shown.exit_code == 0
    assert "1.50" in shown.output
    assert "[red]" in shown.output
    assert "2 rows at LSN 0/A" in shown.output
    assert json.loads(command("--json", query).output)["rows"] == [
        [0, "1.50", None, "[red]"],
        [1, "1.50", None, "[red]"],
    ]
    assert command("--csv", query).output.splitlines() == ["id,price,nothing,markup", "0,1.50,,[red]", "1,1.50,,[red]"]


@pytest.mark.usefixtures("at_warehouse")
def test_a_csv_that_lacks_rows_says_so_and_fails(command: Any) -> None:
    whole, cut = (command("--csv", f"FROM range({rows})") for rows in (endpoint.ROWS, endpoint.ROWS + 1))
    assert (whole.exit_code, whole.stderr) == (0, "")
    assert cut.stdout == whole.stdout
    assert cut.exit_code == 1
    assert "more rows than these 10000" in cut.stderr
    assert "more rows than these" in command(f"FROM range({endpoint.ROWS + 1})").output


@pytest.mark.usefixtures("at_warehouse")
def test_the_command_says_why_a_query_failed(command: Any) -> None:
    failed = command("SELECT nothing FROM items")
    assert isinstance(failed.exception, HeadraceError)
    assert failed.exception.exit_code == 3, "somebody must change the query"
    assert "nothing" in failed.exception.message


def test_without_a_warehouse_the_command_names_the_next_one(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_WAREHOUSE_LISTEN", "127.0.0.1:1")
    failed = command("SELECT 1")
    assert isinstance(failed.exception, Transient), "it may be there later"
    assert failed.exception.exit_code == 5
    assert "headrace run warehouse" in failed.exception.remedy


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{", Transient),
        (b"HTTP/1.1 400 Bad\r\nContent-Length: 1000\r\n\r\n{", Transient),
        (b"220 mail.example ESMTP\r\n", Misconfigured),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", Misconfigured),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", Misconfigured),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", Misconfigured),
        (b"", Transient),
    ],
)
def test_what_is_no_warehouse_or_ends_while_it_answers_is_told_as_such(
    command: Any, monkeypatch: pytest.MonkeyPatch, answer: bytes, kind: type[HeadraceError]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with server.accept()[0] as asked:
                asked.recv(65536)
                asked.sendall(answer)
                asked.shutdown(socket.SHUT_WR)
                while asked.recv(65536):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        monkeypatch.setenv("HEADRACE_WAREHOUSE_LISTEN", f"127.0.0.1:{server.getsockname()[1]}")
        failed = command("--json", "SELECT 1")
        thread.join()
    assert type(failed.exception) is kind, failed.exception
    assert failed.exception.code == "warehouse-not-running"
    assert "HEADRACE_WAREHOUSE_LISTEN" in failed.exception.remedy


@pytest.mark.parametrize(
    "listen",
    [
        "localhost:abc",
        "[::1:8790",
        "nowhere at all:1",
        "",
        "nonsense",
        ":1",
        "127.0.0.1",
        "[::1]",
        *(f"127.0.0.1:{n}" for n in (-1, 0, 65536)),
    ],
)
def test_an_address_that_is_none_names_the_setting(command: Any, monkeypatch: pytest.MonkeyPatch, listen: str) -> None:
    monkeypatch.setenv("HEADRACE_WAREHOUSE_LISTEN", listen)
    failed = command("SELECT 1")
    assert isinstance(failed.exception, Misconfigured), failed.exception
    assert failed.exception.code == "warehouse-not-running"
    assert "HEADRACE_WAREHOUSE_LISTEN" in failed.exception.remedy
