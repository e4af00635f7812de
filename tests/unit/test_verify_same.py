"""Two ways to tell whether rows mean the same: value by value, and by their text where rows have no key."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from headrace_verify.compare import same
from headrace_verify.multiset import Multiset

T = "public.events"
_NUMBERS = st.one_of(
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0, -0.0, 1, 1.0, True, False, 1 << 53, 1 << 63, float(1 << 63), float(1 << 64), -float(1 << 63)]),
)
VALUES = st.recursive(
    st.one_of(_NUMBERS, st.none(), st.text(max_size=2)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=1), inner, max_size=2)),
    max_leaves=4,
)


def otherwise(value: Any) -> Any:
    """Return what means the same, with floats for integers."""
    if isinstance(value, dict):
        return {name: otherwise(of) for name, of in reversed(value.items())}
    if isinstance(value, list):
        return [otherwise(each) for each in value]
    return float(value) if type(value) is int else value


@hypothesis_settings(max_examples=300, database=None, derandomize=True, deadline=None)
@given(VALUES, VALUES, st.booleans())
@example(1 << 63, None, True)
@example(True, 1, False)
def test_rows_without_a_key_are_compared_as_those_with_one(one: Any, other: Any, again: bool) -> None:
    other = otherwise(one) if again else other
    multiset = Multiset()
    multiset.expect(T, ("v",), [{"v": one}])
    multiset.hold(T, "1", {"v": other})
    assert same(one, other) == (not multiset.differing())
    multiset.close()
