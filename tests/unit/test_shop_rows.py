"""The shop's catalogue and generated rows, without a server."""

from __future__ import annotations

from decimal import Decimal

from headrace_shop import catalogue, generate
from headrace_shop.generate import Span

CATEGORIES = {name: number for number, name in enumerate(catalogue.genres(), start=1)}


def test_the_films_are_real_and_clean() -> None:
    films = catalogue.films()
    assert len(films) == 3201
    assert all(film.title.strip() == film.title and film.title and film.director and film.genre for film in films)
    assert all(1900 <= film.year <= 2030 and (film.rating is None or 0 <= film.rating <= 10) for film in films)
    assert next(film for film in films if film.title == "Skyfall").director == "Sam Mendes"


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    span = Span(0, 200)

    def rows(seed: int) -> list[object]:
        return [
            *generate.products(span, CATEGORIES, seed),
            *generate.reviews(span, range(1, 100), seed),
            *generate.orders(span, range(1, 9), seed),
            *generate.customers(span, seed),
            *generate.order_items(span, [(1, Decimal("1.00")), (2, Decimal("2.00"))], seed),
        ]

    assert rows(7) == rows(7)
    assert rows(7) != rows(8)


def test_more_products_than_films_become_editions_with_names_of_their_own() -> None:
    count = 3 * len(catalogue.films())
    names = [row[2] for row in generate.products(Span(0, count), CATEGORIES, 1)]
    first, second, third = names[0], names[len(catalogue.films())], names[2 * len(catalogue.films())]
    assert first == "Skyfall"
    assert len({first, second, third}) == 3
    assert second.startswith("Skyfall (")


def test_some_descriptions_are_too_long_to_be_stored_in_line() -> None:
    long = [row for row in generate.products(Span(0, 1000), CATEGORIES, 1) if len(row[3]) > 4000]
    assert 5 <= len(long) <= 60
