"""A fingerprint changes with whatever builds the view, and with nothing else."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.fingerprint import files_print, fingerprint

FILES = {
    "__init__.py": """
from .parts import Base


class View(Base):
    def render(self):
        from fp_views import late
        return late.text()
""",
    "parts/__init__.py": "from fp_views.parts.deep import shape\n\n\nclass Base:\n    made = shape\n",
    "parts/deep.py": "import json\n\nshape = 1\n",
    "late.py": "def text():\n    return 'a'\n",
    "cli.py": "print('not imported by the view')\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        file = tmp_path / "fp_views" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "fp_views"
    for name in [name for name in sys.modules if name.partition(".")[0] == "fp_views"]:
        del sys.modules[name]


def view() -> type[Any]:
    return importlib.import_module("fp_views").View  # type: ignore[no-any-return]


@pytest.mark.parametrize("changed", ["__init__.py", "parts/__init__.py", "parts/deep.py", "late.py"])
def test_it_covers_the_class_and_what_it_imports_of_its_own_package(package: Path, changed: str) -> None:
    before = fingerprint(view())
    assert fingerprint(view()) == before
    (package / changed).write_text(FILES[changed] + "# another\n")
    assert fingerprint(view()) != before


def test_files_that_it_names_have_a_print_of_their_own(package: Path) -> None:
    """Python has read the modules, and does not read them again."""
    words = package / "words.txt"
    words.write_text("one")
    view().fingerprint_files = staticmethod(lambda: [words])
    before = fingerprint(view()), files_print(view())
    (package / "late.py").write_text(FILES["late.py"] + "# another\n")
    between = fingerprint(view()), files_print(view())
    words.write_text("two")
    after = fingerprint(view()), files_print(view())
    assert len({before[0], between[0], after[0]}) == 3
    assert before[1] == between[1] != after[1]


def test_another_class_of_the_same_file_is_other_code(package: Path) -> None:
    (package / "__init__.py").write_text(FILES["__init__.py"] + "\n\nclass Other(Base):\n    pass\n")
    assert fingerprint(view()) != fingerprint(sys.modules["fp_views"].Other)


def test_what_the_view_does_not_import_makes_nothing_stale(package: Path) -> None:
    before = fingerprint(view())
    (package / "cli.py").write_text("print('changed')\n")
    assert fingerprint(view()) == before
    assert "fp_views.late" not in sys.modules, "nothing is imported to find out"
