"""What a measured program used is seen, its children's share too, and its end is never taken for a result."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from bench.program import Program
from headrace.errors import Transient

BURN = """
import sys, time
held = b"x" * 80_000_000
while time.process_time() < 0.4: pass
print("burnt", flush=True)
time.sleep(60)
"""
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURN!r}])"


@pytest.mark.parametrize("text", [BURN, PARENT], ids=["itself", "its child"])
def test_processor_and_memory_are_those_of_the_whole_family(tmp_path: Path, text: str) -> None:
    program = Program("burn", [sys.executable, "-c", text], tmp_path, {})
    try:
        while "burnt" not in program.said():
            program.check()
            time.sleep(0.05)
        time.sleep(0.6)  # the family is looked for twice a second
        assert 0.35 <= program.cpu() < 2.0
        assert 80_000_000 < program.peak() < 200_000_000
    finally:
        program.stop()


def test_a_program_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    program = Program("short", [sys.executable, "-c", "print('no such slot'); raise SystemExit(3)"], tmp_path, {})
    with pytest.raises(Transient, match="exit code 3") as caught:
        program.wait(30)
    assert "no such slot" in caught.value.message
