"""Too many parked, what can be neither parked nor told whole, and what a consumer holds back itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.change import Version
from headrace.consumer import Batch
from headrace.errors import Misconfigured, Poison
from headrace.parked import Shelf
from headrace.settings import Settings
from tests.fixtures.capture import eventually
from tests.fixtures.feed import ITEMS, TAGS, Feed
from tests.fixtures.parked import Picky, forbid
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, serving
from tests.fixtures.shelf import ONE, THREE, TWO, Beside, await_parked, command, parked, report, told


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Of three partitions a table the rows 1 and 3 are in the first, 2 is in the second."""
    return replace(settings, partitions=3)


def test_above_the_limit_the_consumer_stops_and_says_what_to_run(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)
    few = replace(settings, parked_limit=2)
    with serving(few, picky=Picky, beside=Beside) as control:
        await_live(control, "picky")
        feed.cut((ITEMS, 2, 13), (ITEMS, 3, 13))
        await_parked(control, "picky", 2)
        feed.cut((ITEMS, 1, 11), (ITEMS, 2, 14))
        eventually("it stops", lambda: report(control, "picky").phase == "stopped")
        said = report(control, "picky")
        assert said.code == "too-many-parked"
        assert f"--all --generation {said.generation}" in said.remedy
        assert "headrace parked list picky" in said.remedy
        assert Plain(settings, "picky").rows() == {ONE: 10}, "nothing of that batch was applied"
    forbid(settings)
    with serving(settings, picky=Picky) as control:  # more are allowed
        await_parked(control, "picky", 3)
        eventually("it stands at a state", lambda: control.ask("picky", "retry")["done"])
    assert Plain(settings, "picky").rows() == {ONE: 11, TWO: 14, THREE: 13}


def test_with_a_limit_of_0_the_first_one_stops_the_consumer(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)
    with serving(replace(settings, parked_limit=0), picky=Picky, beside=Beside) as control:
        await_live(control, "picky")
        feed.cut((ITEMS, 2, 13))
        eventually("it stops", lambda: report(control, "picky").phase == "stopped")
        said = report(control, "picky")
        assert (said.code, said.facts.keys()) == ("unlucky", {"reads", "written_ms"})
        assert f"See {ITEMS} partition 1 offset" in said.reason
    assert parked(settings, "picky") == []


class Wrong(Picky):
    """Names another key than is in the batch."""

    def apply(self, batch: Batch) -> None:
        try:
            super().apply(batch)
        except Poison as error:
            raise Poison(error.code, error.message, cursor=(TAGS, "nothing")) from error


def test_a_consumer_that_names_what_is_not_in_its_batch_stops(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)
    with serving(settings, wrong=Wrong, beside=Beside) as control:
        await_live(control, "wrong")
        feed.cut((ITEMS, 2, 13))
        eventually("it stops", lambda: report(control, "wrong").phase == "stopped")
        assert report(control, "wrong").code == "unlucky"
    assert parked(settings, "wrong") == []


class Delayed(Plain):
    """Says that it has not shown everything."""

    waits: Version | None = None

    def pending(self) -> Version | None:
        return type(self).waits


def test_what_a_consumer_delays_holds_tokens_back(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = feed.cut((ITEMS, 1, 10))
    with serving(settings, delayed=Delayed) as control:
        await_live(control, "delayed")
        monkeypatch.setattr(Delayed, "waits", first.version)
        held = Version(1, first.version.lsn - 1)
        eventually("it is held back", lambda: report(control, "delayed").version == held)
        monkeypatch.setattr(Delayed, "waits", None)
        eventually("it is not", lambda: report(control, "delayed").version == first.version)


def test_a_body_that_is_too_large_is_cut_and_says_so(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)
    with serving(replace(settings, message_max_bytes=300), picky=Picky) as control:
        await_live(control, "picky")
        feed.cut((ITEMS, 2, 13))
        await_parked(control, "picky", 1)
        (entry,) = told(settings, "parked", "show", "picky", TWO)
        assert (entry["cut"], entry["body"][:8]) == (True, '{"table"')
        forbid(settings)
        with pytest.raises(Misconfigured) as cut:
            control.ask("picky", "retry")
        assert cut.value.code == "parked-body-cut"
        assert f"headrace parked drop picky --generation 1 --collection {ITEMS} '{TWO}'" in cut.value.remedy


def test_a_retry_of_all_leaves_what_is_cut_and_does_the_rest(feed: Feed, settings: Settings) -> None:
    wide = "x" * 4_000
    feed.cut((ITEMS, 1, 10), (ITEMS, 2, 20))
    forbid(settings, 13, wide)
    with serving(replace(settings, message_max_bytes=3_000), picky=Picky) as control:
        await_live(control, "picky")
        feed.cut((ITEMS, 2, wide), (ITEMS, 3, 13))
        feed.cut((ITEMS, 2, 14))
        await_parked(control, "picky", 3)
        assert [entry.cut for entry in Shelf(feed.log).entries("picky")] == [True, False, False]
        reasons = [entry.reason for entry in Shelf(feed.log).entries("picky")]
        forbid(settings)
        answer = told(settings, "parked", "retry", "picky", "--all", code=1)
        (left,) = answer["left"]
        assert (answer["done"], left["key"], left["code"]) == ([[ITEMS, THREE]], TWO, "parked-body-cut")
        assert Plain(settings, "picky").rows() == {ONE: 10, TWO: 20, THREE: 13}
        assert [entry.reason for entry in Shelf(feed.log).entries("picky")] == reasons[:2], "why it was parked is kept"
        said = command(settings, "parked", "retry", "picky", "--all")
        assert said.exception.code == "parked-body-cut", "it is all that is left"  # type: ignore[union-attr]
        command(settings, "parked", "drop", "picky", "--all", "--yes")
        feed.cut((ITEMS, 2, 15))
        eventually("the row comes again", lambda: Plain(settings, "picky").rows() == {ONE: 10, TWO: 15, THREE: 13})


class Wordy(Picky):
    """Quotes far too much."""

    def apply(self, batch: Batch) -> None:
        try:
            super().apply(batch)
        except Poison as error:
            raise Poison(error.code, f"{error.message} {'x' * 20_000_000} the end", cursor=error.cursor) from error


def test_a_huge_reason_is_cut_and_no_entry_or_report_is_too_large_for_it(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)
    with serving(replace(settings, parked_limit=1), wordy=Wordy, beside=Beside) as control:
        await_live(control, "wordy")
        feed.cut((ITEMS, 2, 13))
        await_parked(control, "wordy", 1)
        (entry,) = Shelf(feed.log).entries("wordy")
        assert (entry.reason.startswith(f"{TWO} has 13. xxx"), entry.reason.endswith("xxx the end")) == (True, True)
        assert (len(entry.reason) < 20_000, entry.cut, entry.change().row) == (True, False, {"id": 2, "n": 13})
        feed.cut((ITEMS, 3, 13))
        eventually("it stops and says so", lambda: report(control, "wordy").code == "too-many-parked")


class Many(Wordy):
    """Counts rows of very many collections."""

    def count(self) -> dict[str, int]:
        return {f"public.items{number}": 1 for number in range(100_000)}


def test_an_answer_that_kafka_does_not_take_is_refused_and_the_process_goes_on(feed: Feed, settings: Settings) -> None:
    """Its request must not be read again at the next start, either."""
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)
    small = replace(settings, parked_limit=200, message_max_bytes=100_000)
    with serving(small, wordy=Many) as control:
        await_live(control, "wordy")
        feed.cut(*((ITEMS, number, 13) for number in range(100, 250)))
        await_parked(control, "wordy", 150)
        answer = control.ask("wordy", "retry", timeout=60)
        assert {(len(each["reason"]) < 500, each["reason"].endswith("…")) for each in answer["left"]} == {(True, True)}
        with pytest.raises(Misconfigured) as error:
            control.counts("wordy", 1, timeout=60)
        assert error.value.code == "record-too-large"
        assert control.ask("wordy", "release") == {}
