"""`make soak MINUTES=60`: more of tests/faults, by hand, for as long as one likes: everything at once, seed after seed.

A round has a seed, a new source, and the same servers, those of the tests in a folder of their own. For each seed there are two: of
test_everything.py, which kills, pauses, rebuilds and parks whatever there is, and of test_kills.py, which reads the whole log by Kafka's
own console consumer after each kill of what stands before it. After the first seed come the rebuilds of test_generations.py, readers
polling. When the time is over a round that has begun is ended, and rounds of test_kills.py go on until the kills that the log was read
after are 200 for each hour. The first round that does not hold ends it: `SEED=n` begins with that seed. The last lines count by what was
killed, paused, rebuilt, parked and read again. A run of an hour or more that held, with all its kills, writes them to bench/soak.md.

    python tests/soak.py [MINUTES [SEED]]
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from bench import report
from headrace_ops import artifacts

STEPS, KILLS, REBUILDS = 12, 40, 10
"""Of a round."""
KILLS_AN_HOUR = 200
"""Of capture, broker or Postgres, with changes that are not in the log before and more after it, each with the log read as a whole."""
KILLING = "test_kills"
FILES = ("test_everything", KILLING, "test_generations")
ROOT = Path(__file__).parents[1]
CONDITIONS = ("when", "commit", "machine", "load when it began", "Java")
PAGE = ROOT / "bench" / "soak.md"
COUNTED = {
    "kill": "kills",
    "pause": "pauses",
    "rebuild": "rebuilds",
    "park": "records parked",
    "reread": "times tables read again",
}


class Soak:
    """Goes on for so long, and counts what was done by tests that held: a plugin of pytest."""

    def __init__(self, minutes: float) -> None:
        self.until = time.monotonic() + 60 * minutes
        self.wanted = KILLS_AN_HOUR * minutes / 60
        self.read = 0
        self.rounds = 0
        self.done: dict[str, Counter[str]] = {what: Counter() for what in COUNTED}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Go seed by seed; what has none comes after the first."""
        seeds = [item.callspec.params.get("seed") if hasattr(item, "callspec") else None for item in items]
        first = min(seed for seed in seeds if seed is not None)
        order = sorted(range(len(items)), key=lambda at: first if seeds[at] is None else seeds[at])
        items[:] = [items[at] for at in order]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Leave out what would begin too late."""
        missing = self.read < self.wanted and item.path.stem == KILLING
        return None if missing or time.monotonic() < self.until else True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count what a test has done."""
        if report.when == "call" and report.passed:
            self.rounds += 1
            for what, value in report.user_properties:
                self.done[what][str(value)] += 1
                self.read += KILLING in report.nodeid

    def told(self, *, held: bool) -> list[str]:
        """Return all that in a few lines."""
        lines = [f"{self.rounds} rounds held{'' if held else ', the next one did not'}; in them were:"]
        lines.append(f"{self.read} kills with the whole log read after each, wanted {self.wanted:.0f}")
        for what, name in COUNTED.items():
            each = ", ".join(f"{count} {which}" for which, count in sorted(self.done[what].items()))
            lines.append(f"{self.done[what].total()} {name}: {each}")
        return lines


def page(told: list[str], conditions: dict[str, str]) -> str:
    """Return soak.md."""
    lines = [
        "# Soak",
        "",
        "Written by `make soak` after a run of an hour or more that held; what a round is stands in tests/soak.py.",
        "",
    ]
    lines += [*(f"- {line}" for line in told), "", "## Conditions", ""]
    return "\n".join([*lines, *(f"- {name}: {what}" for name, what in conditions.items())]) + "\n"


def main(minutes: float, first: int) -> int:
    """Run rounds until the time is over; return pytest's exit code."""
    begun = time.monotonic()
    os.environ |= {"SEEDS": f"{first}-{first + 2 * int(minutes) + 1}"}
    os.environ |= {"STEPS": str(STEPS), "KILLS": str(KILLS), "REBUILDS": str(REBUILDS)}
    os.chdir(ROOT)
    soak = Soak(minutes)
    conditions = {name: what for name, what in report.surroundings("").items() if name in CONDITIONS}
    conditions["servers"] = ", ".join(
        each.name for each in (artifacts.POSTGRES, artifacts.KAFKA, artifacts.ELASTICSEARCH)
    )
    code = pytest.main(["-x", "-v", "-s", *(f"tests/faults/{name}.py" for name in FILES)], plugins=[soak])
    told = soak.told(held=not code)
    sys.stdout.write("\n".join(told) + "\n")
    if not code and minutes >= 60 and soak.read >= soak.wanted:
        conditions |= {"seeds": f"from {first}", "it took": f"{(time.monotonic() - begun) / 60:.0f} minutes"}
        PAGE.write_text(page(told, conditions))
    return int(code)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 60, int(sys.argv[2]) if len(sys.argv) > 2 else 1))
