"""What the benchmark says follows from what was measured: ratios of pairs, their median, and whether a promise is kept."""

from __future__ import annotations

from bench import report
from bench.measure import Run
from bench.parts import Part


def _run(kind: str, net: float, *, cpu: float = 1.0, peak: int = 50_000_000) -> Run:
    return Run(kind, 1000, net=net, from_start=net / 2, seconds=1.0, cpu=cpu, peak=peak)


def _part(*nets: tuple[float, float]) -> Part:
    pairs = [(_run("headrace", ours), _run("Debezium", theirs, cpu=10.0)) for ours, theirs in nets]
    again = [_run("headrace", 110.0), _run("headrace", 100.0)]
    return Part("single", again, list(pairs), [_run("pg_recvlogical", 125.0)] * (2 + len(nets)))


def _told(part: Part) -> dict[str, report.Ratio]:
    return {ratio.of: ratio for ratio in report.ratios(part)}


def test_a_ratio_is_the_median_of_the_pairs() -> None:
    found = _told(_part((100.0, 50.0), (100.0, 20.0), (100.0, 10.0)))["headrace / Debezium, net rate"]
    assert (found.value, found.low, found.high, found.met) == (5.0, 2.0, 10.0, True)


def test_what_is_not_reached_is_said() -> None:
    told = _told(_part((100.0, 50.0)))
    assert "NOT MET" in told["headrace / Debezium, net rate"].told()
    assert "NOT MET" not in told["headrace / Debezium, CPU seconds"].told()


def test_headrace_against_itself_comes_first() -> None:
    first = next(report.ratios(_part((100.0, 50.0))))
    assert (first.of, first.value) == ("headrace / headrace, net", 1.1)


def test_each_backlog_of_ours_is_held_against_the_limit_of_that_backlog() -> None:
    part = _part((100.0, 50.0))
    part.limits[:] = [_run("pg_recvlogical", net) for net in (220.0, 200.0, 200.0)]
    assert _told(part)["headrace / pg_recvlogical, net rate"].value == 0.5


def test_without_debezium_nothing_is_said_of_it() -> None:
    part = Part("latency", pairs=[(Run("headrace", 10, p50=9.0, p99=60.0, peak=10),)])
    assert [(of, ratio.met) for of, ratio in _told(part).items()] == [
        ("headrace, peak memory in MB", True),
        ("headrace, p50 in ms", True),
        ("headrace, p99 in ms", False),
    ]


def test_the_page_has_a_row_for_each_tool_and_the_conditions() -> None:
    page = report.page([_part((100.0, 50.0))], {"machine": "two cores"})
    assert "| headrace | 3 | 1,000 | 100 | 50 | 1.0 | 50 |" in page
    assert "| Debezium | 1 | 1,000 | 50 | 25 | 10.0 | 50 |" in page
    assert "- machine: two cores" in page
