"""`make soak KILLS=N`: more of tests/faults/test_kills.py, by hand, for as long as one likes, and ten rebuilds of test_generations.py.

Rounds of eight kills of capture, the broker and Postgres, drawn at random, each round with a seed of its own, a new source and the
same servers, those of the tests in a folder of their own. A kill counts only when changes were committed before it that the log had not,
and others came after it; after each one Kafka's own console consumer must see every committed change once. In every eighth round
everything is killed besides, the views' processes too, and each view is compared with Postgres. The first round that does not hold ends it:
its seed repeats it by ``make soak KILLS=8 SEED=n``. The last line counts the kills.

    python tests/soak.py KILLS [SEED]
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

ROUND = 8
REBUILDS = 10
ROOT = Path(__file__).parents[1]


class Tally:
    """Counts the kills after which the log was exact, by what was killed: a plugin of pytest."""

    def __init__(self) -> None:
        self.kills: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add the kills of a test that has run."""
        if report.when == "call":
            self.kills.update(str(value) for name, value in report.user_properties if name == "kill")

    def told(self) -> str:
        """Return them in one line."""
        each = ", ".join(f"{count} {victim}" for victim, count in sorted(self.kills.items()))
        return f"{self.kills.total()} kills: {each}; after each of them the log was exact"


def main(kills: int, first: int) -> int:
    """Run rounds of kills until there were so many; return pytest's exit code."""
    rounds = -(-kills // ROUND)
    os.environ["SOAK_SEEDS"] = ",".join(str(first + number) for number in range(rounds))
    os.environ["SOAK_ROUND"] = str(ROUND)
    os.environ["SOAK_REBUILDS"] = str(REBUILDS)
    os.chdir(ROOT)
    tally = Tally()
    code = pytest.main(
        ["-x", "-v", "-s", "tests/faults/test_generations.py", "tests/faults/test_kills.py"], plugins=[tally]
    )
    sys.stdout.write(f"{tally.told()}{', until a round did not hold' if code else ''}\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUND, int(sys.argv[2]) if len(sys.argv) > 2 else 1))
