"""The shape of a table, as rows of a feed tell it: it only grows (S28)."""

from __future__ import annotations

import pytest

from headrace.shapes import wider


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("unknown", "date", "date"),
        ("integer", "bigint", "bigint"),
        ("real", "double precision", "double precision"),
        ("bigint", "real", "double precision"),
        ("numeric(10,2)", "numeric(6,4)", "numeric(12,4)"),
        ("integer", "numeric(4,2)", "numeric(12,2)"),
        ("numeric", "numeric(4,2)", "numeric"),
        ("double precision", "numeric(4,2)", "numeric"),
        ("date", "timestamp without time zone", "text"),
        ("integer", "text", "text"),
        ("numeric(4,2)[]", "numeric(4,2)", "text"),
        ("integer[]", "bigint[]", "text"),
        ("jsonb", "jsonb", "jsonb"),
    ],
)
def test_a_type_gives_way_to_one_that_keeps_the_values_of_both(one: str, other: str, both: str) -> None:
    assert wider(one, other) == wider(other, one) == both
