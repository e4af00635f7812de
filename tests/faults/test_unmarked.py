"""A committed transaction that has no marker in a partition is shown to readers again, and none of its rows is lost."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from confluent_kafka import Producer

from headrace import control
from headrace.change import Checkpoint
from headrace.codec import encode_checkpoint, encode_checkpoint_key
from headrace.control import Control, record_key
from headrace.errors import Transient
from headrace.log import CutWriter, Log, spine
from headrace.log.tail import BEGINNING, read_to_end
from headrace.log.topics import CONTROL, checkpoints_topic, schemas_topic
from headrace.log.unmarked import Breaks
from headrace.settings import Settings
from headrace_capture import jobs
from headrace_capture.recovery import recover
from headrace_ops.kafka import Kafka
from tests.fixtures.capture import (
    Running,
    capturing,
    changes,
    eventually,
    execute,
    now,
    prepare,
    refused,
    replay,
    rows,
    selected,
)
from tests.fixtures.feed import encode_headers
from tests.fixtures.mortal import DyingOfCuts, Life
from tests.fixtures.unmarked import unmark

T = "public.items"


def _shown(settings: Settings, *topics: str) -> bool:
    log = Log(settings)
    counts = log.partitions(topics)
    return log.topics.ends(counts) == log.topics.ends(counts, committed=False)


def _two_rows(settings: Settings) -> Checkpoint:
    """Capture two rows; return the checkpoint of their cut, the newest."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY)")
    with capturing(settings) as capture:
        capture.reach()
        execute(settings, "INSERT INTO items VALUES (1), (2)")
        return _confirmed(settings, capture.reach())


def _confirmed(settings: Settings, sealed: Checkpoint) -> Checkpoint:
    """Wait until Postgres knows that it is in the log."""
    slot = f"FROM pg_replication_slots WHERE slot_name = '{settings.slot}'"
    confirmed = f"SELECT confirmed_flush_lsn - '0/0' >= {sealed.version.lsn} {slot}"
    eventually("it is confirmed", lambda: rows(settings, confirmed) == [(True,)])
    return sealed


def _writer(settings: Settings, newest: Checkpoint) -> CutWriter:
    writer = Log(settings).writer()
    writer.open()
    writer.resume(newest)
    return writer


def test_a_table_that_lacks_a_marker_is_shown(settings: Settings, kafka: Kafka) -> None:
    """Nothing else changes it: without capture's help its readers would stand there for ever."""
    _two_rows(settings)
    topic = Log(settings).topic_of(T)
    unmark(kafka, f"{topic}-0")
    assert not _shown(settings, topic)
    with capturing(settings) as capture:
        capture.hear("streaming from")
        assert _shown(settings, topic)
    assert replay(settings, T) == selected(settings, "items")


def test_a_capture_that_runs_meanwhile_finds_it(settings: Settings, kafka: Kafka) -> None:
    """Its connections broke: with its next cut it looks."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY)")
    with capturing(settings) as capture:
        capture.hear("streaming from")
        execute(settings, "INSERT INTO items VALUES (1), (2)")
        capture.reach()
        topic = Log(settings).topic_of(T)
        unmark(kafka, f"{topic}-0")
        capture.eventually("it is shown", lambda: _shown(settings, topic))
        assert capture.hear("marker-missing")
    assert replay(settings, T) == selected(settings, "items")


def test_everything_that_lacks_a_marker_is_shown(settings: Settings, kafka: Kafka) -> None:
    """Also a checkpoint, without which the log would be behind its slot, and the job that the same cut notes."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY)")
    with capturing(settings) as capture:
        capture.hear("streaming from")
        execute(settings, "CREATE TABLE others (id int PRIMARY KEY)", "INSERT INTO others VALUES (1)")
        execute(settings, f"ALTER PUBLICATION {settings.publication} ADD TABLE others", "INSERT INTO others VALUES (2)")
        capture.reach()
    newest = Log(settings).newest_checkpoint()
    everything = [
        checkpoints_topic(settings.source),
        schemas_topic(settings.source),
        Log(settings).topic_of("public.others"),
    ]
    unmark(kafka, *(f"{topic}-0" for topic in everything))
    assert not any(_shown(settings, topic) for topic in everything)
    assert Log(settings).newest_checkpoint() != newest
    with capturing(settings) as capture:
        for topic in everything:
            capture.eventually(f"{topic} is shown", lambda topic=topic: _shown(settings, topic))
        # Its first row was there before it joined: that one is read beside the stream.
        capture.eventually("it is exact", lambda: replay(settings, "public.others") == selected(settings, "others"))


def test_half_a_transaction_may_come_with_what_is_confirmed(settings: Settings, kafka: Kafka) -> None:
    """One cut: the end of a transaction, which it confirms, and half of the next one. Without it the slot would be beyond the log."""
    sealed = _two_rows(settings)
    few = replace(settings, cut_records=3)
    for first in range(10, 100, 10):
        half = f"INSERT INTO items SELECT generate_series({first + 1}, {first + 4})"
        execute(settings, f"INSERT INTO items VALUES ({first})", half)
        running = Running(few, DyingOfCuts(few, Life(), 1, after=True))
        eventually("it dies", lambda running=running: running.ended)
        newest = eventually(
            "its half is seen", lambda: (found := Log(settings).newest_checkpoint()) and found.partial and found
        )
        assert newest.version > sealed.version
        if newest.offset == sealed.offset + 2:
            break
        with capturing(settings) as capture:  # the two came apart, each in a cut of its own
            sealed = _confirmed(settings, capture.reach())
    _confirmed(settings, newest)
    unmark(kafka, f"{Log(settings).topic_of(T)}-0", f"{checkpoints_topic(settings.source)}-0")
    assert Log(settings).newest_checkpoint() == sealed
    with capturing(few) as capture:
        capture.reach()
        capture.eventually("the table is as in Postgres", lambda: replay(settings, T) == selected(settings, "items"))


@pytest.mark.parametrize(
    ("of_checkpoints", "timed_out"),
    [("shown", False), ("hidden", False), ("aborted", False), ("shown", True), ("aborted, without marker", True)],
)
def test_a_table_whose_rows_are_aborted_with_a_later_cut_is_read_again(
    settings: Settings, kafka: Kafka, of_checkpoints: str, timed_out: bool
) -> None:
    """A predecessor was killed amid its next cut: to fence it takes the acknowledged rows away, or Kafka has, for it was long ago.

    So the checkpoint, if its marker is missing too and the cut had come as far as its own.
    """
    sealed = _two_rows(settings)
    log = Log(settings)
    topic = log.topic_of(T)
    places = [topic] if of_checkpoints == "shown" else [topic, checkpoints_topic(settings.source)]
    unmark(kafka, *(f"{place}-0" for place in places))
    killed = log.writer()
    killed.open()
    killed._client.begin_transaction()
    killed.opened_at = 1.0
    killed._send(topic, b'{"id":3}', b"{}", [], 0)
    later = replace(sealed, version=sealed.version._replace(lsn=now(settings) + 1))
    if of_checkpoints.startswith("aborted"):
        key, value = encode_checkpoint_key(later), encode_checkpoint(later)
        killed._send(checkpoints_topic(settings.source), key, value, [], 0)
    killed._flush()
    if timed_out:
        killed.abort()
    if of_checkpoints.endswith("without marker"):
        place = {checkpoints_topic(settings.source): 1}
        # An abort is answered before its markers are written.
        eventually("it has one", lambda: log.topics.ends(place) == log.topics.ends(place, committed=False))
        unmark(kafka, f"{checkpoints_topic(settings.source)}-0")
    with capturing(settings) as capture:
        capture.hear("the newest rows of public.items lack a commit marker")
        capture.eventually("the table is read again", lambda: replay(settings, T) == selected(settings, "items"))
    assert _shown(settings, topic)
    assert any(T in checkpoint.inexact for checkpoint in log.checkpoints())
    assert later.version not in {checkpoint.version for checkpoint in log.checkpoints()}
    newest = log.newest_checkpoint()
    assert newest is not None
    assert not newest.inexact
    assert Control(log).kept("capture", jobs.DOUBTED) == [{}]


@pytest.mark.parametrize("rows_too", [False, True])
def test_a_checkpoint_that_was_not_confirmed_is_not_taken_for_committed(
    settings: Settings, kafka: Kafka, rows_too: bool
) -> None:
    """Of a cut that was aborted it may be all that is left: what it says is in the log is not. Nor are rows of it shown, as its third."""
    sealed = _two_rows(settings)
    execute(settings, "INSERT INTO items VALUES (3)")
    log = Log(settings)
    killed = _writer(settings, sealed)
    topic = log.topic_of(T)
    if rows_too:
        headers = changes(settings, T)[-1]
        killed.produce(
            topic, b'{"id":4}', b'{"op":"c","after":{"id":4}}', encode_headers(headers.version, 9, 9, headers.schema)
        )
    version = sealed.version._replace(lsn=now(settings))
    killed.seal(version=version, commit_ts=sealed.commit_ts, xid=0, source=sealed.source)
    killed.close()
    places = [topic, checkpoints_topic(settings.source)] if rows_too else [checkpoints_topic(settings.source)]
    unmark(kafka, *(f"{place}-0" for place in places))
    with capturing(settings) as capture:
        capture.eventually("it is exact", lambda: replay(settings, T) == selected(settings, "items"))


def test_a_delete_that_lacks_a_marker_ends_with_its_tombstone(settings: Settings, kafka: Kafka) -> None:
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY)", "INSERT INTO items VALUES (1), (2)")
    with capturing(settings) as capture:
        capture.hear("streaming from")
        execute(settings, "DELETE FROM items WHERE id = 2")
        capture.reach()
    topic = Log(settings).topic_of(T)
    unmark(kafka, f"{topic}-0")
    with capturing(settings) as capture:
        capture.hear("streaming from")
    assert [*read_to_end(settings, {(topic, 0): BEGINNING})][-1].value is None
    assert replay(settings, T) == selected(settings, "items")


def test_a_capture_that_stops_amid_a_cut_after_its_connections_broke_looks_before_it_aborts(
    settings: Settings, kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cut had begun before anybody could look, and touches the table that is hidden."""
    settings = replace(settings, heartbeat_ms=0)  # a cut of one would take the break away
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY)")
    with capturing(settings) as capture:
        capture.hear("streaming from")
        execute(settings, "INSERT INTO items VALUES (1), (2)")
        capture.reach()
        flush, look, given_up = CutWriter._flush, Breaks.look, threading.Event()

        def breaking(writer: CutWriter) -> None:
            flush(writer)
            if not given_up.is_set() and writer.open_records and writer.broke():
                given_up.set()
                raise Transient("postgres-away", "It goes away amid the cut.")

        monkeypatch.setattr(CutWriter, "_flush", breaking)
        # No empty cut may look before.
        monkeypatch.setattr(Breaks, "look", lambda *args: look(*args) if given_up.is_set() else None)
        place = f"{Log(settings).topic_of(T)}-0"
        kafka.stop()
        execute(settings, "INSERT INTO items VALUES (3)")  # in the first cut after it
        unmark(kafka, place)
        assert given_up.wait(60)
        capture.hear("the newest rows of public.items lack a commit marker")
        capture.eventually("it is exact", lambda: replay(settings, T) == selected(settings, "items"))


def test_a_checkpoint_that_ends_a_large_transaction_is_known_though_it_names_few_topics(
    settings: Settings, kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It adds up from the last one that is complete, which is not the last that is shown: that is half of the transaction."""
    monkeypatch.setattr(spine, "WHOLE_PARTITIONS", 0)
    monkeypatch.setattr(spine, "WHOLE_EVERY", 1_000_000)
    settings = replace(settings, cut_records=10)
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY)")
    with capturing(settings) as capture:
        capture.reach()
        execute(settings, "INSERT INTO items VALUES (0)")
        capture.reach()
        execute(settings, "INSERT INTO items SELECT generate_series(1, 25)")
        _confirmed(settings, capture.reach())
    unmark(kafka, f"{checkpoints_topic(settings.source)}-0")
    shown = Log(settings).newest_checkpoint()
    assert shown is not None
    assert shown.partial
    with capturing(settings) as capture:
        capture.reach()
    assert replay(settings, T) == selected(settings, "items")


def test_a_recovery_that_was_not_committed_is_not_taken_up(settings: Settings) -> None:
    """Its checkpoint is at the place that its new slot says is confirmed."""
    sealed = _two_rows(settings)
    killed = _writer(settings, sealed)
    begun = replace(sealed, version=sealed.version._replace(epoch=sealed.version.epoch + 1))
    killed._begin()
    killed._send(checkpoints_topic(settings.source), encode_checkpoint_key(begun), encode_checkpoint(begun), [], 0)
    killed._flush()
    killed.abort()
    with capturing(settings) as capture:
        execute(settings, "INSERT INTO items VALUES (3)")
        assert capture.reach().version.epoch == sealed.version.epoch


def test_recovery_ends_what_is_hidden(settings: Settings, kafka: Kafka) -> None:
    """Where capture refuses before it could: also what it has noted in control, which recovery goes by."""
    sealed = _two_rows(settings)
    killed = _writer(settings, sealed)
    killed.also(CONTROL, record_key(settings.source, "capture", jobs.JOB, ""), None)
    killed.seal(version=sealed.version, commit_ts=sealed.commit_ts, xid=0, source=sealed.source)
    killed.close()
    everything = [checkpoints_topic(settings.source), schemas_topic(settings.source), CONTROL]
    unmark(kafka, *(f"{topic}-0" for topic in everything))
    recover(settings, print)
    assert _shown(settings, *everything)
    with capturing(settings) as capture:
        capture.eventually("it is exact", lambda: replay(settings, T) == selected(settings, "items"))


def test_whose_transaction_hides_what_capture_keeps_is_told(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a capture of another source, which shares `headrace.control` and does not come back to end it."""
    _two_rows(settings)
    monkeypatch.setattr(control, "_CUT_ENDS_SECONDS", 3.0)
    monkeypatch.setattr(jobs, "_TELL_SECONDS", 1.0)
    other = Producer({"bootstrap.servers": settings.kafka, "transactional.id": f"headrace-{settings.source}-other"})
    other.init_transactions(30)
    other.begin_transaction()
    try:
        other.produce(CONTROL, b"{}", record_key("other", "capture", jobs.JOB, ""))
        other.flush(30)
        said: list[str] = []
        with pytest.raises(Transient) as refused:
            jobs.Jobs(Log(settings), lambda: None, said.append)
        assert refused.value.code == "marker-missing"
        assert "another source" in refused.value.message
        assert len(said) == 1
        assert said[0].startswith(f"waiting for {CONTROL}")
    finally:
        other.abort_transaction(30)
    assert jobs.Jobs(Log(settings), lambda: None, said.append).prints.keys() == {T}


def test_whether_connections_broke_is_known_though_nothing_was_sent_since(settings: Settings, kafka: Kafka) -> None:
    """Who stops amid a cut asks before anything else of it has called librdkafka, which says it only to who does."""
    writer = _writer(settings, _two_rows(settings))
    assert not writer.broke()
    kafka.stop()
    kafka.start()
    assert writer.broke()
    writer.close()


def test_a_log_that_lost_its_end_is_refused_though_a_marker_is_missing_too(settings: Settings, kafka: Kafka) -> None:
    """What is written to show the rest must not fill the place of what was lost."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, words text)")
    with capturing(settings) as capture:
        capture.reach()
        # Two batches: one row fills the first.
        execute(settings, "INSERT INTO items SELECT i, repeat(md5(i::text), 25000) FROM generate_series(1, 2) i")
        capture.reach()
    unmark(kafka, f"{Log(settings).topic_of(T)}-0", lost=1)
    assert refused(settings).code == "log-lost-records"
