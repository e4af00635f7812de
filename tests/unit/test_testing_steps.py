"""What the conformance suite takes for a step, and how a step fails."""

from __future__ import annotations

import gc
import io
import os
import socket
import sqlite3
from datetime import date
from pathlib import Path

import pytest

from headrace.documents import Document
from headrace.documents.local import LocalRows
from headrace.testing import FailBeforeWrite, Steps, dies_before


def test_what_changes_nothing_outside_of_the_process_is_no_step() -> None:
    def echo() -> object:
        yield (yield)

    with Steps() as steps:
        "a".replace("a", "b")
        b"a".replace(b"a", b"b")
        date(2026, 1, 1).replace(year=2027)
        io.StringIO().write("a")
        io.BytesIO().write(b"a")
        running = echo()
        running.send(None)  # type: ignore[attr-defined]  # a generator
    assert steps.count == 0


def test_what_does_is_one(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    db, (ours, other) = sqlite3.connect(":memory:"), socket.socketpair()
    with ours, other, open(tmp_path / "b", "wb") as file, Steps() as steps:  # noqa: PTH123  pathlib's own steps would count
        os.replace(tmp_path / "a", tmp_path / "c")  # noqa: PTH105  as above
        db.execute("SELECT 1")
        ours.send(b"a")
        file.write(b"a")
    assert steps.count == 4
    db.close()


def test_a_write_that_fails_fails_as_its_client_says_it_and_does_not_arrive(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    db, (ours, other) = sqlite3.connect(":memory:", isolation_level=None), socket.socketpair()
    db.execute("CREATE TABLE rows (n INT)")
    with ours, other:
        with pytest.raises(sqlite3.OperationalError, match="disk is full"), FailBeforeWrite(2) as fault:
            _insert(db, 1, 2)
        assert fault.failed
        with FailBeforeWrite(1), pytest.raises(ConnectionResetError):
            ours.send(b"a")
        with FailBeforeWrite(1), pytest.raises(OSError, match="No space left"):
            os.replace(tmp_path / "a", tmp_path / "b")  # noqa: PTH105  the C function itself
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.recv(1)
    assert db.execute("SELECT n FROM rows").fetchall() == [(1,)]
    assert (tmp_path / "a").exists()
    db.close()


class Client:
    """Must be ended where it was made, as librdkafka's: a fork has not its threads. In a cycle, as clients are that call back."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.calls = self.__init__  # type: ignore[misc]  # a bound method

    def __del__(self) -> None:
        if os.getpid() != self.process:
            os._exit(11)


def test_a_process_that_dies_does_not_end_what_its_parent_has_left() -> None:
    gc.collect()
    gc.disable()
    try:
        Client()
        assert not dies_before(0, _collect)
    finally:
        gc.enable()


def test_the_steps_of_local_rows_are_none_of_a_store_that_python_does_not_see(tmp_path: Path) -> None:
    def work() -> None:
        LocalRows(tmp_path / "rows", [Document("public.t")], "abc").close()

    with Steps() as steps:
        work()
    assert steps.count == steps.local > 0
    with pytest.raises(AssertionError, match="no step"):
        dies_before(10_000, work)


def _collect() -> None:
    gc.collect()


def _insert(db: sqlite3.Connection, *numbers: int) -> None:
    for number in numbers:
        db.execute("INSERT INTO rows VALUES (?)", (number,))
