"""`headrace new consumer` refuses a name that would not do, and says what to run for one that does."""

from __future__ import annotations

import importlib
import shlex
import sys
from pathlib import Path

import pytest

from headrace import plugins
from headrace.cli import scaffold
from headrace.cli.scaffold import Store
from headrace.consumer import Generation
from headrace.errors import Misconfigured
from headrace.settings import Settings
from headrace.testing import History, shape
from headrace_warehouse import endpoint
from headrace_warehouse.cli import ask

TABLE = "public.products"


@pytest.mark.parametrize("store", list(Store))
@pytest.mark.parametrize("name", ["a_view", "t1", "class", "rows", "import", "python"])
def test_what_is_written_can_be_imported(
    name: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaffold.consumer(name, store, TABLE, tmp_path)
    root = tmp_path / f"headrace-{name}"
    for path in (root, root / "tests"):
        monkeypatch.syspath_prepend(path)
    modules = f"headrace_{name}", f"test_{name}"
    try:
        made, test = map(importlib.import_module, modules)
        assert vars(test)[f"Test{_class(name)}"].consumer is vars(made)[_class(name)]
    finally:
        for module in modules:
            sys.modules.pop(module, None)


def _class(name: str) -> str:
    return "".join(part.title() for part in name.split("_"))


@pytest.mark.parametrize(
    "name", ["none", "true", "false", "titles_", "_titles", "Titles", "1st", "", "a-b", "consumer_conformance"]
)
def test_a_name_that_makes_no_package_or_class_is_refused(name: str, tmp_path: Path) -> None:
    for store in Store:
        _refused(name, store, tmp_path)


@pytest.mark.parametrize(
    ("name", "store"),
    [
        *((name, Store.custom) for name in ("generation", "version", "position", "batch", "collection", "settings")),
        *((name, Store.redis) for name in ("document", "document_consumer", "node", "redis_pages")),
        ("elasticsearch_index", Store.elasticsearch),
        ("kafka_topic", Store.kafka),
        ("duck_d_b_store", Store.duckdb),
    ],
)
def test_a_name_whose_class_would_hide_what_it_needs_is_refused(name: str, store: Store, tmp_path: Path) -> None:
    _refused(name, store, tmp_path)


@pytest.mark.parametrize(
    "name", ["capture", "verify", "shop", "ops", "search", "pages", "warehouse", "setup", "demo", "sql"]
)
def test_a_name_that_is_installed_is_refused(name: str, tmp_path: Path) -> None:
    _refused(name, Store.custom, tmp_path)


@pytest.mark.parametrize("table", ["products", "public.", 'public."odd"', "public.a\\b", "public.$x\n"])
def test_a_table_that_could_not_be_found_or_written_is_refused(table: str, tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="schema") as refused:
        scaffold.consumer("titles", Store.redis, table, tmp_path)
    assert (refused.value.code, list(tmp_path.iterdir())) == ("bad-name", [])


def test_a_duckdb_view_can_be_asked_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaffold.consumer("asked", Store.duckdb, TABLE, tmp_path)
    assert '"headrace-warehouse"' in (tmp_path / "headrace-asked" / "pyproject.toml").read_text()
    cls = plugins.load_file(f"{tmp_path}/headrace-asked/headrace_asked/__init__.py:Asked")[1]
    log = History([shape(TABLE, id="integer", name="text")])
    log.put(TABLE, {"id": 1, "name": "kettle"})
    log.cut()
    monkeypatch.setenv("ASKED_LISTEN", "127.0.0.1:0")
    view = cls(Settings(state=str(tmp_path)), "asked")
    try:
        for batch in log.batches(view.open(Generation("asked", 1, "abc"))):
            view.apply(batch)
        view.promote()
        (only,) = endpoint._serving.values()
        assert ask(f"127.0.0.1:{only.port}", "SELECT name FROM products")["rows"] == [["kettle"]]
    finally:
        view.close()
        endpoint.stop()


def _refused(name: str, store: Store, folder: Path) -> None:
    with pytest.raises(Misconfigured) as refused:
        scaffold.consumer(name, store, TABLE, folder)
    assert refused.value.code == "bad-name"
    assert not list(folder.iterdir())


def test_what_to_run_next_is_one_line_that_a_shell_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "[red]it's in a folder with a name that is longer than one line of a terminal of eighty columns"
    scaffold.consumer("titles", Store.redis, TABLE, folder)
    (said,) = capsys.readouterr().out.splitlines()
    words = shlex.split(said.partition("next: ")[2])
    assert words == ["pip", "install", "-e", str(folder / "headrace-titles"), "&&", "headrace", "run", "titles"]
