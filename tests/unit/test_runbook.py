"""Every code that an error can carry has an entry in the runbook, and the runbook has no entry for what cannot happen."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.cli import building
from headrace.errors import Misconfigured

ROOT = Path(__file__).parents[2]
ERRORS = {"Transient", "Misconfigured", "Poison", "Refused", "Wiped", "HeadraceError"}


def _sources() -> list[Path]:
    return [
        path for room in ("headrace", "services", "consumers", "ops", "bench") for path in (ROOT / room).rglob("*.py")
    ]


def _raised() -> dict[str, str]:
    """Return every literal code with the file that raises it, also through a helper that takes the code as its argument."""
    found: dict[str, str] = {}
    for path in _sources():
        tree = ast.parse(path.read_text())
        makers = ERRORS | {
            function.name
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            and any(isinstance(code, ast.Name) for code in _codes(function, ERRORS))
        }
        literal = [code.value for code in _codes(tree, makers) if isinstance(code, ast.Constant)]
        found |= dict.fromkeys(map(str, literal), str(path.relative_to(ROOT)))
    return found


def _codes(tree: ast.AST, makers: set[str]) -> Iterator[ast.expr]:
    """Yield the first argument of every call of `makers`; of a choice between two, both."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and _name(node.func) in makers:
            first = node.args[0]
            yield from (first.body, first.orelse) if isinstance(first, ast.IfExp) else (first,)


def _name(called: ast.expr) -> str:
    return called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""


def _entries() -> list[str]:
    lines = (ROOT / "ops/runbook.md").read_text().splitlines()
    return [code.strip(" `") for line in lines if line.startswith("## ") for code in line[3:].split(",")]


def test_every_code_has_an_entry() -> None:
    entries = _entries()
    assert {code: path for code, path in _raised().items() if code not in entries} == {}


def test_no_entry_comes_twice() -> None:
    entries = _entries()
    assert sorted({code for code in entries if entries.count(code) > 1}) == []


def test_every_entry_is_of_a_code_that_the_sources_name() -> None:
    text = "".join(path.read_text() for path in _sources())
    assert [code for code in _entries() if f'"{code}"' not in text and not _put_together(code, text)] == []


def _put_together(code: str, text: str) -> bool:
    """Whether a code is made of a fixed beginning and a word, e.g. `view-{said}`."""
    return f'f"{code.partition("-")[0]}-{{' in text


def test_every_entry_says_something() -> None:
    entries = re.split(r"^## ", (ROOT / "ops/runbook.md").read_text(), flags=re.MULTILINE)[1:]
    assert [entry.splitlines()[0] for entry in entries if len(entry.split("\n", 1)[1].split()) < 8] == []


def test_no_remedy_captures_every_table() -> None:
    """Without --table setup captures all with a key: where somebody chose a few, the others went into Kafka and every warehouse."""
    command = re.compile(r"headrace setup[^`;.\n]*?--(?:apply|append-only)")
    texts = [*_sources(), ROOT / "ops/runbook.md"]
    found = {ran[0] for path in texts for ran in command.finditer(_without_docstrings(path))}
    assert {ran for ran in found if not re.search(r"--table|\{flags\}|…", ran)} == set()


def test_what_is_verified_before_it_is_promoted_is_the_build() -> None:
    """Without a number `verify` compares the live view, and `promote` takes the newest: unseen."""
    told = r"headrace verify\b(?:(?!\. |\n\n).)*?headrace promote\b[^`]*"
    texts = [ROOT / "ops/runbook.md", ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = [found for path in texts for found in re.findall(told, path.read_text(), re.DOTALL)]
    assert found
    assert [each for each in found if each.count("--generation N") < 2] == []


@pytest.mark.parametrize(("names", "which"), [(["search"], " --generation N"), (["search", "pages"], "")])
def test_where_the_gate_is_not_installed_the_build_itself_is_named(
    monkeypatch: pytest.MonkeyPatch, names: list[str], which: str
) -> None:
    monkeypatch.setattr(building, "entry_points", lambda **_: [])
    with pytest.raises(Misconfigured) as caught:
        building.here(names, building.Gate.VERIFY, [])
    assert caught.value.code == "no-verify"
    told = [f"headrace verify {name} --generation N" for name in names]
    assert f"{'; '.join(told)}; then: headrace promote {' '.join(names)}{which}. Or" in caught.value.remedy


def _without_docstrings(path: Path) -> str:
    text = path.read_text()
    return re.sub(r'""".*?"""', "", text, flags=re.DOTALL) if path.suffix == ".py" else text
