"""Consumers of files: each is its own file's, whatever the others are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace import plugins
from headrace.errors import Misconfigured
from headrace.fingerprint import fingerprint

CODE = """
from headrace.effects import EffectConsumer


class {name}(EffectConsumer):
    tables = ("public.orders",)
"""


def write(file: Path, name: str = "Cards", more: str = "") -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(CODE.format(name=name) + more)
    return f"{file}:{name}"


def test_a_file_is_fingerprinted_itself_though_another_has_its_name(tmp_path: Path) -> None:
    cards = write(tmp_path / "cards/consumer.py")
    pages = write(tmp_path / "pages/consumer.py", "Pages")
    prints = []
    for more in ("", "# other code\n"):
        write(tmp_path / "cards/consumer.py", more=more)
        loaded = plugins.load_files([cards, pages])
        prints.append({name: fingerprint(cls) for name, cls in loaded.items()})
    assert prints[0]["pages"] == prints[1]["pages"]
    assert prints[0]["cards"] != prints[1]["cards"]


def test_a_file_that_is_moved_is_the_same_code(tmp_path: Path) -> None:
    first, second = (plugins.load_file(write(tmp_path / folder / "consumer.py"))[1] for folder in ("a", "b"))
    assert fingerprint(first) == fingerprint(second)


def test_two_files_whose_consumers_have_one_name_are_refused(tmp_path: Path) -> None:
    specs = [write(tmp_path / folder / "consumer.py") for folder in ("a", "b")]
    with pytest.raises(Misconfigured, match="cards") as caught:
        plugins.load_files(specs)
    assert caught.value.code == "consumer-twice"
    with pytest.raises(Misconfigured, match="cards"):
        plugins.load_files(specs[:1], ["cards"])
