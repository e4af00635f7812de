"""docs/writing-a-consumer.md does what it says: its code is taken out of the page and run."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

from headrace_ops.elasticsearch import Elasticsearch

PAGE = Path(__file__).parents[2] / "docs/writing-a-consumer.md"


def test_the_code_of_the_page_runs_and_its_test_passes(elasticsearch: Elasticsearch, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == ["cards.py", "test_cards.py"]
    for name, code in blocks:
        (tmp_path / name).write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:pytest_timeout", "test_cards.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HEADRACE_ELASTICSEARCH": elasticsearch.address()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\d+ passed", done.stdout)


def test_every_name_of_the_public_api_is_there() -> None:
    table = PAGE.read_text().partition("## The public API")[2]
    rows = re.findall(r"^\| `(headrace\.\w+)` \| (.*) \|$", table, re.MULTILINE)
    assert len(rows) > 8
    for module, names in rows:
        for name in re.findall(r"`([.\w]+)`", names):
            path, _, attribute = f"{module}{name}".rpartition(".") if name.startswith(".") else (module, "", name)
            assert hasattr(importlib.import_module(path), attribute), f"{module}: {name}"
