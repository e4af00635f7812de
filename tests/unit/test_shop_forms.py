"""What people type into the shop's forms is either taken or refused in words, whatever it is."""

from __future__ import annotations

from decimal import Decimal

import pytest
from starlette.datastructures import FormData

from headrace_shop.web import BadFormError, _price, _whole


@pytest.mark.parametrize("price", ["nan", "-nan", "sNaN", "inf", "-Infinity", "1e9", "-1", "", "x", "9" * 5000])
def test_a_price_that_is_none_is_refused(price: str) -> None:
    with pytest.raises(BadFormError):
        _price(FormData({"price": price}))


@pytest.mark.parametrize("stars", ["", "-1", "0", "6", "1.5", "x", "9" * 5000])
def test_a_number_of_stars_that_is_none_is_refused(stars: str) -> None:
    with pytest.raises(BadFormError):
        _whole(FormData({"stars": stars}), "stars", 1, 5)


def test_what_is_right_is_taken() -> None:
    assert _price(FormData({"price": " 9,9 "})) == Decimal("9.90")
    assert _whole(FormData({"stars": "0005"}), "stars", 1, 5) == 5
