"""`headrace resnapshot`: --key K asks Postgres with the text that was given; options that contradict each other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from headrace.change import Column, TableSchema
from headrace.errors import USAGE, Misconfigured
from headrace_capture.resnapshot_cli import _key, resnapshot


def asked(text: str, *names: str) -> dict[str, str]:
    """Return what is asked for of a table with this key."""
    shape = TableSchema("public.t", 1, tuple(Column(name, "text", False) for name in names), names)
    log: Any = SimpleNamespace(schemas=lambda: {("public.t", 1): shape})
    return _key(log, ["public.t"], text)


@pytest.mark.parametrize(
    "text",
    ["5", "1.10", "1e3", "12e45", "1E400", "123456789012345678901234", "007", "-0", "true", "NaN", "{1,2}", "a b"],
)
def test_a_bare_key_is_taken_as_it_was_written(text: str) -> None:
    """A number of JSON would be another text: 1.10 is the version before 1.11, and not 1.1."""
    assert asked(text, "id") == {"id": text}
    assert asked(f'"{text}"', "id") == {"id": text}, "in quotes too"


def test_so_are_the_columns_of_an_object() -> None:
    given = '{"id": 123456789012345678901234, "at": 1.10, "doc": {"n": 1.5, "m": [2]}, "on": true, "ä": "ö"}'
    assert asked(given, "id", "at", "doc", "on", "ä") == {
        "id": "123456789012345678901234",
        "at": "1.10",
        "doc": '{"n": 1.5, "m": [2]}',
        "on": "true",
        "ä": "ö",
    }
    with pytest.raises(Misconfigured, match=r"The key of public.t is \(id, at\)"):
        asked("5", "id", "at")


@pytest.mark.parametrize(
    "options", [["--pause", "--status"], ["--recover", "--cancel"], ["t", "--recover"], ["--recover", "--all"]]
)
def test_what_contradicts_itself_is_refused_before_anything_is_done(options: list[str]) -> None:
    """With --recover it would be a new epoch, though one table was named."""
    app = typer.Typer()
    app.command()(resnapshot)
    ended = CliRunner().invoke(app, options)
    assert ended.exit_code == USAGE, ended.output
