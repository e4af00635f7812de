"""`headrace status` of views that hang, or cannot be promoted, or that no heartbeat reaches."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from typing import ClassVar

import orjson
import pytest

from headrace.change import Position
from headrace.consumer import Batch, Generation
from headrace.errors import Misconfigured
from headrace.settings import Settings
from tests.fixtures.capture import capturing, eventually, prepare, refused
from tests.fixtures.feed import ITEMS, Feed
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, serving
from tests.fixtures.slots import drop_slot
from tests.fixtures.statuses import status


class Hangs(Plain):
    """Applies nothing beyond its first state while it may not."""

    may: ClassVar[threading.Event] = threading.Event()

    def apply(self, batch: Batch) -> None:
        if not batch.loading:
            self.may.wait(60)
        super().apply(batch)


def test_a_view_whose_apply_hangs_is_behind_and_more_so_each_second(settings: Settings) -> None:
    Hangs.may.clear()
    feed = Feed(settings)
    feed.cut((ITEMS, 1, 1))
    asked = ("--check", "plain", "--max-lag", "1s")
    with serving(settings, plain=Hangs) as control:
        await_live(control, "plain")
        assert status(settings, *asked).stdout == "ok\n"
        feed.cut((ITEMS, 1, 2))
        try:
            eventually("it is behind", lambda: status(settings, *asked).exit_code == 1, 40)
            assert status(settings, *asked).stdout.startswith("plain: ")
            assert " behind (" in status(settings, *asked).stdout
        finally:
            Hangs.may.set()
        eventually("it is up to date again", lambda: status(settings, *asked).stdout == "ok\n")


class Opens(Plain):
    """Is not opened while it may not."""

    may: ClassVar[threading.Event] = threading.Event()

    def open(self, generation: Generation) -> Position | None:
        self.may.wait(60)
        return super().open(generation)


def test_a_view_whose_store_hangs_when_it_is_opened_is_behind(settings: Settings) -> None:
    """Its process reports, and has not read yet how far it is."""
    Opens.may.set()
    Feed(settings).cut((ITEMS, 1, 1))
    with serving(settings, plain=Opens) as control:
        await_live(control, "plain")
    Opens.may.clear()
    asked = ("--check", "plain", "--max-lag", "1s")
    with serving(settings, plain=Opens):
        try:
            eventually(
                "it is behind", lambda: " behind (" in (told := status(settings, *asked)).stdout and told.exit_code, 15
            )
        finally:
            Opens.may.set()
        eventually("it is up to date", lambda: status(settings, *asked).stdout == "ok\n")


class Unpromoted(Plain):
    """Its pointer cannot be moved while `taken` is set."""

    taken = True

    def promote(self) -> None:
        if self.taken:
            raise Misconfigured("name-taken", "There is an index of that name.", "Remove it.")
        super().promote()


def test_a_first_build_that_cannot_be_promoted_says_why_and_fails_the_check(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    Feed(settings).cut((ITEMS, 1, 1))
    with serving(settings, plain=Unpromoted) as control:
        eventually("it says why", lambda: any(each.code for each in control.reports().get("plain", [])))
        (said,) = control.reports()["plain"]
        assert (said.phase, said.live, said.code) == ("following", False, "name-taken")
        assert (said.reason, said.remedy) == ("There is an index of that name.", "Remove it.")
        ended = status(settings, "--check", "plain")
        assert ended.exit_code == 1
        assert ended.stdout == "plain: following: There is an index of that name. Remove it.\n"
        monkeypatch.setattr(Unpromoted, "taken", False)
        eventually("it is live", lambda: control.reports()["plain"][0].phase == "live")
        assert control.reports()["plain"][0].code == ""
        assert status(settings, "--check", "plain").stdout == "ok\n"


class Anew(Unpromoted):
    """It applies while it may."""

    may: ClassVar[threading.Event] = threading.Event()

    def apply(self, batch: Batch) -> None:
        self.may.wait(60)
        super().apply(batch)


def test_why_a_build_could_not_be_promoted_is_not_said_of_the_next_one_of_its_number(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    Anew.may.set()
    Feed(settings).cut((ITEMS, 1, 1))
    with serving(settings, plain=Anew) as control:
        eventually("it says why", lambda: any(each.code for each in control.reports().get("plain", [])))
        Anew.may.clear()
        try:
            assert control.ask("plain", "drop", {"generation": 1}) == {"dropped": [1]}
            begun = {"starting", "loading"}
            (said,) = eventually(
                "it is begun anew",
                lambda: [said for said in control.reports().get("plain", []) if said.phase in begun],
            )
            assert (said.generation, said.code, said.reason) == (1, "", "")
            monkeypatch.setattr(Unpromoted, "taken", False)
        finally:
            Anew.may.set()
        eventually("it is live", lambda: [said.phase for said in control.reports()["plain"]] == ["live"])


def test_a_view_that_no_heartbeat_reaches_is_wrong_by_its_own_check(settings: Settings) -> None:
    """S17: what is shown may be the newest that the log has, and an hour old."""
    settings = replace(settings, heartbeat_ms=100)
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, n int)")
    asked = ("--check", "plain", "--max-lag", "2s")
    with serving(settings, plain=Plain) as control:
        with capturing(settings) as capture:
            capture.reach()
            await_live(control, "plain")
            capture.eventually(
                "it says how often it beats", lambda: control.reports()["capture"][0].facts.get("heartbeat_ms")
            )
            capture.eventually("all is well", lambda: status(settings, *asked).stdout == "ok\n")
        eventually("no heartbeat comes", lambda: status(settings, *asked).exit_code == 1, 40)
        assert status(settings, *asked).stdout.startswith("plain: ")
        assert "see: headrace status" in status(settings, *asked).stdout
        assert re.search(r"plain: shows a state .* old, no heartbeat", status(settings, "--max-lag", "2s").stdout)
        assert "no heartbeat" not in status(settings, "--max-lag", "1h").stdout
        (said,) = orjson.loads(status(settings, "--json").stdout)["consumers"]["plain"]
        assert said["shows_seconds"] > 2
        drop_slot(settings)
        assert refused(settings).code == "slot-missing"
        assert "no heartbeat" in status(settings, *asked).stdout, (
            "who was started again and refused has not beaten either"
        )
