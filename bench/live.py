"""The live path: how long after a commit the change is in the log, and how long until a view shows it.

One thread updates single rows at a steady rate, one reads the log as a plain `read_committed` reader does, and one for each view asks
again and again for the row that was committed last, until the view shows it. All look at the same clock. So a figure has the time of a
question in it, and a view is asked some hundred times a second by somebody.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlparse

import orjson
import psycopg
import redis
from confluent_kafka import TopicPartition

from bench import truth
from bench.source import Source
from headrace.errors import Transient
from headrace.settings import Settings
from headrace_ops.kafka import Kafka

ROWS = 1_000
_PATIENCE = 30.0
_BETWEEN = 0.004
"""From an answer to the next question: who asks without a pause takes the processor from what he measures."""
Ask = Callable[[int], int]
"""From a row's id to the number that the view shows of it."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What one view gave.

    Attributes:
        view: Its name.
        samples: How many rows were waited for.
        p50, p99: Milliseconds from the commit until the view showed it.
        log: Milliseconds from the commit until a plain reader had it, the median of the same rows.
    """

    view: str
    samples: int
    p50: float
    p99: float
    log: float

    def told(self) -> str:
        """Return it in one line."""
        share = f"of it {self.log:.1f} ms until it is in the log, {self.p50 - self.log:.1f} ms to the view"
        return f"{self.view}: p50 {self.p50:.1f} ms ({share}), p99 {self.p99:.1f} ms, {self.samples} rows"


class Live:
    """One measurement."""

    def __init__(self, source: Source, kafka: Kafka, topic: str, asks: dict[str, Ask]) -> None:
        """Use views that are live already."""
        self._source = source
        self._kafka = kafka
        self._topic = topic
        self._asks = asks
        self._committed: dict[int, float] = {}
        self._logged: dict[int, float] = {}
        self._seen: dict[str, dict[int, float]] = {view: {} for view in asks}
        self._base = self._newest = int(source.value("SELECT max(quantity) FROM orders"))
        self._ended = threading.Event()

    def measure(self, rate: int, seconds: int, warm: int) -> list[Shown]:
        """Update `rate` rows a second for `warm` + `seconds` s; return what the latter gave."""
        threads = [threading.Thread(target=self._read_log, daemon=True)]
        threads += [threading.Thread(target=self._look, args=named, daemon=True) for named in self._asks.items()]
        for thread in threads:
            thread.start()
        self._write(rate * (warm + seconds), rate)
        time.sleep(1.0)
        self._ended.set()
        for thread in threads:
            thread.join(_PATIENCE)
        return [self._shown(view, self._base + rate * warm) for view in self._asks]

    def _shown(self, view: str, after: int) -> Shown:
        seen = {number: at for number, at in self._seen[view].items() if number > after}
        if not seen or not self._logged:
            raise Transient("bench-slow", f"{view} shows nothing of what is written.", "Run it again.")
        took = sorted(at - self._committed[number] for number, at in seen.items())
        logged = sorted(self._logged[number] - self._committed[number] for number in seen if number in self._logged)
        p50, p99 = (1000 * took[int(len(took) * share)] for share in (0.5, 0.99))
        return Shown(view, len(took), p50, p99, 1000 * logged[len(logged) // 2])

    def _write(self, count: int, rate: int) -> None:
        with psycopg.connect(self._source.dsn, autocommit=True) as connection:
            began = time.monotonic()
            for number in range(self._base + 1, self._base + count + 1):
                time.sleep(max(0.0, began + (number - self._base) / rate - time.monotonic()))
                connection.execute("UPDATE orders SET quantity = %s WHERE id = %s", [number, _row_of(number)])
                self._committed[number] = time.monotonic()
                self._newest = number

    def _read_log(self) -> None:
        with truth.reading(self._kafka) as consumer:
            consumer.assign([TopicPartition(self._topic, 0, truth.ends(consumer, [self._topic])[0])])
            while not self._ended.is_set():
                first = consumer.poll(0.1)
                messages = [first, *consumer.consume(1000, 0)] if first is not None else []
                now = time.monotonic()
                for message in messages:
                    row = None if message.error() else truth.after(message)
                    if row is not None:
                        self._logged.setdefault(row["quantity"], now)

    def _look(self, view: str, ask: Ask) -> None:
        last = self._base
        while not self._ended.is_set():
            number = self._newest
            if number == last:
                time.sleep(0.0005)
                continue
            last = number
            while ask(_row_of(number)) < number and not self._ended.is_set():
                time.sleep(_BETWEEN)
            self._seen[view][number] = time.monotonic()


def _row_of(number: int) -> int:
    return 1 + number % ROWS


def _search(settings: Settings) -> Ask:
    """Return a real-time get of a document."""
    address = urlparse(settings.elasticsearch)
    connection = http.client.HTTPConnection(address.hostname or "", address.port)

    def ask(id_: int) -> int:
        connection.request("GET", f"/order_search/_source/{id_}?_source_includes=quantity")
        return int(orjson.loads(connection.getresponse().read())["quantity"])

    return ask


def _pages(settings: Settings) -> Ask:
    """Return a look at a page's hash."""
    client = redis.Redis.from_url(settings.redis, decode_responses=True)
    live: Any = client.get("order_pages:live")
    return lambda id_: int(client.hget(f"order_pages:{live}:{id_}", "quantity") or 0)


def _warehouse(settings: Settings) -> Ask:
    """Return a query of the warehouse's endpoint."""
    connection = http.client.HTTPConnection(settings.warehouse_listen)

    def ask(id_: int) -> int:
        body = orjson.dumps({"sql": f"SELECT quantity FROM orders WHERE id = {id_}"})
        connection.request("POST", "/sql", body, {"Content-Type": "application/json"})
        return int(orjson.loads(connection.getresponse().read())["rows"][0][0])

    return ask


ASKS: Final[dict[str, Callable[[Settings], Ask]]] = {"search": _search, "pages": _pages, "warehouse": _warehouse}
