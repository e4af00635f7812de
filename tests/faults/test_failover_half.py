"""Another server than before (S2), and a log that ended amid a transaction or the initial snapshot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from headrace.change import Checkpoint
from headrace.log import CutWriter, Log
from headrace.settings import Settings
from tests.fixtures.capture import Running, capturing, eventually, execute, now, refused
from tests.fixtures.mortal import Died, Life, MortalLog
from tests.fixtures.pair import Pair, equal, mend, seen
from tests.fixtures.plain import Plain
from tests.fixtures.serving import serving


class HalfLog(MortalLog):
    """A log whose capture dies when the first cut with a part of a transaction, or of the initial snapshot, is there."""

    def __init__(self, settings: Settings) -> None:
        self._end = (life := Life()).end
        super().__init__(settings, life)

    def writer(self) -> CutWriter:
        writer = super().writer()
        seal = writer.seal

        def sealing(**named: Any) -> Checkpoint:
            sealed = seal(**named)
            if not sealed.complete and any(map(any, sealed.ends.values())):
                self._end()
            return sealed

        writer.seal = sealing  # type: ignore[method-assign]
        return writer


def captured_by_half(settings: Settings) -> Checkpoint:
    """Run capture until it dies; return its last checkpoint."""
    settings = replace(settings, cut_records=1000)
    running = Running(settings, HalfLog(settings))
    running.join()
    assert isinstance(running.error, Died), running.error

    def half() -> Checkpoint | None:
        newest = Log(settings).newest_checkpoint()
        return newest if newest and not newest.complete and any(map(any, newest.ends.values())) else None

    found: Checkpoint = eventually("it is seen", half)
    return found


BIG = "INSERT INTO items SELECT i, 0 FROM generate_series(200, 20000) i"


@pytest.mark.timeout(300)
def test_a_standby_that_lacks_a_transaction_of_which_the_log_has_a_half(pair: Pair) -> None:
    """It has all that is whole in the log, and its slot: the half is refused all the same, and taken back (S5)."""
    pair.copy(standby=True)
    with capturing(pair.settings) as capture:
        pair.sync_slot(capture)
    with seen(pair.settings) as view:
        pair.follow()
        pair.second.stop()
        execute(pair.settings, BIG)
        assert captured_by_half(pair.settings).partial
        pair.first.kill()
        pair.second.start()
        pair.promote()
        execute(pair.after, "UPDATE items SET n = 7 WHERE id = 7", "INSERT INTO items VALUES (100, 100)")
        mend(pair.after, "timeline-diverged", view)


@pytest.mark.timeout(300)
def test_a_restored_copy_has_overtaken_a_transaction_of_which_the_log_has_a_half(pair: Pair) -> None:
    """What it sends instead is not taken for the rest, nor for what comes before: it is refused as often as capture starts."""
    with capturing(pair.settings) as capture:
        capture.reach()
    pair.copy(standby=False)
    with seen(pair.settings) as view:
        execute(pair.settings, BIG)
        half = captured_by_half(pair.settings)
        assert half.partial
        pair.first.kill()
        pair.second.start()
        execute(pair.after, BIG.replace("20000", "5000"))
        while now(pair.after) <= half.partial[0]:
            execute(pair.after, "SELECT pg_switch_wal()", "CREATE TABLE IF NOT EXISTS other (id int)")
        execute(pair.after, "DROP TABLE other", "DELETE FROM items WHERE id = 7")
        assert refused(replace(pair.after, cut_records=1000)).code == "partial-missing"
        mend(pair.after, "partial-missing", view)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("chunked", [False, True], ids=["at once", "chunked"])
@pytest.mark.parametrize("promoted", [False, True], ids=["restored", "promoted"])
def test_an_initial_snapshot_starts_again_on_a_server_that_is_behind(
    pair: Pair, *, promoted: bool, chunked: bool
) -> None:
    """What the first attempt published has versions above all that the second server has; nothing of it stays (S6)."""
    pair.copy(standby=promoted, slots=False)
    with serving(pair.settings, plain=Plain):
        view = Plain(pair.settings, "plain")
        if promoted:
            pair.follow()
            pair.second.stop()
        execute(pair.settings, BIG, "UPDATE items SET n = -n", "DELETE FROM items WHERE id = 6")
        before = captured_by_half(pair.settings)
        assert before.snapshot == "running"
        pair.first.kill()
        pair.second.start()
        if promoted:
            pair.promote()
            while now(pair.after) <= before.version.lsn:  # only the timeline tells that it was behind
                execute(pair.after, "SELECT pg_switch_wal()", "UPDATE items SET n = 7 WHERE id = 7")
        execute(pair.after, "INSERT INTO items VALUES (100, 100)")
        with capturing(pair.after, chunked=chunked) as capture:
            capture.hear("streaming")
            assert not any("nothing was lost" in line for line in capture.said)
            execute(pair.after, "DELETE FROM items WHERE id = 8")
            equal(pair.after, capture, view)
        assert view.version(1).epoch == 2
