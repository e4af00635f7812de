"""`make soak KILLS=N`: more of tests/faults/test_kills.py, by hand, for as long as one likes.

Rounds of six kills, and of two of Postgres itself, each with a seed of its own and the check after it; the stack is that of the tests,
in a folder of its own. The first round that does not hold ends it: its seed repeats it by ``make soak KILLS=6 SEED=n``.

    python tests/soak.py KILLS [SEED]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROUND = 6
ROOT = Path(__file__).parents[1]


def main(kills: int, first: int) -> int:
    """Run rounds of kills until there were so many; return pytest's exit code."""
    rounds = -(-kills // ROUND)
    seeds = ",".join(str(first + number) for number in range(rounds))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-v", "-s", "tests/faults/test_kills.py"],
        cwd=ROOT,
        env=os.environ | {"SOAK_SEEDS": seeds},
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUND, int(sys.argv[2]) if len(sys.argv) > 2 else 1))
