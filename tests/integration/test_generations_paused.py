"""Views that are paused: readable and still, over restarts, and not for ever."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import ClassVar

import pytest

from headrace.consumer import Batch
from headrace.errors import Transient
from headrace.runner import generations
from headrace.settings import Settings
from tests.fixtures.capture import eventually
from tests.fixtures.feed import ITEMS, Feed
from tests.fixtures.generations import KEY, await_phase, await_version, build, command, report
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, serving


def test_a_paused_view_is_readable_and_still_also_after_a_restart(feed: Feed, settings: Settings) -> None:
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        assert command(settings, "pause", "plain").exit_code == 0
        feed.cut((ITEMS, 1, 2))
        await_phase(control, "plain", 1, "paused")
        assert [row.value["n"] for row in control.scan("plain")] == [1]
        assert "headrace resume plain" in command(settings, "rebuild", "plain").exception.remedy
    with serving(settings, plain=Plain) as control:
        await_phase(control, "plain", 1, "paused")
        checked = command(settings, "status", "plain", "--check")
        assert checked.exit_code == 1
        assert "paused for 168 hours" in checked.stdout
        assert view.rows() == {KEY: 1}
        assert command(settings, "resume", "plain").exit_code == 0
        eventually("it goes on", lambda: view.rows() == {KEY: 2})
        await_phase(control, "plain", 1, "live")
    with serving(settings, plain=Plain) as control:
        feed.cut((ITEMS, 1, 3))
        eventually("it still goes on", lambda: view.rows() == {KEY: 3})


class Stuck(Plain):
    """Its first generation applies nothing while `may` is not set, and says by `waits` that something has come. `late`: it waits first."""

    may: ClassVar[threading.Event] = threading.Event()
    waits: ClassVar[threading.Event] = threading.Event()
    late: ClassVar[threading.Event] = threading.Event()

    def apply(self, batch: Batch) -> None:
        if self._number == 1 and self.late.is_set() and batch.changes:
            self.late.clear()
            raise Transient("plain-away", "Its store is away.", "Wait.")
        if self._number == 1 and not self.may.is_set():
            self.waits.set()
            self.may.wait(60)
        super().apply(batch)


@pytest.mark.parametrize("waited", [False, True])
def test_all_generations_of_a_view_stand_when_one_was_too_busy_to_be_paused_at_once(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch, waited: bool
) -> None:
    """Also one that has waited until just now, and says so yet."""
    Stuck.may.set()
    Stuck.waits.clear()
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Stuck) as control:
        await_live(control, "plain")
        build(control, 2)
        Stuck.may.clear()
        if waited:
            Stuck.late.set()
        feed.cut((ITEMS, 1, 2))
        assert Stuck.waits.wait(30)
        monkeypatch.setattr(generations, "CALL_SECONDS", 1.0)
        monkeypatch.setattr(generations, "_STATE_SECONDS", 1.0)
        with pytest.raises(Transient, match="plain is recorded as paused, and stands as soon as that is over") as busy:
            control.ask("plain", "pause")
        assert busy.value.code == "worker-busy"
        await_phase(control, "plain", 2, "paused")
        Stuck.may.set()
        await_phase(control, "plain", 1, "paused")
        control.ask("plain", "resume")
        last = feed.cut((ITEMS, 1, 3))
        await_version(control, "plain", last.version)


def test_a_view_that_was_paused_for_longer_than_tombstones_stay_is_refused(feed: Feed, settings: Settings) -> None:
    """S19."""
    settings = replace(settings, delete_retention_ms=2000)
    cut = feed.cut((ITEMS, 1, 1))
    began = time.time()
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        control.ask("plain", "pause")
        gone = feed.cut((ITEMS, 1, None))
        eventually("it is shown", lambda: getattr(feed.log.newest_checkpoint(), "version", None) == gone.version)
        eventually("its last state is that old", lambda: time.time() > began + 2.5)
        control.ask("plain", "resume")
        assert await_phase(control, "plain", 1, "stopped").code == "away-too-long"
        assert report(control, "plain", 1).version == cut.version
        assert control.ask("plain", "rebuild") == {"generation": 2}
