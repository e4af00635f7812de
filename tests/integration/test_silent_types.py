"""Types that change under the rows that have them (S12), and those that say the same by another name."""

from __future__ import annotations

import pytest

from headrace.settings import Settings
from headrace_capture.fingerprints import ColumnPrint, Fingerprint, silent
from tests.fixtures.capture import capturing, eventually, execute, prepare, replay, selected
from tests.fixtures.resnapshots import done, jobs
from tests.fixtures.silent import LOGGED, T, exact, fingerprint, off

pytestmark = pytest.mark.usefixtures("often")


@pytest.mark.parametrize("shown", [False, True], ids=["by the catalogue", "by the stream"])
def test_a_text_that_became_an_array_while_capture_runs(settings: Settings, *, shown: bool) -> None:
    """Their lengths do not compare."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, n varchar(5))", "INSERT INTO items VALUES (1, 'a')")
    with capturing(settings) as capture:
        capture.reach()
        eventually("it was looked at", lambda: "varying" in fingerprint(settings, T))
        execute(settings, "ALTER TABLE items ALTER COLUMN n TYPE varchar(5)[] USING ARRAY[n]")
        if shown:
            execute(settings, "INSERT INTO items VALUES (2, ARRAY['b'])")
        exact(settings, capture, T)


MOOD = "CREATE TYPE mood AS ENUM ('a', 'b'); CREATE DOMAIN temper AS mood"


@pytest.mark.parametrize("capture_was_off", [False, True])
@pytest.mark.parametrize(
    ("key", "type_"),
    [("int", "mood"), ("int", "mood[]"), ("int", "temper[]"), ("mood", "mood"), ("temper", "mood")],
)
def test_a_value_of_an_enum_that_was_renamed(
    settings: Settings, key: str, type_: str, *, capture_was_off: bool
) -> None:
    """Every row's text changes, its key's too; rows that are written before anybody knows have the new one."""
    first, second = ("1", "2") if key == "int" else ("'a'", "'b'")
    old, new = ("'{a}'", "'{z}'") if type_.endswith("[]") else ("'a'", "'z'")
    table = f"CREATE TABLE items (id {key} PRIMARY KEY, n {type_})"
    prepare(settings, *MOOD.split("; "), table, f"INSERT INTO items VALUES ({first}, {old})")
    ddl = "ALTER TYPE mood RENAME VALUE 'a' TO 'z'", f"INSERT INTO items VALUES ({second}, {new})"
    if capture_was_off:
        with off(settings):
            execute(settings, *ddl)
    with capturing(settings) as capture:
        if not capture_was_off:
            capture.reach()
            eventually("it was looked at", lambda: fingerprint(settings, T) != "null")
            execute(settings, *ddl)
        exact(settings, capture, T)


def test_an_enum_within_other_types_and_the_attributes_of_these(settings: Settings) -> None:
    """A composite that gains one is not written anew: all rows show it at once."""
    prepare(
        settings,
        *MOOD.split("; "),
        "CREATE TYPE moods AS RANGE (SUBTYPE = mood, MULTIRANGE_TYPE_NAME = many)",
        "CREATE TYPE pair AS (a int, m many)",
        "CREATE DOMAIN two AS pair",
        "CREATE TABLE items (id int PRIMARY KEY, n two[])",
        "INSERT INTO items VALUES (1, ARRAY[ROW(1, '{[a,b)}')::two])",
        "CREATE TABLE whole (id pair PRIMARY KEY)",
        "INSERT INTO whole VALUES (ROW(1, '{}'))",
    )
    with capturing(settings) as capture:
        capture.reach()
        eventually("they were looked at", lambda: fingerprint(settings, "public.whole") != "null")
        execute(settings, "ALTER TYPE mood RENAME VALUE 'a' TO 'z'")
        eventually("both are read again", lambda: jobs(settings).keys() == {T, "public.whole"})
        done(settings, capture, T, "public.whole")
        assert [row["n"] for row in replay(settings, T).values()] == [['(1,"{[z,b)}")']]
        execute(settings, "ALTER TYPE pair ADD ATTRIBUTE more text")
        eventually("keys are", lambda: set(replay(settings, "public.whole")) == {b'{"id":"(1,{},)"}'})
        done(settings, capture, T, "public.whole")
    assert [row["n"] for row in replay(settings, T).values()] == [['(1,"{[z,b)}",)']]


@pytest.mark.parametrize(
    ("attributes", "value", "ddl"), [("a int", "(1)", "DROP ATTRIBUTE a"), ("", "()", "ADD ATTRIBUTE a text")]
)
def test_the_last_attribute_of_a_composite_goes_or_the_first_one_comes(
    settings: Settings, attributes: str, value: str, ddl: str
) -> None:
    """A row of nothing has text, too; of a first attribute without a value it is the same, but rows that have one are others by then."""
    made = f"CREATE TYPE one AS ({attributes})", "CREATE TABLE items (id int PRIMARY KEY, n one)"
    prepare(settings, *made, f"INSERT INTO items VALUES (1, '{value}')")
    with capturing(settings) as capture:
        capture.reach()
        eventually("it was looked at", lambda: fingerprint(settings, T) != "null")
        execute(settings, f"ALTER TYPE one {ddl}")
        capture.hear(f"{T} was read again")
        eventually("it is exact", lambda: capture.reach().inexact == ())
    assert [row["n"] for row in replay(settings, T).values()] == ["()"]


def test_a_value_that_an_enum_gained_changes_no_row(settings: Settings) -> None:
    prepare(
        settings,
        *MOOD.split("; "),
        "CREATE TABLE items (id int PRIMARY KEY, n mood)",
        "INSERT INTO items VALUES (1, 'a')",
    )
    with capturing(settings) as capture:
        capture.reach()
        eventually("it was looked at", lambda: fingerprint(settings, T) != "null")
        execute(settings, "ALTER TYPE mood ADD VALUE 'new' BEFORE 'b'", "INSERT INTO items VALUES (2, 'new')")
        eventually("it was looked at", lambda: "new" in fingerprint(settings, T))
        assert capture.reach().inexact == ()
    assert jobs(settings) == {}
    assert replay(settings, T) == selected(settings, "items")


def print_of(*columns: ColumnPrint, kind: str = "r", leaves: tuple[tuple[int, int], ...] = ((1, 1),)) -> Fingerprint:
    return Fingerprint(kind, columns, leaves)


def test_a_print_of_before_that_does_not_say_all_is_not_suspected() -> None:
    plain = print_of(ColumnPrint(1, "id", "integer", filled=False, touched="7")).plain()
    known = {"sent": "16400 16401", "altered": "812", "width": 1, "key": "16405"}
    now = Fingerprint.of(plain | known)
    for lacking in known:
        assert not silent(
            Fingerprint.of({name: said for name, said in (plain | known).items() if name != lacking}), now
        )
    assert "options changed" in silent(Fingerprint.of(plain | known | {"altered": "811"}), now)
    assert "unlogged" in silent(now, Fingerprint.of(plain | known | {"unlogged": [LOGGED]})), (
        "it was not looked for before"
    )


@pytest.mark.parametrize(
    ("old", "new", "harmless"),
    [
        ("integer", "integer", True),
        ("character varying(5)", "character varying(9)", True),
        ("character varying(5)", "character varying", True),
        ("character varying", "text", True),
        ("character varying(9)", "character varying(5)", False),
        ("text", "character varying", False),
        ("integer", "bigint", False),
        ("character varying(5)", "character varying(5)[]", False),
        ("character varying(5)[]", "character varying(9)", False),
        ("character varying(5)[]", "character varying(9)[]", False),
        ("character varying[]", "character varying(9)[]", False),
        ("character varying", "character varying[]", False),
        ("character varying[]", "text", False),
        ("character varying[]", "text[]", False),
    ],
)
def test_types_that_say_the_same(old: str, new: str, *, harmless: bool) -> None:
    column = ColumnPrint(1, "a", old, filled=False, touched="7")
    before, after = print_of(column), print_of(column._replace(type=new, touched="9"))
    assert (silent(before, after) == "") is harmless
