"""The fastest loaders that we could write: each reads a whole topic and fills a store, once, and does nothing else.

    python -m bench.loaders search TOPIC
    python -m bench.loaders joined PRODUCTS REVIEWS    # the reviews wait in memory

They know nothing of positions, deletes, schemas or restarts; they are what a rebuild is held against. They read with the same client
(`confluent_kafka`, batches of 10 000), decode with the same library and write the same documents with the same mapping, settings and
versions. They end when readers see everything.
"""

from __future__ import annotations

import http.client
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlparse

import duckdb
import elasticsearch
import orjson
import pyarrow as pa
import redis
from confluent_kafka import OFFSET_BEGINNING, Consumer, Message, TopicPartition

from bench.viewed import INDEX_SETTINGS, ORDER_MAPPINGS, PRODUCT_MAPPINGS, order_document, order_page, product_document
from headrace.settings import Settings, load

INDEX: Final = "loaded-search"
PREFIX: Final = "loaded-pages"
_CHUNK, _THREADS = 1_000, 2
_ROWS = 50_000
_ARROW = pa.schema(
    [
        ("id", pa.int64()),
        ("customer_id", pa.int32()),
        ("quantity", pa.int32()),
        *((name, pa.string()) for name in ("status", "amount", "placed", "title", "note")),
    ]
)
_TABLE = """
CREATE TABLE orders (
    id BIGINT, customer_id INTEGER, quantity INTEGER, status VARCHAR, amount DECIMAL(12, 2), placed TIMESTAMPTZ, title VARCHAR,
    note VARCHAR
)
"""


def search(settings: Settings, topic: str) -> None:
    """Fill an index."""
    _make(settings, ORDER_MAPPINGS)
    _fill(settings, (b"".join(map(_order, messages)) for messages in _chunks(settings, topic, _CHUNK)))


def joined(settings: Settings, products: str, reviews: str) -> None:
    """Fill an index with products, each with its reviews."""
    _make(settings, PRODUCT_MAPPINGS)
    of: dict[int, list[dict[str, Any]]] = {}
    for messages in _chunks(settings, reviews, _ROWS):
        for message in messages:
            review = _row(message)
            of.setdefault(review["product_id"], []).append(review)

    def product(message: Message) -> bytes:
        row = _row(message)
        return _action(message, row["id"], product_document(row, of.get(row["id"], ())))

    _fill(settings, (b"".join(map(product, messages)) for messages in _chunks(settings, products, _CHUNK)))


def _make(settings: Settings, mappings: Mapping[str, Any]) -> None:
    how = {**INDEX_SETTINGS, "refresh_interval": -1}
    elasticsearch.Elasticsearch(settings.elasticsearch).indices.create(index=INDEX, mappings=mappings, settings=how)


def _fill(settings: Settings, bulks: Iterable[bytes]) -> None:
    """Send bulks, two at a time."""
    address = urlparse(settings.elasticsearch)

    def post(body: bytes) -> None:
        connection = http.client.HTTPConnection(address.hostname or "", address.port)
        connection.request("POST", f"/{INDEX}/_bulk?filter_path=errors", body, {"Content-Type": "application/x-ndjson"})
        answer = connection.getresponse().read()
        connection.close()
        assert answer == b'{"errors":false}', answer

    with ThreadPoolExecutor(_THREADS) as pool:
        running: list[Future[None]] = []
        for body in bulks:
            if len(running) > _THREADS:
                running.pop(0).result()
            running.append(pool.submit(post, body))
        for future in running:
            future.result()
    elasticsearch.Elasticsearch(settings.elasticsearch, request_timeout=60).indices.refresh(index=INDEX)


def _order(message: Message) -> bytes:
    row = _row(message)
    return _action(message, row["id"], order_document(row))


def _action(message: Message, id_: int, body: Mapping[str, Any]) -> bytes:
    lsn = int(dict(message.headers() or ())["lsn"] or 0)
    about = b'{"index":{"_id":"%d","version":%d,"version_type":"external_gte"}}\n' % (id_, lsn)
    return about + orjson.dumps(body) + b"\n"


def pages(settings: Settings, topic: str) -> None:
    """Fill hashes by pipelines."""
    client = redis.Redis.from_url(settings.redis)
    for messages in _chunks(settings, topic, _CHUNK):
        pipeline = client.pipeline(transaction=False)
        for message in messages:
            row = _row(message)
            page: dict[Any, Any] = order_page(row)
            pipeline.hset(f"{PREFIX}:{row['id']}", mapping=page)
        pipeline.execute()


def warehouse(settings: Settings, topic: str) -> None:
    """Fill a table from Arrow batches."""
    with duckdb.connect(settings.warehouse) as connection:
        connection.execute(f"SET memory_limit = '{settings.warehouse_memory}'")
        connection.execute(_TABLE)
        for messages in _chunks(settings, topic, _ROWS):
            batch = pa.Table.from_pylist([_row(message) for message in messages], schema=_ARROW)
            connection.register("batch", batch)
            connection.execute("INSERT INTO orders SELECT * FROM batch")
            connection.unregister("batch")


def count(settings: Settings) -> int:
    """Return how many rows the loaded table has."""
    with duckdb.connect(settings.warehouse) as connection:
        row = connection.execute("SELECT count(*) FROM orders").fetchone()
    assert row is not None
    return int(row[0])


def _chunks(settings: Settings, topic: str, size: int) -> Iterator[list[Message]]:
    """Yield the records of a topic in pieces, to its end."""
    options = {
        "bootstrap.servers": settings.kafka,
        "group.id": "bench-loader",
        "isolation.level": "read_committed",
        "enable.auto.commit": False,
        "enable.partition.eof": True,
        "fetch.queue.backoff.ms": 20,  # else it waits for a second whenever much is there
    }
    with closing(Consumer(options)) as consumer:
        consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
        held: list[Message] = []
        while True:
            for message in consumer.consume(10_000, 0.05):
                if message.error() is not None:  # the end
                    if held:
                        yield held
                    return
                held.append(message)
                if len(held) == size:
                    yield held
                    held = []


def _row(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = orjson.loads(message.value() or b"")["after"]
    return row


_LOADERS: Final[dict[str, Callable[..., None]]] = {
    "search": search,
    "joined": joined,
    "pages": pages,
    "warehouse": warehouse,
}


def command(view: str, *arguments: str) -> list[str]:
    """Return the command that runs a loader; it needs the settings of the servers in its environment."""
    return [sys.executable, "-m", "bench.loaders", view, *arguments]


FOLDER: Final = str(Path(__file__).parents[1])
"""Where Python finds this package."""

if __name__ == "__main__":
    _LOADERS[sys.argv[1]](load(), *sys.argv[2:])
