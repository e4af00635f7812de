"""What `headrace new consumer` writes runs, and passes the test that is written with it, for every store."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cli.scaffold import Store
from headrace_ops import Stack
from tests.fixtures.pytests import run_pytest

CONFTEST = """
from headrace.documents import local
from headrace.stores.redis import pages

local.LOCKED_SECONDS, pages._GRACE_SECONDS = 0.2, 0.05
"""
"""As the fixture `impatient` in conftest.py."""


@pytest.mark.parametrize("store", list(Store))
def test_a_new_consumer_passes_its_own_test(store: Store, stack: Stack, tmp_path: Path) -> None:
    wanted = {Store.elasticsearch: "elasticsearch", Store.redis: "redis", Store.kafka: "kafka"}.get(store)
    if wanted:
        stack.server(wanted).start()
    made = [sys.executable, "-m", "headrace", "new", "consumer", "a_view", "--store", store, "--dir", str(tmp_path)]
    subprocess.run(made, check=True)
    root = tmp_path / "headrace-a_view"
    (root / "conftest.py").write_text(CONFTEST)
    # The stores that come with headrace pass all of it in test_builtin.
    fast = "tell or twice or position or column_more"
    if store is not Store.kafka:  # each writer of a stream takes its time to begin
        fast += " or any_more or pointed or shows_nothing"
    some = [] if store is Store.custom else ["-k", fast]
    servers = {f"HEADRACE_{wanted.upper()}": stack.server(wanted).address()} if wanted else {}
    done = run_pytest(root, *some, "tests", HEADRACE_STATE=str(tmp_path / "state"), **servers)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


def test_what_it_writes_type_checks(tmp_path: Path) -> None:
    for store in Store:
        made = [sys.executable, "-m", "headrace", "new", "consumer", f"v_{store}", "--store", store, "--dir"]
        subprocess.run([*made, str(tmp_path)], check=True)
    code = [str(found) for where in ("*/headrace_*", "*/tests/*.py") for found in tmp_path.glob(where)]
    environ = os.environ | {"MYPYPATH": ":".join(map(str, tmp_path.iterdir()))}
    command = [sys.executable, "-m", "mypy", "--strict", *code]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert (len(code), done.returncode) == (2 * len(Store), 0), done.stdout
