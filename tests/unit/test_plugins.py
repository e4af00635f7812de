"""Consumers of files: each is its own file's, whatever the others are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace import plugins
from headrace.errors import Misconfigured, as_ours
from headrace.fingerprint import fingerprint
from headrace.settings import Settings

CODE = """
from headrace.effects import EffectConsumer


class {name}(EffectConsumer):
    tables = ("public.orders",)
"""


BAD = """
from headrace.documents import Document, DocumentConsumer
from headrace.stores.redis import RedisPages


class View(DocumentConsumer):
    {declared}
    store = RedisPages()
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


@pytest.mark.parametrize(
    ("declared", "seen"),
    [
        ('documnet = Document("public.orders")', "no table"),
        ('document = Document("orders")', "'orders'"),
        ("store = RedisPages()", "no table"),
    ],
)
def test_a_view_of_no_table_is_refused(tmp_path: Path, declared: str, seen: str) -> None:
    (tmp_path / "view.py").write_text(BAD.format(declared=declared))
    with pytest.raises(Misconfigured, match=seen) as caught:
        plugins.load_file(f"{tmp_path}/view.py:View")
    assert caught.value.code == "broken-consumer"


@pytest.mark.parametrize(
    ("tables", "seen"),
    [('("public.orders")', "comma"), ('("orders",)', "'orders'"), ('["public."]', "'public.'"), ("()", "no table")],
)
def test_tables_that_can_be_none_are_refused(tmp_path: Path, tables: str, seen: str) -> None:
    spec = write(tmp_path / "view.py", more=f"    tables = {tables}\n")
    with pytest.raises(Misconfigured, match=seen) as caught:
        plugins.load_file(spec)
    assert caught.value.code == "broken-consumer"


@pytest.mark.parametrize("tables", ['("*",)', '("public.orders", "sales.a.b")'])
def test_tables_that_there_may_be_are_not(tmp_path: Path, tables: str) -> None:
    plugins.load_file(write(tmp_path / "view.py", more=f"    tables = {tables}\n"))


def test_a_file_that_cannot_be_imported_is_told_with_its_line(tmp_path: Path) -> None:
    spec = write(tmp_path / "view.py", more="\n\nCards.nothing\n")
    with pytest.raises(Misconfigured, match=r"view\.py:9\b"):
        plugins.load_file(spec)
    (tmp_path / "view.py").write_text("\n\nclass:\n")
    with pytest.raises(Misconfigured, match=r"view\.py:3\b"):
        plugins.load_file(spec)


def test_what_a_consumer_raises_is_told_with_its_line(tmp_path: Path) -> None:
    more = "\n    def effect(self, changes):\n        return changes[-1]\n"
    _, cls = plugins.load_file(write(tmp_path / "view.py", more=more))
    with pytest.raises(IndexError) as caught:
        cls(Settings(), "cards").effect([])  # type: ignore[attr-defined]
    error = as_ours(caught.value, "cards")
    assert error.code == "consumer-failed"
    assert "view.py:9" in error.message
