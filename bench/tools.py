"""Who is measured: headrace's capture, and as the limit Postgres's own reader of the stream, which writes to nowhere."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg

from bench.program import Program
from bench.source import Source, client
from headrace.change import parse_lsn
from headrace.errors import Poison, Transient
from headrace.log import Log
from headrace.settings import Settings, environment
from headrace_capture import catalog, setup, teardown
from headrace_ops.kafka import Kafka

PATIENCE = 300.0
"""Seconds that anything may take that is waited for."""


class Tool(ABC):
    """A program that brings the changes of a source into topics, with a slot, a publication and topics of its own.

    Attributes:
        settings: Its names and its servers. The topics of either tool are made from them, alike.
    """

    kind: str

    def __init__(self, name: str, source: Source, kafka: Kafka, folder: Path) -> None:
        """Know what it would be called; nothing is made yet."""
        self.name = name
        self.source = source
        self.folder = folder
        self.kafka = kafka
        self.settings = replace(
            Settings(), source=name, slot=name, publication=name, dsn=source.dsn, kafka=kafka.address()
        )
        self.log = Log(self.settings)
        self.topics = [self.log.topic_of(f"public.{table.name}") for table in source.tables]

    def prepare(self) -> None:
        """Make its topics and its publication."""
        self.log.ensure_spine()
        for name in self.source.captured:
            self.log.ensure_table(f"public.{name}")
        self.publish()

    @contextmanager
    def awake(self) -> Iterator[Program]:
        """Run it; within, it streams."""
        program = self.start(snapshot=False)
        try:
            deadline = time.monotonic() + PATIENCE
            while not self.streams():
                program.check()
                if time.monotonic() > deadline:
                    raise Transient(
                        "bench-slow", f"{self.name} does not stream after {PATIENCE:.0f} s.", program.said()
                    )
                self.source.touch()
                time.sleep(0.5)
            yield program
        finally:
            program.stop()
            self.free()

    def drop(self) -> None:
        """Take away what `prepare` and the tool made."""
        self.free()
        self.unpublish()
        mine = f"{self.settings.source}."
        self.log.topics.delete([name for name in self.log.topics.names() if name.startswith(mine)])

    def free(self) -> None:
        """Wait until nobody uses its slot, which a process of Postgres may do for a moment longer."""
        query = f"SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{self.settings.slot}' AND active"
        deadline = time.monotonic() + PATIENCE
        while self.source.value(query):
            if time.monotonic() > deadline:
                raise Transient("bench-slow", f"Slot {self.settings.slot} is still in use.", "Run it again.")
            time.sleep(0.05)

    @abstractmethod
    def publish(self) -> None:
        """Make its publication."""

    @abstractmethod
    def unpublish(self) -> None:
        """Drop its publication and its slot."""

    @abstractmethod
    def start(self, *, snapshot: bool) -> Program:
        """Start it; with `snapshot` its first start reads every row."""

    @abstractmethod
    def streams(self) -> bool:
        """Whether it has streamed something that was changed by `Source.touch`."""


class Headrace(Tool):
    """`headrace capture`, with its defaults."""

    kind = "headrace"

    def publish(self) -> None:
        with closing(catalog.connect(self.settings.dsn)) as connection:
            tables = [f"public.{name}" for name in self.source.captured]
            setup.apply(connection, setup.plan(connection, self.settings, tables))

    def unpublish(self) -> None:
        with closing(catalog.connect(self.settings.dsn)) as connection:
            teardown.run(connection, self.settings, teardown.plan(connection, self.settings))

    def start(self, *, snapshot: bool) -> Program:  # noqa: ARG002 -- its first start always reads every row
        return Program(
            self.name, [sys.executable, "-m", "headrace", "capture"], self.folder, environment(self.settings)
        )

    def streams(self) -> bool:
        return self.streams_to(self.source.lsn())

    def streams_to(self, lsn: str) -> bool:
        """Whether a complete checkpoint covers `lsn`."""
        newest = self.log.newest_checkpoint(complete=True)
        return newest is not None and newest.version.lsn >= parse_lsn(lsn)


class Limit:
    """`pg_recvlogical` on a slot of its own: what Postgres can send, with pgoutput, to somebody who does nothing with it."""

    kind = "pg_recvlogical"

    def __init__(self, name: str, source: Source, folder: Path) -> None:
        """Make its publication and its slot: a backlog begins here."""
        self.name = name
        self._source = source
        self._folder = folder
        self._end = "0/0"
        tables = ", ".join(source.captured)
        source.run(f"CREATE PUBLICATION {name} FOR TABLE {tables}")
        source.run(f"SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')")

    def start(self) -> Program:
        """Start it; it ends when it has everything that is committed now."""
        self._source.run("SELECT pg_logical_emit_message(true, 'bench', '')")
        self._end = self._source.lsn()
        options = ["proto_version=1", f"publication_names={self.name}"]
        command = [
            client("pg_recvlogical"),
            f"--dbname={self._source.dsn}",
            f"--slot={self.name}",
            "--start",
            "--no-loop",
        ]
        command += [f"--endpos={self._end}", "--file=/dev/null", *(f"--option={option}" for option in options)]
        return Program(self.name, command, self._folder, {})

    def check(self) -> None:
        """Raise Poison `bench-missing` unless it has told Postgres that it has all of it."""
        slot = f"FROM pg_replication_slots WHERE slot_name = '{self.name}'"
        if not self._source.value(f"SELECT confirmed_flush_lsn >= '{self._end}' {slot}"):
            raise Poison("bench-missing", f"{self.kind} ended before {self._end}.", "Run it again.")

    def drop(self) -> None:
        """Drop both."""
        with psycopg.connect(self._source.dsn, autocommit=True) as connection:
            connection.execute("SELECT pg_drop_replication_slot(%s)", [self.name])
            connection.execute(f"DROP PUBLICATION {self.name}".encode())
