"""From commit to polled: how long after a commit returned a reader of committed records has the change in its hand.

One thread updates single rows at a steady rate, the other polls; both look at the same clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import psycopg
from confluent_kafka import Consumer, TopicPartition

from bench import truth
from bench.measure import Run, Say
from bench.source import Source
from bench.tools import PATIENCE, Tool
from headrace.errors import Transient

_UPDATE = "UPDATE orders SET quantity = %s WHERE id = %s"


def measure(tool: Tool, rate: int, seconds: int, warm: int, say: Say) -> Run:
    """Start `tool`, update `rate` rows a second for `warm` + `seconds` s; return what the latter gave."""
    with tool.awake() as program, truth.reading(tool.kafka) as consumer:
        topic = tool.topics[0]
        consumer.assign([TopicPartition(topic, 0, truth.ends(consumer, [topic])[0])])
        say(f"{tool.name}: warming up for {warm} s")
        _exchange(consumer, tool.source, range(warm * rate), rate)
        before = program.cpu()
        say(f"{tool.name}: {rate} updates/s for {seconds} s")
        numbers = range(warm * rate, (warm + seconds) * rate)
        waited = sorted(_exchange(consumer, tool.source, numbers, rate))
        cpu, peak = program.cpu() - before, program.peak()
    p50, p99 = (waited[int(len(waited) * share)] for share in (0.5, 0.99))
    return Run(tool.kind, len(waited), seconds=seconds, cpu=cpu, peak=peak, p50=p50 * 1000, p99=p99 * 1000)


def _exchange(consumer: Consumer, source: Source, numbers: range, rate: int) -> list[float]:
    """Write these numbers into rows, poll until all have come; return how long each took, in seconds."""
    committed: dict[int, float] = {}
    writer = threading.Thread(target=_write, args=(source, numbers, rate, committed), daemon=True)
    writer.start()
    polled: dict[int, float] = {}
    heard = time.monotonic()
    for number, at in _poll(consumer):
        if number in numbers:
            polled.setdefault(number, at)
            heard = at
        if len(polled) == len(numbers):
            break
        if at - heard > PATIENCE:
            raise Transient(
                "bench-slow", f"{len(polled)} of {len(numbers)} changes came, and no more.", "Run it again."
            )
    writer.join()
    return [polled[number] - committed[number] for number in numbers]


def _write(source: Source, numbers: range, rate: int, committed: dict[int, float]) -> None:
    with psycopg.connect(source.dsn, autocommit=True) as connection:
        began = time.monotonic()
        for count, number in enumerate(numbers):
            time.sleep(max(0.0, began + count / rate - time.monotonic()))
            connection.execute(_UPDATE, [number, 1 + number % 1000])
            committed[number] = time.monotonic()


def _poll(consumer: Consumer) -> Iterator[tuple[int, float]]:
    """Yield the number in each change that comes and when it came; -1 now and then when none does."""
    while True:
        first = consumer.poll(0.5)
        messages = [first, *consumer.consume(1000, 0)] if first is not None else []
        now = time.monotonic()
        yield -1, now
        for message in messages:
            row = None if message.error() else truth.after(message)
            if row is not None:
                yield row["quantity"], now
