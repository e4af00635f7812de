"""Two accidents, made deterministic, through both ways of writing.

A race: two editors of one price. A commits, B commits, B writes the other stores, A writes the other stores. Postgres
keeps B's price; whoever wrote every store itself now shows A's.

A death: a process commits a price and is killed, by SIGKILL, before its next write. What it had not written, nobody
will.

Writing through the log, each editor's write has one step, so there is nothing to interleave and nothing to leave
undone.

DuckDB admits one process, so the race is one process, the death another, and who compares opens the stores afterwards.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from random import Random
from typing import Any

import typer

from headrace.errors import Misconfigured
from headrace.settings import Settings
from headrace_shop import database
from headrace_shop.database import Connection
from headrace_shop.dual import DualWrites
from headrace_shop.edits import SetPrice
from headrace_shop.writes import LogWrites, Writes

Say = Callable[[str], None]
_BY_HAND = "Run it by hand."
_TWO = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens to which products: the prices that A and B give, and the price of the process that dies."""

    raced: int
    price_a: Decimal
    price_b: Decimal
    orphaned: int
    price_c: Decimal


def plan(connection: Connection, seed: int) -> Plan:
    """Choose two products, and new prices for them, each other than the present one. Raises Misconfigured: `shop-empty`."""
    products = connection.execute("SELECT id, price FROM products ORDER BY id LIMIT 1000").fetchall()
    if len(products) < _TWO:
        raise Misconfigured("shop-empty", "The shop has fewer than two products.", "Run `headrace shop load`.")
    random = Random(f"replay {seed}")
    (raced, price), (orphaned, other) = random.sample(products, _TWO)
    a, b = random.sample(range(1, 10), 2)
    return Plan(raced, price + a, price + b, orphaned, other + random.randint(1, 9))


def replay(settings: Settings, dsn: str, mode: str, seed: int, say: Say) -> dict[str, tuple[int, int]]:
    """Replay both accidents; return (rows, differing rows) of each of the dual writer's views, nothing for ``log``."""
    command = ["shop", "replay", "--writes", mode, "--seed", str(seed), "--part"]
    for line in _lines([*command, "race"], dsn):
        say(line)
    die([*command, "death"], say, dsn)
    if mode == "log":
        return {}
    with closing(DualWrites(settings, dsn)) as writes:
        return writes.compare()


def play_race(settings: Settings, dsn: str, mode: str, seed: int) -> None:
    """Let two editors race; the dual writer's stores are filled first."""
    chosen = _plan(dsn, seed)
    first, second = SetPrice(chosen.raced, chosen.price_a), SetPrice(chosen.raced, chosen.price_b)
    if mode == "log":
        with closing(LogWrites(dsn)) as writes:
            race(_steps(writes, first), _steps(writes, second), typer.echo)
    else:
        with closing(DualWrites(settings, dsn)) as dual:
            dual.fill()
            race(dual.steps(first), dual.steps(second), typer.echo)


def race(first: Iterator[Any], second: Iterator[Any], say: Say) -> None:
    """Run two writes, each an iterator of its steps, in the order A, B, B to its end, A to its end."""
    say("editor A commits in Postgres")
    next(first)
    say("editor B commits in Postgres, after A")
    next(second)
    rest = sum(1 for _ in second)
    say(f"editor B writes {rest} other stores" if rest else "editor B has nothing else to write")
    rest = sum(1 for _ in first)
    say(f"editor A writes {rest} other stores, late" if rest else "editor A has nothing else to write")


def die(command: list[str], say: Say, dsn: str) -> None:
    """Run `command`, which commits to `dsn`, says so in one line and waits; kill it then.

    Raises:
        Misconfigured: `replay-failed`, when it ends before it has said so.
    """
    program, pipe = [sys.executable, "-m", "headrace", *command], subprocess.PIPE
    with subprocess.Popen(program, stdin=pipe, stdout=pipe, text=True, env=_environment(dsn)) as process:
        line = process.stdout.readline() if process.stdout else ""
        process.kill()
    if not line:
        raise Misconfigured("replay-failed", f"`headrace {' '.join(command)}` ended before it had committed.", _BY_HAND)
    say(f"a process {line.strip()} and is killed before its next write (SIGKILL, pid {process.pid})")


def play_death(settings: Settings, dsn: str, mode: str, seed: int) -> None:
    """Make the first step of a write, say so, and wait to be killed."""
    chosen = _plan(dsn, seed)
    edit = SetPrice(chosen.orphaned, chosen.price_c)
    steps = _steps(LogWrites(dsn), edit) if mode == "log" else DualWrites(settings, dsn).steps(edit)
    next(steps)
    typer.echo(f"commits the price {chosen.price_c} of product {chosen.orphaned} in Postgres")
    sys.stdin.read()


def _plan(dsn: str, seed: int) -> Plan:
    with database.connect(dsn) as connection:
        return plan(connection, seed)


def _environment(dsn: str) -> dict[str, str]:
    return os.environ | {
        "SHOP_DSN": dsn
    }  # not an argument: everybody on the machine may read these, and they stand in errors


def _lines(command: list[str], dsn: str) -> list[str]:
    program = [sys.executable, "-m", "headrace", *command]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=False, env=_environment(dsn))
    if done.returncode:
        raise Misconfigured("replay-failed", f"`headrace {' '.join(command)}` ended with {done.returncode}.", _BY_HAND)
    return done.stdout.splitlines()


def _steps(writes: Writes, edit: SetPrice) -> Iterator[Any]:
    yield writes.write(edit)
