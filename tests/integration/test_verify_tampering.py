"""One thing of a view is changed, removed or added in its store, behind headrace's back, at random: verify names that key and no other.

In small pages, so that what was done lies at the end of one often.
"""

from __future__ import annotations

from contextlib import closing
from random import Random
from typing import Any, ClassVar

import pytest

from headrace import codec
from headrace.change import Row
from headrace.documents import Count, Document, Node, Sum, Window
from headrace.documents.windows import Root
from headrace.log import Log
from headrace.runner import rows as asked
from headrace.settings import Settings
from headrace.stores.elasticsearch import ElasticsearchIndex
from headrace.stores.kafka import KafkaTopic
from headrace.stores.redis import RedisPages
from headrace_verify.verify import Verifier
from tests.fixtures.capture import capturing
from tests.fixtures.documents_deep import COLUMNS, Deep, plain
from tests.fixtures.seeds import seeds, steps
from tests.fixtures.serving import await_live, serving
from tests.fixtures.tampered import ALIAS, ANY, KEYLESS, PAGES, PARTITIONS, STORES, TOPIC, Done, Named
from tests.fixtures.verified import TYPES, VALUES, Found, Warehouse
from tests.integration.test_capture_append_only import prepare_append_only

pytestmark = pytest.mark.usefixtures("elasticsearch", "redis_server")
SEEDS = seeds("1")
STEPS = steps(2)
ODD = "public.odd"
_KEYS = (
    "a",
    "a ",
    "A",
    '"',
    "\\",
    "''",
    "ü",
    "u\u0308",
    "\u20ac\U0001f600",
    "\ufffd",
    "\x01",
    "\\u0000",
    "null",
    "1",
    "z" * 150,
    "a,b",
    "*",
    "?[x]",
)


class Documents(Deep):
    """Documents of every kind of join, of rows with odd keys, and of windows."""

    documents: ClassVar[tuple[Root, ...]] = (
        *Deep.documents,
        Document(ODD),
        Window("public.reviews_at", on="at", seconds=3600, start="hour", n=Count(), sum=Sum("n")),
    )
    store = ElasticsearchIndex(ALIAS, mappings={"dynamic": False})

    def id(self, table: str, key: Row) -> str:
        if table == ODD:
            return f"{key['a']}/{key['b']}"
        ((_, value),) = key.items()
        return f"{table.removeprefix('public.')}-{value}"

    def render(self, row: Node) -> Row:
        return dict(row) if "hour" in row else plain(row)


class Streamed(Documents):
    """The same in Kafka."""

    store = KafkaTopic(TOPIC, partitions=PARTITIONS)


class Pages(Documents):
    """The same as text."""

    store = RedisPages(PAGES)

    def render(self, row: Node) -> Row:
        made = super().render(row)
        return {"html": codec.dumps(made).decode(), "name": str(made.get("name", "")), "n": str(len(made))}


VIEWS: dict[str, type[Any]] = {"documents": Documents, "stream": Streamed, "pages": Pages, "warehouse": Warehouse}


def source(settings: Settings) -> None:
    """Make and set up what is shown."""
    columns = {f"c{number}": type_ for number, type_ in enumerate(VALUES)}
    typed = ", ".join(f"{name} {type_}" for name, type_ in columns.items())
    values = ", ".join(f"{value}::{type_}" for type_, value in VALUES.items())
    quoted = [(a, b) for a in _KEYS for b in ("x", "1.0")]
    odd = ", ".join(
        "(E'{}', '{}', {}, '{}')".format(a.replace("\\", "\\\\").replace("'", "''"), b, n, a[:3].replace("'", "''"))
        for n, (a, b) in enumerate(quoted)
    )
    prepare_append_only(
        settings,
        *TYPES,
        *(
            f"CREATE TABLE {table} ({', '.join(f'{name} {kind}' for name, kind in of.items())}, PRIMARY KEY (id))"
            for table, of in COLUMNS.items()
        ),
        f"CREATE TABLE public.every (id int PRIMARY KEY, {typed})",
        f"INSERT INTO public.every SELECT i, {values} FROM generate_series(1, 6) i",
        "INSERT INTO public.every SELECT i FROM generate_series(7, 9) i",
        f"CREATE TABLE {ODD} (a text, b text, n numeric, said text, PRIMARY KEY (b, a))",
        f"INSERT INTO {ODD} VALUES {odd}",
        "CREATE TABLE public.parted (id int, n float8, t timestamptz, PRIMARY KEY (id)) PARTITION BY RANGE (id)",
        "CREATE TABLE public.part1 PARTITION OF public.parted FOR VALUES FROM (0) TO (10)",
        "CREATE TABLE public.part2 PARTITION OF public.parted FOR VALUES FROM (10) TO (100)",
        "INSERT INTO public.parted SELECT i, CASE i % 4 WHEN 0 THEN float8 'NaN' WHEN 1 THEN 'Infinity' ELSE i END, "
        "timestamptz '2024-01-01' + i * interval '1 hour' FROM generate_series(1, 20) i",
        "CREATE TABLE public.reviews_at (id int PRIMARY KEY, at timestamptz, n int)",
        "INSERT INTO public.reviews_at SELECT i, timestamptz '2024-01-01' + i * interval '20 min', i FROM generate_series(1, 30) i",
        "CREATE TABLE public.events (what text, n float8, d jsonb)",
        "INSERT INTO public.events SELECT 'e' || i % 5, i % 3, '{\"a\": [1, 2.5, null]}' FROM generate_series(1, 40) i",
        "INSERT INTO categories SELECT i, nullif(i % 7, 0), 'c' || i FROM generate_series(1, 20) i",
        "INSERT INTO products SELECT i, nullif(i % 25, 0), 'p' || i FROM generate_series(1, 40) i",
        "INSERT INTO reviews SELECT i, i % 35, i % 6, nullif(i % 3, 0) = 1, nullif(i % 11, 0) + 0.1 FROM generate_series(1, 99) i",
        "INSERT INTO comments SELECT i, i % 130, chr(97 + i % 3) FROM generate_series(1, 200) i",
        "INSERT INTO product_tags SELECT i, i % 35, i % 9 FROM generate_series(1, 80) i",
        "INSERT INTO tags SELECT i, 't' || i FROM generate_series(1, 8) i",
    )  # fmt: skip


@pytest.fixture
def in_small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a scan end a page often."""
    monkeypatch.setattr(asked, "_FIRST_ROWS", 2)
    monkeypatch.setattr(asked, "_MOST_ROWS", 7)


def told(verifier: Verifier, name: str) -> set[Named]:
    """Return what verify names."""
    seen = Found(verifier, name, VIEWS[name])
    assert not seen.undecided
    return {(each.kind, each.collection, ANY if each.collection == KEYLESS else each.key) for each in seen.wrong}


def tampered(verifier: Verifier, name: str, store: Any, chance: Random) -> None:
    """Do some things to a view, and undo them."""
    keys = store.keys()
    some = chance.sample(keys, min(len(keys), chance.choice([1, 1, 2, 5])))
    rest = [key for key in keys if key not in some]
    done: dict[str, Done] = {key: store.tamper(key, chance.choice(rest), chance) for key in some}
    wanted = set[Named]().union(*(each.named for each in done.values()))
    assert told(verifier, name) == wanted, (name, {key: each.what for key, each in done.items()})
    for each in reversed(done.values()):
        each.undo()


@pytest.mark.usefixtures("in_small_pages")
@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_tampered_with_is_named_and_nothing_else(settings: Settings, seed: int) -> None:
    chance = Random(seed)
    source(settings)
    with capturing(settings) as capture, serving(settings, **VIEWS) as control:
        capture.reach()
        await_live(control, *VIEWS)
        verifier = Verifier(Log(settings), control, lambda *_: None, 60)
        for _ in range(STEPS):
            for name, kind in STORES.items():
                with closing(kind(settings)) as store:
                    tampered(verifier, name, store, chance)
        for name in VIEWS:
            assert told(verifier, name) == set(), name
