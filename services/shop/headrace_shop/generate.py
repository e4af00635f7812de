"""Rows for the shop, any number of them, the same for the same seed.

The first products of an empty shop are the real films in their order; further ones are editions of them. About one
description in forty is several kilobytes long, so that Postgres stores it out of line: an update of the price alone
then does not carry it, and capture must find it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from random import Random
from typing import Any

from headrace_shop import catalogue


def _words(text: str) -> list[str]:
    return text.split()


_EPOCH = datetime(2025, 1, 1, tzinfo=UTC)
_FIRST = _words(
    "Ada Ben Chloe Dara Elif Femi Greta Hugo Ines Jonas Kaya Lars Mina Noor Olga Pavel Quinn Rosa Sven Tuva Uma "
    "Vito Wanda Yara Zeno"
)
_LAST = _words(
    "Adler Brandt Castro Dietrich Eriksen Fontaine Gruber Haas Ito Jansen Keller Lindqvist Moreau Novak Okafor "
    "Petrov Rossi Silva"
)
EDITIONS = ("Director's Cut", "Restored", "Box Set", "Steelbook", "Anniversary Edition", "Extended")
_OPENINGS = (
    "I saw it twice.",
    "Bought for my father.",
    "A long evening well spent.",
    "Not what I expected.",
    "We laughed & cried.",
)
_PRAISE = (
    "The pictures stay with you",
    "The cast carries it",
    "It takes its time",
    "The ending is worth the wait",
    "The score is <superb>",
)
_BLAME = (
    "the middle part drags",
    "the disc came scratched",
    "the subtitles are poor",
    "I had hoped for more extras",
    "it is too long",
)
_WORDS = _words(
    "light river stage camera night letter window street voice garden mountain silence winter memory harbour signal "
    "train mirror orchard stranger island thunder lantern bridge horizon whisper theatre morning shadow journey "
    "copper velvet"
)
_LONG = 0.025
_DOUBTFUL = 3
_STATUS = ("placed", "paid", "shipped", "delivered")

Rows = Iterator[Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Span:
    """The ids of rows to make: `count` of them after `after`."""

    after: int
    count: int

    def ids(self) -> range:
        """Return the ids in order."""
        return range(self.after + 1, self.after + self.count + 1)


def products(span: Span, categories: dict[str, int], seed: int) -> Rows:
    """Yield rows of (id, category_id, name, description, director, year, rating, price, stock)."""
    random = Random(f"products {seed}")
    films = catalogue.films()
    for number in span.ids():
        edition, place = divmod(number - 1, len(films))
        film = films[place]
        name = f"{film.title} ({_edition(edition)})" if edition else film.title
        description = film.description + (" " + _essay(random) if random.random() < _LONG else "")
        stock = random.randint(50, 500)
        yield (
            number,
            categories[film.genre],
            name,
            description,
            film.director,
            film.year,
            film.rating,
            price(random),
            stock,
        )


def reviews(span: Span, products: Sequence[int], seed: int) -> Rows:
    """Yield rows of (id, product_id, author, stars, body, created_at); a few of the ids `products` are favourites."""
    random = Random(f"reviews {seed}")
    for number in span.ids():
        stars, body = opinion(random)
        yield number, favourite(random, products), person(random), stars, body, _moment(random)


def customers(span: Span, seed: int) -> Rows:
    """Yield rows of (id, name, email)."""
    random = Random(f"customers {seed}")
    for number in span.ids():
        name = person(random)
        yield number, name, f"{name.replace(' ', '.').lower()}.{number}@example.org"


def orders(span: Span, customers: Sequence[int], seed: int) -> Rows:
    """Yield rows of (id, customer_id, placed_at, status)."""
    random = Random(f"orders {seed}")
    for number in span.ids():
        yield number, random.choice(customers), _moment(random), random.choice(_STATUS)


def order_items(span: Span, prices: Sequence[tuple[int, Decimal]], seed: int) -> Rows:
    """Yield rows of (order_id, line, product_id, quantity, price): one to three lines of each order in `span`."""
    random = Random(f"items {seed}")
    for order in span.ids():
        for line in range(1, random.randint(1, 3) + 1):
            product, cost = random.choice(prices)
            yield order, line, product, random.randint(1, 3), cost


def price(random: Random) -> Decimal:
    """Return a price between 2.99 and 39.99."""
    return Decimal(random.randint(2, 39)) + Decimal("0.99")


def person(random: Random) -> str:
    """Return a name."""
    return f"{random.choice(_FIRST)} {random.choice(_LAST)}"


def opinion(random: Random) -> tuple[int, str]:
    """Return the stars and the body of a review."""
    stars = random.choices((1, 2, 3, 4, 5), weights=(1, 2, 4, 7, 6))[0]
    praise, blame = random.choice(_PRAISE), random.choice(_BLAME)
    body = f"{praise}, though {blame}." if stars <= _DOUBTFUL else f"{praise}."
    return stars, f"{random.choice(_OPENINGS)} {body}"


def favourite(random: Random, products: Sequence[int]) -> int:
    """Return one of the products' ids, the first ones more often: popular films have many reviews."""
    return products[int(len(products) * random.random() ** 2)]


def _essay(random: Random) -> str:
    return " ".join(random.choice(_WORDS) + format(random.getrandbits(20), "x") for _ in range(500))


def _moment(random: Random) -> datetime:
    return _EPOCH + timedelta(seconds=random.randrange(365 * 24 * 3600))


def _edition(edition: int) -> str:
    again, which = divmod(edition - 1, len(EDITIONS))
    return f"{EDITIONS[which]} {again + 1}" if again else EDITIONS[which]
