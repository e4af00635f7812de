"""What verify says: keys that differ, what is not exact, what could not be compared and why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from headrace import plugins
from headrace.consumer import Cursor, ViewRow
from headrace.errors import HeadraceError, Misconfigured, Poison, Transient
from headrace.settings import Settings, environment
from headrace_verify.postgres import connect
from headrace_verify.verify import _postgres_errors
from tests.fixtures.capture import capturing, eventually, execute, prepare
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, serving
from tests.fixtures.verified import ITEMS, Mirror, T, Warehouse, found, kept, meddle
from tests.integration.test_capture_append_only import prepare_append_only

BROKEN = """
from headrace.errors import Misconfigured
from tests.fixtures.plain import Plain

class Broken(Plain):
    name = "broken"

    def __init__(self, settings, name):
        super().__init__(settings, name)
        self._path = settings.path("broken.sqlite")

    def scan(self, after, limit):
        raise Misconfigured("unlucky", "It cannot be read.")
"""


def test_the_command_names_keys_and_exits_1(settings: Settings, tmp_path: Path) -> None:
    prepare(settings, ITEMS, f"INSERT INTO {T} SELECT i, i, 'x' FROM generate_series(1, 30) i")
    code = Path(__file__).parents[1] / "fixtures" / "plain.py"
    command = [sys.executable, "-m", "headrace", "verify", "--consumer", f"{code}:Plain"]
    environ = environment(settings) | {"PATH": "/usr/bin:/bin"}
    broken = tmp_path / "broken.py"
    broken.write_text(BROKEN)
    files = ["--consumer", f"{broken}:Broken"]

    def verify(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], env=environ, capture_output=True, text=True, timeout=60, check=False)

    with capturing(settings) as capture:
        capture.reach()
        off = verify()
        assert off.returncode == 3
        assert "headrace run plain" in off.stderr
        with serving(settings, plain=Plain, **plugins.load_files(files[1:])) as control:
            await_live(control, "plain", "broken")
            right = verify()
            assert right.returncode == 0, right.stderr
            meddle(settings, "DELETE FROM rows WHERE key = ?", '{"id":3}')
            wrong = verify()
            said = orjson.loads(verify("--json").stdout)
            some = verify("--json", *files)
    assert (some.returncode, "It cannot be read." in some.stderr) == (3, True), some.stderr
    assert orjson.loads(some.stdout)[0] | {"lsn": ""} == said[0] | {"lsn": ""}, "what was compared before is known"
    assert wrong.returncode == 1
    assert f'missing plain {T} {{"id":3}}' in wrong.stdout
    assert (said[0]["missing"], said[0]["rows"], said[0]["ok"]) == (1, 30, False)
    assert said[0]["differences"][0]["key"] == '{"id":3}'


def test_what_is_not_exact_is_said(settings: Settings) -> None:
    """FULL is impossible beside a virtual column, so a TOAST value may have to be read again (S7, S8)."""
    prepare(
        settings, "CREATE TABLE public.v (id int PRIMARY KEY, n int, big text, twice int GENERATED ALWAYS AS (n * 2))"
    )
    execute(settings, "INSERT INTO public.v VALUES (1, 1, 'x')")
    with kept(settings, Mirror):
        seen = found(settings, Mirror)
    assert seen.clean
    assert seen.rows == 1
    assert [note for note in seen.notes if "public.v is approximate" in note]


def test_a_view_that_has_stopped_is_not_compared_and_that_is_said_at_once(settings: Settings) -> None:
    """When it stops while it is scanned; and then before anything is read. Its process goes on for the consumer beside it."""
    prepare(settings, ITEMS, f"INSERT INTO {T} SELECT i, i, 'x' FROM generate_series(1, 2000) i")
    nowhere = replace(settings, dsn="postgresql://postgres@127.0.0.1:1/x")

    class Poisoned(Mirror):
        """Cannot apply a row that is written when it is scanned; the scan has no end."""

        def apply(self, batch: Any) -> None:
            if any(change.row and change.row["name"] == "poison" for change in batch.changes):
                raise Poison("unlucky", "One row is poison.", "Mend it, then: headrace rebuild NAME")
            super().apply(batch)

        def scan(self, after: Cursor | None, limit: int) -> list[ViewRow]:
            if after is None:
                execute(settings, f"UPDATE {T} SET name = 'poison' WHERE id = 1")
            return super().scan(None, limit) if after else super().scan(after, limit)

    with capturing(settings) as capture, serving(settings, view=Poisoned, beside=Warehouse) as control:
        capture.reach()
        await_live(control, "view")
        for asked in (settings, nowhere):
            with pytest.raises(HeadraceError) as stopped:
                found(asked, Poisoned)
            assert stopped.value.code == "unlucky"
            assert "headrace rebuild view" in stopped.value.remedy
            eventually("that is reported", lambda: control.reports()["view"][0].phase == "stopped")


def test_without_a_view_or_postgres_it_says_what_to_do(settings: Settings, fresh_database: Callable[[], str]) -> None:
    prepare(settings, ITEMS)

    class Other(Mirror):
        """Neither mirrors rows nor renders."""

        mirrors_rows = False

    with kept(settings, Other):
        with pytest.raises(Misconfigured, match="neither mirrors"):
            found(settings, Other)
        with pytest.raises(Misconfigured, match="runs other code") as here:
            found(settings, Mirror)
        assert here.value.code == "other-code"
        with pytest.raises(Transient) as away:
            found(replace(settings, dsn="postgresql://postgres@127.0.0.1:1/x"), Other)
        assert away.value.code == "postgres-away"
        with pytest.raises(Misconfigured) as elsewhere:
            found(replace(settings, dsn=fresh_database()), Other)
        assert elsewhere.value.code == "other-source"
        with (
            connect(settings) as postgres,
            pytest.raises(Misconfigured, match="text = uuid") as refused,
            _postgres_errors(),
        ):
            postgres.execute("SELECT 'a'::text = gen_random_uuid()")
        assert refused.value.code == "verify-no-expectation", "it is there, and answers"
    with pytest.raises(Misconfigured, match="No process runs"):
        found(settings, Other)


def test_what_cannot_be_compared_keeps_nobody_else_from_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "calls-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: calls\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[headrace.consumers]\nplain = tests.fixtures.plain:Plain\ncalls = calls:Calls\ntrail = calls:Trail\n"
    )
    (tmp_path / "calls.py").write_text(
        "from headrace.documents import Document, DocumentConsumer\nfrom headrace.effects import EffectConsumer\n"
        "from headrace.stores.kafka import KafkaTopic\n\nclass Calls(EffectConsumer):\n"
        f"    tables = ('{T}',)\n\n    def effect(self, changes):\n        pass\n\n\nclass Trail(DocumentConsumer):\n"
        "    document = Document('public.events')\n    store = KafkaTopic('trail')\n\n"
        "    def render(self, row):\n        return dict(row)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = ("INSERT INTO items VALUES (1, 1, 'one')", "CREATE TABLE events (n int)", "INSERT INTO events VALUES (1)")
    prepare_append_only(settings, ITEMS, *made)
    consumers = {name: plugins.load(name) for name in ("plain", "calls", "trail")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environ = os.environ | environment(settings) | {"COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-m", "headrace", *words], env=environ, capture_output=True, text=True, check=False
        )

    with capturing(settings) as capture, serving(settings, **consumers) as control:
        capture.reach()
        await_live(control, "plain", "calls", "trail")
        ended = run("verify", "--json")
        assert ended.returncode == 0, ended.stderr
        assert [fact["consumer"] for fact in orjson.loads(ended.stdout)] == ["plain"]
        assert "not compared calls" in ended.stderr
        assert "not compared trail has a document for each row of public.events" in ended.stderr
        ended = run("verify", "plain", "trail")
        assert (ended.returncode, "verify-no-expectation" in ended.stderr) == (3, True), "it was asked for by name"
        ended = run("rebuild", "calls", "--wait")
        assert ended.returncode == 0, ended.stderr
        assert [report.live for report in control.reports()["calls"]] == [False, True]
