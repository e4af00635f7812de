"""*Your own database*, on a schema that is not the shop's, and a consumer that is not of this repository: as a file, as a package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import elasticsearch
import orjson
import pytest

from tests.fixtures.capture import execute, rows
from tests.fixtures.processes import System

LIBRARY = [
    "CREATE SCHEMA library",
    "CREATE TABLE library.authors (code text PRIMARY KEY, name text NOT NULL)",
    "CREATE TABLE library.books (isbn text PRIMARY KEY, author text, title text NOT NULL, tags text[], added date)",
    "CREATE TABLE library.loans (book text, nr int, days interval, PRIMARY KEY (book, nr))",
    "CREATE TABLE library.private (id int PRIMARY KEY, secret text)",
    "INSERT INTO library.authors VALUES ('lem', 'Stanisław Lem'), ('ukl', 'Ursula K. Le Guin')",
    """INSERT INTO library.books SELECT i::text, (ARRAY['lem', 'ukl', NULL])[1 + i % 3], 'Volume ' || i,
       ARRAY['a', NULL], '2020-02-29' FROM generate_series(1, 40) i""",
    "INSERT INTO library.loans SELECT (1 + i % 40)::text, i, '2 days' FROM generate_series(1, 100) i",
    "INSERT INTO library.private VALUES (1, 'not for views')",
]
LATER = [
    "UPDATE library.authors SET name = 'S. Lem' WHERE code = 'lem'",
    "DELETE FROM library.loans WHERE nr < 10",
    "UPDATE library.books SET isbn = 'x1' WHERE isbn = '1'",
    "DELETE FROM library.books WHERE isbn = '2'",
]
BOOKS = """
from headrace.documents import Document, DocumentConsumer, Many, One, count
from headrace.stores.elasticsearch import ElasticsearchIndex


class Books(DocumentConsumer):
    document = Document(
        "library.books", author=One("library.authors", on="author"), loans=Many("library.loans", by="book")
    )
    store = ElasticsearchIndex("books", mappings={"properties": {"title": {"type": "text"}}})

    def render(self, book):
        return {"title": book["title"], "author": book.author and book.author["name"], "loans": count(book.loans)}
"""
BY_HAND = """
SELECT b.isbn, b.title, a.name, (SELECT count(*) FROM library.loans l WHERE l.book = b.isbn)
FROM library.books b LEFT JOIN library.authors a ON a.code = b.author
"""
TABLES = ("library.books", "library.authors", "library.loans")


@pytest.fixture
def library(system: System) -> System:
    """Somebody's database, captured in part by the commands of the README."""
    execute(system.settings, *LIBRARY)
    named = [part for table in TABLES for part in ("--table", table)]
    dsn = system.environment.pop("HEADRACE_DSN")
    system.run("setup", "--dsn", dsn, *named, "--apply")
    system.environment["HEADRACE_DSN"] = dsn
    system.start("capture", "capture")
    return system


def test_a_warehouse_and_a_search_plugin_of_one_file(library: System, elasticsearch: Any, tmp_path: Path) -> None:
    file = tmp_path / "books.py"
    file.write_text(BOOKS)
    spec = f"{file}:Books"
    library.start("warehouse", "run", "warehouse")
    library.start("books", "run", "--consumer", spec)
    library.wait("both views to be live", lambda: library.is_live("warehouse") and library.is_live("books"))
    execute(library.settings, *LATER)
    library.settle("warehouse", "books")
    facts = library.verify("warehouse", options=("--consumer", spec))
    assert facts["books"]["rows"] == 39
    assert _documents(elasticsearch.address()) == _by_hand(library)
    answer = orjson.loads(library.run("sql", "SELECT title, tags FROM library.books WHERE isbn = 'x1'", "--json"))
    assert answer["rows"] == [["Volume 1", ["a", None]]]
    tables = orjson.loads(library.run("sql", "SHOW TABLES FROM library", "--json"))["rows"]
    assert sorted(name for (name,) in tables) == ["authors", "books", "loans"], "what was not named is not captured"
    ended = library.ask("rebuild", "books", "--wait")
    assert ended.code == 3, "a consumer of a file is known to who names the file"
    assert "give this command its file: --consumer" in ended.err
    assert "headrace run" not in ended.err, "it runs; a second one would take the view from it"
    assert [report.generation for report in library.control.reports()["books"]] == [1], "nothing was begun"
    built = orjson.loads(library.run("rebuild", "books", "--wait", "--consumer", spec, "--json"))
    assert built["generation"] == live_generation(library) == 2
    ended = library.ask("verify")
    assert ended.code == 0
    assert "books was run, and is not installed here" in ended.err
    assert _documents(elasticsearch.address()) == _by_hand(library)


def test_a_consumer_of_a_package_outside_is_found_and_run(library: System, elasticsearch: Any, tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "bookish").mkdir(parents=True)
    (site / "bookish/__init__.py").write_text(BOOKS)
    about = site / "bookish-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: bookish\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[headrace.consumers]\nbooks = bookish:Books\n")
    library.environment["PYTHONPATH"] = str(site)
    listed = {each["name"]: each for each in orjson.loads(library.run("plugins", "--json"))}
    assert listed["books"]["package"] == "bookish 1.0"
    library.start("books", "run", "books")
    library.wait("books to be live", lambda: library.is_live("books"))
    execute(library.settings, *LATER)
    library.settle("books")
    library.verify("books")
    library.run("rebuild", "books", "--wait")
    assert _documents(elasticsearch.address()) == _by_hand(library)


@pytest.mark.usefixtures("elasticsearch")
def test_what_new_consumer_writes_runs_as_it_is(library: System, tmp_path: Path) -> None:
    library.run("new", "consumer", "titles", "--table", "library.books", "--dir", str(tmp_path))
    made = tmp_path / "headrace-titles"
    about = made / "headrace_titles-0.1.0.dist-info"  # what installing it would write
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: headrace-titles\nVersion: 0.1.0\n")
    (about / "entry_points.txt").write_text("[headrace.consumers]\ntitles = headrace_titles:Titles\n")
    assert 'titles = "headrace_titles:Titles"' in (made / "pyproject.toml").read_text()
    library.environment["PYTHONPATH"] = str(made)
    library.start("titles", "run", "titles")
    library.wait("titles to be live", lambda: library.is_live("titles"))
    execute(library.settings, *LATER)
    library.settle("titles")
    assert library.verify("titles")["titles"]["rows"] == 39
    for said in ("is installed already", "exists already"):
        ended = library.ask("new", "consumer", "titles", "--dir", str(tmp_path))
        assert ended.code == 3
        assert said in ended.err
        library.environment.pop("PYTHONPATH", None)


def live_generation(system: System) -> int:
    report = system.report("books")
    return report.generation if report else 0


def _documents(address: str) -> dict[str, Any]:
    client = elasticsearch.Elasticsearch(address)
    hits = client.search(index="books", size=1000)["hits"]["hits"]
    client.close()
    return {hit["_id"]: {name: hit["_source"][name] for name in ("title", "author", "loans")} for hit in hits}


def _by_hand(system: System) -> dict[str, Any]:
    return {
        isbn: {"title": title, "author": author, "loans": loans}
        for isbn, title, author, loans in rows(system.settings, BY_HAND)
    }
