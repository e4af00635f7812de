"""A topic that is deleted under a running capture, and perhaps made anew by somebody: capture stops, and writes on into no other topic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.control import Control, Report
from headrace.errors import HeadraceError, Misconfigured
from headrace.log import Log, kafka, writer
from headrace.log.plain import PlainWriter
from headrace.log.topics import ANSWERS, checkpoints_topic, schemas_topic
from headrace.settings import Settings
from headrace_capture.recovery import recover
from tests.fixtures.capture import Running, capturing, eventually, execute, prepare, replay, selected
from tests.integration.test_locked_tables import locked_late


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize(
    ("which", "anew", "busy"),
    [
        ("checkpoints", True, False),
        ("checkpoints", True, True),
        ("schemas", True, False),
        ("table", True, True),
        ("table", False, False),
        ("checkpoints", False, True),
    ],
)
def test_a_running_capture_stops(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, which: str, *, anew: bool, busy: bool
) -> None:
    monkeypatch.setattr(writer, "_COMMIT_SECONDS", 5)  # a cut that Kafka does not take is given up after them
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, n int)", "INSERT INTO items VALUES (1, 1)")
    log, source = Log(settings), settings.source
    names = {"checkpoints": checkpoints_topic(source), "schemas": schemas_topic(source)}
    topic = names.get(which, log.topic_of("public.items"))

    def looked() -> bool:
        return any(report.facts.get("catalogue") == "ok" for report in Control(log).reports().get("capture", []))

    running = Running(settings)
    try:
        running.eventually("it has looked", looked)
        execute(settings, "INSERT INTO items SELECT i, i FROM generate_series(2, 100) i")
        running.reach()
        log.topics.delete([topic], wait=True)
        if anew:
            log.topics.make({topic: (1, {})})
        if busy:
            execute(settings, "INSERT INTO items VALUES (1000, 1)")
        eventually("it stops", lambda: running.error)
    finally:
        running.stop()
    error = running.error
    assert isinstance(error, HeadraceError)
    assert error.exit_code == 3
    assert error.code in ({"topic-replaced"} if anew else {"topic-missing", "checkpoints-missing"})
    assert anew is False or topic in error.message


@pytest.mark.parametrize("which", ["table", "checkpoints", "schemas"])
def test_an_initial_snapshot_ends_in_no_state_when_a_topic_was_made_anew_meanwhile(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    settings = replace(settings, cut_records=10)
    prepare(
        settings,
        "CREATE TABLE items (id int PRIMARY KEY, n int)",
        "CREATE TABLE others (id int PRIMARY KEY, n int)",
        "INSERT INTO items SELECT i, i FROM generate_series(1, 100) i; INSERT INTO others VALUES (1, 1)",
    )
    log, source = Log(settings), settings.source
    names = {"checkpoints": checkpoints_topic(source), "schemas": schemas_topic(source)}
    topic = names.get(which, log.topic_of("public.items"))
    with locked_late(settings, "public.others", monkeypatch) as release:
        running = Running(settings)
        try:
            running.hear("snapshot of public.items: 100 rows")
            running.eventually("they are in the log", lambda: sum(log.ends("public.items")) >= 100)
            log.topics.delete([topic], wait=True)
            log.topics.make({topic: (1, {})})
            release()
            eventually("it stops", lambda: running.error)
        finally:
            running.stop()
    error = running.error
    assert isinstance(error, HeadraceError)
    assert (error.code, topic in error.message) == ("topic-replaced", True)
    assert log.newest_checkpoint(complete=True) is None
    recover(settings, running.said.append)
    with capturing(settings) as again:
        again.hear("the initial snapshot is complete")
        again.reach()
    for table in ("items", "others"):
        assert replay(settings, f"public.{table}") == selected(settings, table)


def test_a_topic_that_all_share_is_made_by_the_next_start_and_no_table_is_read_again_for_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = kafka._common(settings)
    # librdkafka looks for a topic for half a minute otherwise.
    monkeypatch.setattr(kafka, "_common", lambda _settings: common | {"topic.metadata.propagation.max.ms": 1000})
    log = Log(settings)
    log.ensure_spine()
    control = Control(log)
    control.report(Report("plain", 1, live=True, phase="live"))
    control.flush()
    plain = PlainWriter(settings)
    plain.write(ANSWERS, b"1", b"{}")
    log.topics.delete([ANSWERS], wait=True)
    try:
        with pytest.raises(Misconfigured) as asked:
            list(control.scan("plain"))
        with pytest.raises(Misconfigured) as written:
            plain.write(ANSWERS, b"1", b"{}", seconds=90)
    finally:
        log.ensure_spine()
    for error in (asked.value, written.value):
        assert error.code == "topic-missing"
        assert "--recover" not in error.remedy
        assert "headrace run NAME" in error.remedy
