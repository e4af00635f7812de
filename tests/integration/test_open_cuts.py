"""Control is shared, by sources and versions: what one capture has committed is not shown while another source's cut is open (S3)."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from headrace.control import Control, record_key
from headrace.log import Log, kafka
from headrace.log.topics import CONTROL
from headrace.settings import Settings
from headrace_capture import jobs
from headrace_capture.jobs import Job, Jobs
from tests.fixtures.capture import capturing, execute, prepare, replay, rows, selected

T = "public.items"


def test_what_a_newer_version_adds_to_a_job_is_passed_over(settings: Settings) -> None:
    log = Log(settings)
    log.ensure_spine()
    told = asdict(Job(T, phase="failed")) | {"newer": 1, "log": Jobs(log)._log_id}
    Control(log).keep("capture", "resnapshot", told, T)
    assert Jobs(log).all == {T: Job(T, phase="failed")}


def test_capture_begins_with_all_that_it_has_committed_though_another_ones_cut_is_open(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went by older fingerprints, and without its jobs: tables were read again in vain, and what was under way was forgotten."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, no int)", "INSERT INTO items VALUES (1, 1)")
    other = kafka.producer(
        settings, **{"transactional.id": f"{settings.source}-other", "transaction.timeout.ms": 600_000}
    )
    other.init_transactions(30)
    with capturing(settings) as capture:
        capture.hear("streaming")
        other.begin_transaction()
        other.produce(CONTROL, None, record_key("other", "capture", "resnapshot", "t"))
        other.flush(30)
        execute(settings, "ALTER TABLE items ALTER COLUMN no TYPE text USING 'was ' || no")
        capture.hear("items was read again")
        capture.reach()
    monkeypatch.setattr(jobs, "_TELL_SECONDS", 0.0)
    with capturing(settings) as capture:  # and it hears that it is to stop, and holds no Postgres up (S15)
        capture.hear("waiting for headrace.control")
        assert rows(settings, f"SELECT active FROM pg_replication_slots WHERE slot_name = '{settings.slot}'") == [
            (False,)
        ]
    assert not any("streaming" in line or "inexact" in line for line in capture.said)
    other.abort_transaction(30)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "INSERT INTO items VALUES (2, 'two')")
        capture.reach()
    assert replay(settings, T) == selected(settings, T)
    assert not any("inexact" in line for line in capture.said)
