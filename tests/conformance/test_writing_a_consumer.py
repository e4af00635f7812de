"""docs/writing-a-consumer.md does what it says: its code is taken out of the page and run."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

from headrace.cli import scaffold
from headrace_ops.elasticsearch import Elasticsearch
from tests.conformance.test_new_consumer import CONFTEST

PAGE = Path(__file__).parents[2] / "docs/writing-a-consumer.md"
SALES = """
from headrace.testing import ConsumerConformance, shape
from sales import SalesByTheMinute

ORDERS = shape("public.orders", id="integer", created_at="timestamp with time zone", state="text", total="numeric")


class TestSales(ConsumerConformance):
    consumer = SalesByTheMinute
    name = "sales"
    history = {
        ORDERS: [
            {"id": 1, "created_at": "2026-01-01T10:07:30+00:00", "state": "paid", "total": "9.90"},
            {"id": 2, "created_at": "2026-01-01T10:07:59.5+00:00", "state": "paid", "total": "0.10"},
            {"id": 1, "created_at": "2026-01-01T10:08:00+00:00", "state": "paid", "total": "9.90"},
        ]
    }
"""


def run(address: str, folder: Path, test: str, *options: str) -> None:
    """Run a test beside the code of the page."""
    for name, code in re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        (folder / name).write_text(code)
    (folder / "conftest.py").write_text(CONFTEST)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:pytest_timeout",
        test,
        *options,
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "HEADRACE_ELASTICSEARCH": address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\d+ passed", done.stdout)


def test_the_code_of_the_page_runs_and_its_test_passes(elasticsearch: Elasticsearch, tmp_path: Path) -> None:
    # The drops of a live generation are long, and test_builtin has them for this store.
    run(elasticsearch.address(), tmp_path, "test_cards.py", "-k", "not dropped_while_it_is_live")


def test_the_windows_of_the_page_pass_where_rows_move(elasticsearch: Elasticsearch, tmp_path: Path) -> None:
    (tmp_path / "test_sales.py").write_text(SALES)
    run(
        elasticsearch.address(),
        tmp_path,
        "test_sales.py",
        "-k",
        "can_tell or twice or deletes or steps_of_apply or replay",
    )


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
