"""Every command says how it is used: an example of itself, and each exit code by which it may end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from headrace import cli, errors

ROOT = Path(__file__).parents[2]


def commands(group: Any, *words: str) -> Iterator[tuple[str, Any]]:
    """Yield each command of a group and of the groups in it, by the words that call it."""
    for name, command in vars(group)["commands"].items():
        if "commands" in vars(command):
            yield from commands(command, *words, name)
        else:
            yield " ".join((*words, name)), command


cli.add_commands(None)
ALL = dict(commands(get_command(cli.app)))


def exit_codes(said: str) -> list[int]:
    """Return the codes of "Exit codes: 0 done; 3 something must be changed." in a help text."""
    told = re.search(r"Exit codes: (.*?)(\n\n|$)", said, re.DOTALL)
    return [int(code) for code in re.findall(r"(?:^|; |;\n)(\d+) ", told[1])] if told else []


@pytest.mark.parametrize("words", ALL)
def test_a_command_has_an_example_and_its_exit_codes(words: str) -> None:
    said = ALL[words].help
    assert re.search(rf"Examples?:\s[^#]*\bheadrace {words}\b", said), said
    assert exit_codes(said)[:1] == [0], said
    assert exit_codes(said) == sorted(set(exit_codes(said)) & set(table())), said


def test_it_says_which_version_it_is() -> None:
    told = CliRunner().invoke(cli.app, ["--version"])
    assert (told.exit_code, told.stdout) == (0, f"headrace {version('headrace')}\n")


@pytest.mark.parametrize(("first", "loads"), [("--version", False), ("status", False), ("--help", True), ("--", True)])
def test_no_service_is_loaded_for_an_option_that_needs_none(
    first: str, loads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(cli, "entry_points", lambda group: asked.append(group) or [])
    cli.add_commands(first)
    assert bool(asked) is loads


def test_only_what_takes_several_names_prints_a_list_of_them() -> None:
    options = {words: {option.name: option for option in command.params} for words, command in ALL.items()}
    lists = {words for words, named in options.items() if "a list" in (getattr(named.get("json"), "help", "") or "")}
    assert lists == {words for words in ("rebuild", "promote") if options[words]["names"].nargs == -1}


def test_the_commands_of_every_service_are_there() -> None:
    expected = (
        "run plugins settings status rebuild promote rollback drop pause resume wait replay why "
        "setup teardown capture resnapshot verify sql demo"
    )
    parked = [f"parked {name}" for name in ("list", "show", "retry", "drop")]
    groups = ["new consumer", *parked, *(f"stack {name}" for name in ("up", "down", "status", "logs", "env"))]
    shop = [f"shop {name}" for name in ("load", "work", "serve", "replay")]
    assert {*expected.split(), *groups, *shop} <= set(ALL)


def test_the_table_of_exit_codes_is_that_of_the_errors() -> None:
    kinds = (errors.Transient, errors.Misconfigured, errors.Poison)
    codes = {
        errors.OK,
        errors.CHECK_FAILED,
        errors.USAGE,
        errors.DEFECT,
        errors.INTERRUPTED,
        *(kind.exit_code for kind in kinds),
    }
    assert set(table()) == codes


def table() -> list[int]:
    """Return the codes of the table in docs/operating.md."""
    page = (ROOT / "docs/operating.md").read_text()
    return [int(code) for code in re.findall(r"^\| (\d+) \|", page.partition("## Exit codes")[2], re.MULTILINE)]


def test_a_defect_does_not_end_as_a_check_that_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise RuntimeError("nobody foresaw this")

    monkeypatch.setattr(cli, "app", broken)
    monkeypatch.setattr(cli, "add_commands", lambda _: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == errors.DEFECT != errors.CHECK_FAILED
    assert "nobody foresaw this" in capsys.readouterr().err
