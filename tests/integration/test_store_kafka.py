"""A view that is a topic: what its readers never see, whatever is done to the topics behind its back."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace import codec
from headrace.change import NOWHERE, Position, Row, Version
from headrace.consumer import Generation
from headrace.documents import Document, DocumentConsumer, Node
from headrace.errors import Misconfigured, Poison, Transient, Wiped
from headrace.log import Log, transaction
from headrace.log.kafka import partition_of, producer
from headrace.log.tail import BEGINNING, read_to_end
from headrace.log.topics import Topics
from headrace.settings import Settings
from headrace.stores import Doc
from headrace.stores.kafka import KafkaTopic, live_topic, topic
from headrace.testing import History, shape
from headrace_ops.kafka import Kafka
from tests.fixtures.removed import delete_records
from tests.fixtures.unmarked import unmark

PRODUCTS = shape("public.products", id="integer", name="text")


class Titles(DocumentConsumer):
    document = Document("public.products")
    store = KafkaTopic("titles", partitions=3)

    def render(self, row: Node) -> Row:
        return {"name": row["name"]}


class Stream:
    """A view `titles`, its log, and what a reader of committed records sees."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.log = History([PRODUCTS])
        self.generation = Generation("titles", 1, "abc")

    def commit(self, *names: str) -> None:
        for id_, name in enumerate(names):
            self.log.put("public.products", {"id": id_, "name": name})
        self.log.cut()

    def open(self) -> tuple[Titles, Position | None]:
        consumer = Titles(self.settings, "titles")
        return consumer, consumer.open(self.generation)

    def catch_up(self, *, promote: bool = False) -> None:
        consumer, position = self.open()
        with closing(consumer):
            for batch in self.log.batches(position):
                consumer.apply(batch)
            if promote:
                consumer.promote()

    def read(self) -> dict[str, str] | None:
        topic = live_topic(self.settings, "titles")
        if topic is None:
            return None
        return {key.decode(): codec.loads(v)["name"] for key, v in self.newest(topic).items() if v is not None}

    def newest(self, topic: str) -> dict[bytes, bytes | None]:
        return {r.key: r.value for r in read_to_end(self.settings, {(topic, p): BEGINNING for p in range(3)})}


@pytest.fixture
def stream(kafka: Kafka, tmp_path: Path) -> Stream:
    return Stream(replace(Settings(), kafka=kafka.address(), state=str(tmp_path), message_max_bytes=200_000))


def test_tombstones_last_as_long_as_a_reader_may_be_away(stream: Stream) -> None:
    stream.settings = replace(stream.settings, delete_retention_ms=7_000_000, min_compaction_lag_ms=50_000)
    stream.commit("kettle")
    stream.catch_up()
    kept = {"delete.retention.ms": "7000000", "min.compaction.lag.ms": "50000"}
    assert Log(stream.settings).topics.configure({"titles.g1": kept}) == []


def test_a_new_epoch_is_newer_though_its_lsns_are_lower(stream: Stream) -> None:
    """S2: what the source has lost has LSNs above those of the new truth."""
    stream.commit("kettle")
    stream.catch_up(promote=True)
    consumer, position = stream.open()
    assert position is not None
    true, late = Version(2, 1), Version(1, position.version.lsn + 1)
    with closing(consumer):
        consumer.store.write([Doc("0", {"name": "true"}, true)], replace(position, version=true))
        assert stream.read() == {"0": "true"}
        consumer.store.write([Doc("0", {"name": "late"}, late)], replace(position, version=late))
        consumer.store.write([], replace(position, version=Version(2, 2)))
        assert stream.read() == {"0": "true"}


def test_a_view_of_another_source_is_read_and_not_taken_over(stream: Stream) -> None:
    stream.commit("kettle")
    stream.catch_up(promote=True)
    first, position = stream.open()
    stream.settings = replace(stream.settings, source="crm", state=f"{stream.settings.state}/crm")
    other, _ = stream.open()
    with closing(first), closing(other):
        assert other.shows == position
        with pytest.raises(Misconfigured, match="of source main") as error:
            other.store.write([], position)
        assert error.value.code == "view-of-another"
        stream.commit("cup")
        for batch in stream.log.batches(position):
            first.apply(batch)
        assert [row.value for row in other.scan(None, 9)] == [{"name": "cup"}]


def test_a_writer_that_was_ended_once_is_opened_again_and_one_that_has_a_rival_stops(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker ends one too, whose machine was paused for longer than a transaction may last and does not know it."""
    monkeypatch.setattr(transaction, "_ended", {})
    stream.commit("kettle")
    stream.catch_up(promote=True)
    stream.commit("cup")
    elsewhere = Stream(replace(stream.settings, state=f"{stream.settings.state}/elsewhere"))
    for kind, code in ((Transient, "fenced"), (Misconfigured, "writer-taken-over")):
        first, position = stream.open()
        rival, _ = elsewhere.open()
        (batch,) = stream.log.batches(position)
        with closing(first), closing(rival), pytest.raises(kind) as error:
            first.apply(batch)
        assert error.value.code == code
    stream.catch_up()
    assert stream.read() == {"0": "cup"}


def test_what_is_written_can_be_read_at_once(stream: Stream) -> None:
    stream.commit("kettle", "cup")
    stream.catch_up(promote=True)
    consumer, position = stream.open()
    for turn in range(30):
        stream.commit(f"kettle {turn}", f"cup {turn}")
        for batch in stream.log.batches(position):
            consumer.apply(batch)
            position = batch.position
        assert stream.read() == {"0": f"kettle {turn}", "1": f"cup {turn}"}
    consumer.close()


@pytest.mark.parametrize("pages", [(1, 1), (1, 2), (2, 1)])
def test_scans_that_take_turns_read_the_topic_once_each(
    stream: Stream, monkeypatch: pytest.MonkeyPatch, pages: tuple[int, int]
) -> None:
    """A later one shows what is there when it begins, wherever an earlier one stands meanwhile."""
    stream.commit(*"abcdef")
    stream.catch_up()
    consumer, position = stream.open()
    with closing(consumer):
        reads = _counted(monkeypatch)
        seen: list[list[tuple[str, str]]] = [[], []]
        seen[0] += _page(consumer, [], pages[0])
        stream.commit(*"ABCDEF")
        for batch in stream.log.batches(position):
            consumer.apply(batch)
        going = [0, 1]
        while going:
            for number in tuple(going):
                found = _page(consumer, seen[number], pages[number])
                seen[number] += found
                if not found:
                    going.remove(number)
        assert seen[1] == [(str(number), name) for number, name in enumerate("ABCDEF")]
        assert [(key, name.upper()) for key, name in seen[0]] == seen[1]
        assert len(reads) == 2


@pytest.mark.parametrize("also", [[], ["titles.generations-0"]])
def test_a_state_without_its_markers_is_shown_when_the_view_is_opened(
    stream: Stream, kafka: Kafka, also: list[str]
) -> None:
    """A broker that was killed may leave it so; a view that does not change would hang there for ever."""
    stream.commit("kettle", "lamp", "chair")
    stream.catch_up(promote=True)
    stream.commit("teapot", "bulb", "stool")
    stream.catch_up()
    shown = stream.read()
    changed = {partition_of(key, 3) for key in (b"0", b"1", b"2")}
    assert len(changed) > 1
    unmark(kafka, *(f"titles.g1-{at}" for at in changed), *also)
    assert stream.read() == {"0": "kettle", "1": "lamp", "2": "chair"}
    stream.catch_up()
    assert stream.read() == shown == {"0": "teapot", "1": "bulb", "2": "stool"}


def test_documents_that_kafka_has_lost_are_written_again(stream: Stream, kafka: Kafka) -> None:
    """Its position is in another topic, which has lost nothing."""
    stream.commit("kettle", "lamp", "chair")
    stream.catch_up(promote=True)
    stream.commit("teapot", "bulb", "stool")
    stream.catch_up()
    shown = stream.read()
    unmark(kafka, f"titles.g1-{partition_of(b'0', 3)}", lost=1)
    stream.catch_up(promote=True)
    assert stream.read() == shown == {"0": "teapot", "1": "bulb", "2": "stool"}
    consumer, position = stream.open()
    consumer.close()
    assert position is not None


def test_a_loss_is_noticed_though_the_rest_of_its_state_is_shown_again(stream: Stream, kafka: Kafka) -> None:
    """What is written to end a transaction fills the place of what was lost."""
    place = partition_of(b"0", 3)
    near = next(id_ for id_ in range(1, 30) if partition_of(str(id_).encode(), 3) == place)
    for turn in "old", "new":
        for id_ in 0, near:  # each in a batch of its own
            stream.log.put("public.products", {"id": id_, "name": turn + 150_000 * "y"})
        stream.log.cut()
        stream.catch_up(promote=True)
    shown = stream.read()
    unmark(kafka, f"titles.g1-{place}", lost=1)
    stream.catch_up(promote=True)
    assert stream.read() == shown
    assert all(name.startswith("new") for name in (shown or {}).values())


def test_a_loss_under_a_running_process_is_noticed_when_it_writes_there(stream: Stream, kafka: Kafka) -> None:
    place = partition_of(b"0", 3)
    ids = [id_ for id_ in range(30) if partition_of(str(id_).encode(), 3) == place][:5]
    for id_ in ids:
        stream.log.put("public.products", {"id": id_, "name": "old"})
    stream.log.cut()
    stream.catch_up(promote=True)
    for name in "newer", "newest":
        stream.log.put("public.products", {"id": ids[0], "name": name})
        stream.log.cut()
        stream.catch_up()
    consumer, position = stream.open()
    with closing(consumer):
        unmark(kafka, f"titles.g1-{place}", lost=1)
        for id_ in ids[1:]:
            stream.log.put("public.products", {"id": id_, "name": "newest"})
        stream.log.cut()
        (batch,) = stream.log.batches(position)
        with pytest.raises(Transient) as error:
            consumer.apply(batch)
    assert error.value.code in {"view-wiped", "kafka-away"}, error.value
    stream.catch_up(promote=True)
    assert stream.read() == {str(id_): "newest" for id_ in ids}


def test_a_loss_amid_a_load_begins_it_again(stream: Stream, kafka: Kafka) -> None:
    """What is written next goes to the same place, and no position is there to hold it against."""
    stream.commit("kettle", "lamp", "chair")
    version = stream.log.version
    consumer, _ = stream.open()
    with closing(consumer):
        consumer.store.write([Doc("0", {"name": "kettle"}, version)], None)
        unmark(kafka, f"titles.g1-{partition_of(b'0', 3)}", lost=1)
        with pytest.raises(Transient) as error:  # noqa: PT012  Kafka may be slow to say it
            for _ in range(3):
                consumer.store.write([Doc("0", {"name": "kettle"}, version)], None)
    assert error.value.code in {"view-wiped", "kafka-away", "records-lost"}, error.value
    stream.catch_up(promote=True)
    assert stream.read() == {"0": "kettle", "1": "lamp", "2": "chair"}


def test_generations_are_what_kafka_has_of_them(stream: Stream, kafka: Kafka) -> None:
    """One process goes on where it has read up to: what was lost before that, and who came in its place, it must see."""
    stream.commit("kettle")
    stream.catch_up(promote=True)
    consumer, _ = stream.open()
    with closing(consumer):
        assert consumer.generations() == [replace(stream.generation, live=True)]
        unmark(kafka, "titles.generations-0", lost=1)
        assert consumer.generations() == [stream.generation]


def test_what_lost_documents_stays_readable_until_something_is_written(stream: Stream, kafka: Kafka) -> None:
    """Its process may be paused, or have other code, and write nothing; and end amid clearing."""
    stream.commit("kettle", "lamp", "chair")
    stream.catch_up(promote=True)
    stream.commit("teapot", "bulb", "stool")
    stream.catch_up()
    place = partition_of(b"0", 3)
    unmark(kafka, f"titles.g1-{place}", lost=1)
    for _ in range(2):
        consumer, position = stream.open()
        with closing(consumer):
            assert position is None
            assert (consumer.shows or Position()).version == stream.log.version
            assert live_topic(stream.settings, "titles") == "titles.g1"
    consumer, position = stream.open()
    with closing(consumer):
        consumer.store._clear()
        assert consumer.shows is None
    assert live_topic(stream.settings, "titles") is None
    stream.catch_up(promote=True)
    assert stream.read() == {"0": "teapot", "1": "bulb", "2": "stool"}


def test_readers_are_not_pointed_at_a_topic_that_is_gone(stream: Stream) -> None:
    stream.commit("kettle")
    stream.catch_up()
    consumer, _ = stream.open()
    with closing(consumer):
        Log(stream.settings).topics.delete(["titles.g1"], wait=True)
        with pytest.raises(Wiped):
            consumer.promote()
    assert live_topic(stream.settings, "titles") is None


def test_the_last_act_of_a_dropped_generation_without_its_marker_holds_nobody_up(stream: Stream, kafka: Kafka) -> None:
    stream.commit("kettle")
    stream.catch_up(promote=True)
    old, _ = stream.open()
    stream.generation = Generation("titles", 2, "abc")
    stream.catch_up(promote=True)
    with closing(old):
        old.drop()
    unmark(kafka, "titles.generations-0")
    stream.commit("cup")
    stream.catch_up()
    assert stream.read() == {"0": "cup"}


def test_a_single_document_is_read_from_its_partition(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    stream.commit(*"abcdef")
    stream.catch_up()
    consumer, _ = stream.open()
    with closing(consumer):
        rows = consumer.scan(None, 10)
        reads = _counted(monkeypatch)
        assert [row for each in rows for row in consumer.get([("", each.key)])] == rows
        assert [len(starts) for _, starts in reads] == [1] * 6
        assert sorted(consumer.get([("", row.key) for row in rows])) == rows


def test_what_somebody_writes_into_the_topic_is_shown_and_goes_when_the_view_begins_from_zero(
    stream: Stream,
) -> None:
    stream.commit("kettle", "cup", "pot")
    stream.catch_up(promote=True)
    stranger = producer(stream.settings)
    large = {"epoch": b"1", "lsn": str(1 << 60).encode()}
    for key, value, headers in (
        (b"0", None, {}),
        (b"1", b"no JSON", large),
        (b"\xff", b"{}", {"epoch": b"one"}),
        (b"text", b'"text"', {"epoch": None, "lsn": None}),
    ):
        stranger.produce("titles.g1", key=key, value=value, headers=headers)
    assert stranger.flush(30) == 0
    consumer, _ = stream.open()
    with closing(consumer):
        assert [(row.key, row.value, row.version) for row in consumer.scan(None, 9)] == [
            ("1", {"@error": "no JSON"}, NOWHERE),
            ("2", {"name": "pot"}, stream.log.version),
            ("text", {"@error": '"text"'}, NOWHERE),
            ("\ufffd", {}, NOWHERE),
        ]
        assert consumer.get([("", "0")]) == []
    stranger.produce("titles.generations", key=b"g1")  # its position is lost
    assert stranger.flush(30) == 0
    consumer, position = stream.open()
    with closing(consumer):
        assert position is None
    stream.catch_up(promote=True)
    assert stream.read() == {"0": "kettle", "1": "cup", "2": "pot"}


def test_what_somebody_writes_of_generations_is_passed_over(stream: Stream, caplog: pytest.LogCaptureFixture) -> None:
    stream.commit("kettle")
    stream.catch_up(promote=True)
    stranger = producer(stream.settings)
    for key in b"g1", b"live", b"mine", b"\xff", b"g2":
        for value in b"no JSON", b"[]", b"7", b"null", b"{}", b'{"generation": 1}', b'{"generation": "1", "topic": 1}':
            stranger.produce("titles.generations", key=key, value=value)
    assert stranger.flush(30) == 0
    consumer, position = stream.open()
    with closing(consumer):
        assert consumer.generations() == [replace(stream.generation, live=True)]
        assert (position or Position()).version == stream.log.version
    assert stream.read() == {"0": "kettle"}
    assert "titles.generations has a record at offset" in caplog.text


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_a_document_in_a_partition_that_is_not_its_own_is_shown_beside_it(stream: Stream, limit: int) -> None:
    """Another client's partitioner puts it there; a tombstone there takes nothing away. So with keys that are not UTF-8."""
    stream.commit("kettle", "pot", "cup")
    stream.catch_up()
    own = {r.key: r.partition for r in read_to_end(stream.settings, {("titles.g1", p): BEGINNING for p in range(3)})}
    stranger = producer(stream.settings)
    for key, value in (b"0", b'{"name":"other"}'), (b"1", None), (b"2", b'{"name":"cup"}'):
        stranger.produce("titles.g1", key=key, value=value, partition=(own[key] + 1) % 3)
    for partition, (key, value) in enumerate(((b"\xff", b"{}"), (b"\xfe", None), (b"\xfe", b"{}"))):
        stranger.produce("titles.g1", key=key, value=value, partition=partition)
    assert stranger.flush(30) == 0
    consumer, _ = stream.open()
    seen: list[str] = []
    with closing(consumer):
        while len(page := consumer.scan(("", seen[-1]) if seen else None, limit)) >= limit:
            seen += [row.key for row in page]
        seen += [row.key for row in page]
    assert seen == ["0", "0", "1", "2", "2", "\ufffd", "\ufffd"]


def test_a_topic_of_which_somebody_has_deleted_records_is_shown_from_where_it_begins(stream: Stream) -> None:
    stream.commit("kettle")
    stream.catch_up()
    stream.commit("kettle", "cup", "pot")
    stream.catch_up(promote=True)
    topics, at = Log(stream.settings).topics, partition_of(b"0", 3)
    (end,) = topics.ends({"titles.g1": 3})["titles.g1"][at : at + 1]
    delete_records(stream.settings, "titles.g1", at, end)
    left = {str(id_): name for id_, name in enumerate(("kettle", "cup", "pot")) if partition_of(b"%d" % id_, 3) != at}
    assert left
    consumer, _ = stream.open()
    with closing(consumer):
        assert {row.key: row.value["name"] for row in consumer.scan(None, 9)} == left
        assert consumer.get([("", "0")]) == []


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list with an entry for each reading of a topic."""
    reads: list[Any] = []

    def counting(*args: Any) -> Any:
        reads.append(args)
        return read_to_end(*args)

    monkeypatch.setattr(topic, "read_to_end", counting)
    return reads


def _page(consumer: Titles, rows: list[tuple[str, str]], limit: int) -> list[tuple[str, str]]:
    return [(row.key, row.value["name"]) for row in consumer.scan(("", rows[-1][0]) if rows else None, limit)]


def test_a_live_topic_that_somebody_deletes_is_pointed_at_again_when_it_is_whole(stream: Stream) -> None:
    stream.commit("kettle", "cup")
    stream.catch_up(promote=True)
    consumer, position = stream.open()
    topics = Log(stream.settings).topics
    topics.delete(["titles.g1"], wait=True)
    topics.make({"titles.g1": (3, {"cleanup.policy": "delete"})})  # a client of somebody's makes it again
    stream.commit("pot")
    (batch,) = stream.log.batches(position)
    with pytest.raises(Wiped):
        consumer.apply(batch)
    consumer.close()
    consumer, position = stream.open()
    assert position is None
    assert stream.read() is None, "readers see nothing before they see a half"
    for batch in stream.log.batches(position, piece=1):
        consumer.apply(batch)
    consumer.promote()
    consumer.close()
    assert stream.read() == {"0": "pot", "1": "cup"}
    kept = topics.configure({"titles.g1": {"cleanup.policy": "compact"}})
    assert kept == [], "it is compacted, as it was"


def test_a_document_that_is_too_large_is_told_by_its_id_and_mended_by_a_setting(stream: Stream) -> None:
    stream.commit("kettle", "cup" * 1_000_000)
    with pytest.raises(Poison, match=r"Document '1' of titles has \d+ bytes") as error:
        stream.catch_up()
    assert (error.value.code, error.value.cursor) == ("document-too-large", ("public.products", "1"))
    stream.settings = replace(stream.settings, message_max_bytes=4_000_000)
    stream.catch_up(promote=True)
    assert stream.read() == {"0": "kettle", "1": "cup" * 1_000_000}


def test_who_takes_a_name_that_is_taken_does_not_disturb_who_has_it(stream: Stream) -> None:
    stream.commit("kettle", "cup")
    stream.catch_up(promote=True)
    stream.generation = Generation("titles", 2, "abc")
    stream.catch_up(promote=True)
    consumer, position = stream.open()
    other = Titles(replace(stream.settings, state=f"{stream.settings.state}/other"), "other")
    for number in (1, 2, 3):
        with pytest.raises(Misconfigured, match="another name") as error:
            other.open(Generation("other", number, "abc"))
        assert error.value.code == "view-of-another"
    consumer.close()
    stream.generation = Generation("titles", 1, "abc")
    dropped, _ = stream.open()
    dropped.drop()
    dropped.close()
    stream.generation = Generation("titles", 2, "abc")
    consumer, position = stream.open()
    with pytest.raises(Misconfigured, match=r"titles\.g2 is of titles, not of other"):
        other.open(Generation("other", 1, "abc"))
    stream.commit("pot")
    (batch,) = stream.log.batches(position)
    consumer.apply(batch)
    consumer.close()
    assert stream.read() == {"0": "pot", "1": "cup"}


def test_a_drop_that_is_cut_short_is_ended_by_the_next_process(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is no generation any more; its number is free, for other code too."""
    stream.commit("kettle", "cup")
    stream.catch_up(promote=True)
    topics = Log(stream.settings).topics
    with monkeypatch.context() as late:
        late.setattr(Topics, "delete", _away)
        consumer, _ = stream.open()
        consumer.drop()
        consumer.close()
    assert (stream.read(), "titles.g1" in topics.names()) == (None, True)
    assert Titles(stream.settings, "titles").generations() == []
    assert "titles.g1" not in topics.names()
    stream.generation = Generation("titles", 1, "abd")
    stream.catch_up(promote=True)
    assert Titles(stream.settings, "titles").generations() == [replace(stream.generation, live=True)]
    assert stream.read() == {"0": "kettle", "1": "cup"}


def _away(*_args: object, **_how: object) -> None:
    raise Transient("kafka-away", "Kafka gave no answer.", "Check it.")


@pytest.mark.parametrize("name", ["titles--replay", "other--replay"])
def test_a_scratch_view_may_lie_beside_the_one_it_is_of(stream: Stream, name: str) -> None:
    stream.commit("kettle", "cup")
    stream.catch_up(promote=True)
    scratch = Titles(replace(stream.settings, state=f"{stream.settings.state}/scratch"), name)
    assert scratch.open(Generation(name, 1_000_000, "abd")) is None
    assert stream.open()[1] is not None
    scratch.close()
    assert stream.read() == {"0": "kettle", "1": "cup"}
