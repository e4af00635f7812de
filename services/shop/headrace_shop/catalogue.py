"""The real films that the shop sells: data/films.tsv, see data/README.md for its source and licence."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Film:
    """One film. `genre` is the first that the data names; it is the film's category in the shop."""

    title: str
    year: int
    genre: str
    director: str
    rating: Decimal | None
    description: str


@cache
def films() -> tuple[Film, ...]:
    """Return every film, the most reviewed first."""
    text = files("headrace_shop").joinpath("data/films.tsv").read_text(encoding="utf-8")
    return tuple(_film(row) for row in csv.DictReader(text.splitlines(), delimiter="\t"))


def genres() -> list[str]:
    """Return the names of the categories in alphabetical order."""
    return sorted({film.genre for film in films()})


def _film(row: dict[str, str]) -> Film:
    return Film(
        title=row["title"],
        year=int(row["year"]),
        genre=row["genres"].split(", ")[0],
        director=row["director"],
        rating=Decimal(row["rating"]) if row["rating"] else None,
        description=_describe(row),
    )


def _describe(row: dict[str, str]) -> str:
    countries = row["countries"].split(", ")
    made = f" from {' and '.join(countries[:2])}" if row["countries"] else ""
    cast = f", with {row['cast']}" if row["cast"] else ""
    minutes = f" {row['minutes']} minutes." if row["minutes"] else ""
    return f"{row['genres']}{made}, {row['year']}. Directed by {row['director']}{cast}.{minutes}"
