"""Since when the log is not up to date, as capture says it."""

from __future__ import annotations

from headrace_capture.progress import Written

HOUR = 3_600_000


def test_a_capture_that_was_off_for_an_hour_is_an_hour_behind_until_it_has_caught_up() -> None:
    written = Written()
    written.captured(100, 0 * HOUR + 1, HOUR)
    written.seen(900, HOUR + 1)
    assert written.lag(HOUR + 1) == (800, 3600.0)
    written.captured(500, HOUR - 60_000 + 1, HOUR)
    assert written.lag(HOUR + 1) == (400, 60.0)
    written.captured(900, HOUR, HOUR)
    assert written.lag(HOUR + 1) == (0, 0.0)


def test_the_first_commit_after_a_quiet_hour_is_not_an_hour_behind() -> None:
    written = Written()
    written.captured(100, 1, 1)
    written.seen(100, HOUR)
    written.seen(150, HOUR + 2000)
    assert written.lag(HOUR + 3000) == (50, 3.0)


def test_a_source_whose_clock_was_an_hour_ahead_hides_no_lag() -> None:
    written = Written()
    written.captured(100, 2 * HOUR, HOUR)
    written.seen(900, HOUR + 1000)
    assert written.lag(HOUR + 60_000) == (800, 60.0)


def test_before_the_first_checkpoint_nothing_is_known_to_be_missing() -> None:
    written = Written()
    written.seen(150, HOUR)
    assert written.lag(HOUR) == (150, 0.0)
