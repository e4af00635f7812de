"""docs/writing-a-consumer.md does what it says: its code is taken out of the page and run."""

from __future__ import annotations

import importlib
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from headrace import documents, testing
from headrace.cli import scaffold
from headrace.errors import Poison
from headrace.settings import Settings
from headrace_ops.elasticsearch import Elasticsearch
from tests.conformance.test_new_consumer import CONFTEST
from tests.fixtures.heard import Heard, plugin
from tests.fixtures.pytests import run_pytest

PAGE = Path(__file__).parents[2] / "docs/writing-a-consumer.md"
SALES = """
from headrace.testing import ConsumerConformance, shape
from sales import SalesByTheMinute

ORDERS = shape("public.orders", id="integer", created_at="timestamp with time zone", state="text", total="numeric")


class TestSales(ConsumerConformance):
    consumer = SalesByTheMinute
    name = "sales"
    stride = 5
    history = {
        ORDERS: [
            {"id": 1, "created_at": "2026-01-01T10:07:30+00:00", "state": "paid", "total": "9.90"},
            {"id": 2, "created_at": "2026-01-01T10:07:59.5+00:00", "state": "paid", "total": "0.10"},
            {"id": 1, "created_at": "2026-01-01T10:08:00+00:00", "state": "paid", "total": "9.90"},
        ]
    }
"""


def written(folder: Path) -> None:
    """Write the files of the page."""
    for name, code in re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        (folder / name).write_text(code)


def run(address: str, folder: Path, test: str, *options: str) -> None:
    """Run a test beside the code of the page."""
    (folder / "conftest.py").write_text(CONFTEST)
    done = run_pytest(folder, test, *options, HEADRACE_ELASTICSEARCH=address)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\d+ passed", done.stdout)


def test_the_code_of_the_page_runs_and_its_test_passes(elasticsearch: Elasticsearch, tmp_path: Path) -> None:
    written(tmp_path)
    # The drops of a live generation are long, and test_builtin has them for this store.
    run(
        elasticsearch.address(), tmp_path, "test_cards.py", "-k", "(promotion or drop) and not dropped_while_it_is_live"
    )
    # Of what is left test_steps takes each step of an apply, and test_builtin every eleventh of a load and of the writes that fail.
    test = tmp_path / "test_cards.py"
    test.write_text(test.read_text().replace('    name = "cards"\n', '    name = "cards"\n    stride = 5\n'))
    assert "stride" in test.read_text()
    run(elasticsearch.address(), tmp_path, "test_cards.py", "-k", "not (promotion or drop)")


def test_the_windows_of_the_page_pass_where_rows_move(elasticsearch: Elasticsearch, tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "test_sales.py").write_text(SALES)
    run(
        elasticsearch.address(),
        tmp_path,
        "test_sales.py",
        "-k",
        "can_tell or twice or deletes or steps_of_apply or replay",
    )


def test_what_is_no_file_of_its_own_on_the_page_runs_too(
    heard: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joins, told, poison = map(textwrap.dedent, re.findall(r"```python\n( *[^# ].*?)```", PAGE.read_text(), re.DOTALL))
    run: dict[str, Any] = (
        vars(documents) | vars(testing) | {"Settings": Settings, "Webhook": plugin("webhook"), "Poison": Poison}
    )
    declared = eval(joins, run)  # noqa: S307  the page's
    assert [table.partition(".")[2] for table in declared.tables] == [
        *("products", "categories", "product_tags", "tags", "reviews", "comments")
    ]
    exec(told, run)  # noqa: S102
    assert [body for *_, body in heard] == [b'{"key":{"id":1},"row":{"id":1,"status":"paid"}}']
    (change,) = run["batch"].changes
    with pytest.raises(Poison) as raised:
        exec(poison, run | {"change": change})  # noqa: S102
    assert raised.value.cursor == ("public.orders", '{"id":1}')
    written(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    calm = importlib.import_module("calm_sales").CalmSales
    assert (calm.debounce_seconds, calm.tables) == (5, ("public.orders",))


def test_the_public_api_is_what_its_modules_say_and_all_that_strangers_are_told_to_import() -> None:
    table = PAGE.read_text().partition("## The public API")[2]
    rows = re.findall(r"^\| `(headrace[.\w]+)` \| (.*) \|$", table, re.MULTILINE)
    assert len(rows) > 8
    told = {
        f"{module}{name}" if name[0] == "." else f"{module}.{name}"
        for module, names in rows
        for name in re.findall(r"`([.\w]+)`", names)
    }
    for module, _ in rows:
        named = importlib.import_module(module).__all__
        assert {f"{module}.{name}" for name in named} == {name for name in told if name.rpartition(".")[0] == module}
    for module, _, name in (full.rpartition(".") for full in told):
        found = importlib.import_module(module)
        assert name in found.__all__, f"{module}: {name}"
        assert hasattr(found, name), f"{module}: {name}"
    texts = [PAGE.read_text(), *(path.read_text() for path in Path(scaffold.__file__).with_name("scaffolds").iterdir())]
    imported = {
        f"{module}.{name}"
        for text in texts
        for module, names in re.findall(r"^from (headrace[\w.]*\.\w+) import ([\w, ]+)$", text, re.MULTILINE)
        for name in names.split(", ")
    }
    assert imported - told == set(), "what strangers are told to import"
