"""docs/writing-a-consumer.md does what it says: its code is taken out of the page and run."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

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


def test_every_name_of_the_public_api_is_there() -> None:
    table = PAGE.read_text().partition("## The public API")[2]
    rows = re.findall(r"^\| `(headrace\.\w+)` \| (.*) \|$", table, re.MULTILINE)
    assert len(rows) > 8
    for module, names in rows:
        for name in re.findall(r"`([.\w]+)`", names):
            path, _, attribute = f"{module}{name}".rpartition(".") if name.startswith(".") else (module, "", name)
            assert hasattr(importlib.import_module(path), attribute), f"{module}: {name}"
