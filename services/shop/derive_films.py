"""Derive headrace_shop/data/films.tsv from the movies database of the PyPI package `bokeh_sampledata`.

Run once, by hand, when the film data should change; the result is committed (CC0-1.0, see data/README.md):

    pip download --no-deps bokeh_sampledata==2026.1 && unzip bokeh_sampledata-*.whl
    python derive_films.py bokeh_sampledata/_data/movies.db headrace_shop/data/films.tsv

The most reviewed films with a title, a director and a genre are kept, the first five of the cast, no other change.
"""

import csv
import hashlib
import sqlite3
import sys
from pathlib import Path

SHA256 = "1d9c6a02e488d0354b2309e16130c58820a91ac2ce417e814c5964f9579a65ac"
FILMS = 3201
CAST = 5
QUERY = """
    SELECT o.Title, o.Year, o.Genre, o.Director, t.Rating, CAST(o.Runtime AS INTEGER), o.Country, o."Cast"
    FROM omdb o JOIN tomatoes t USING (ID)
    WHERE o.Title <> '' AND o.Director <> '' AND o.Genre <> ''
    ORDER BY t.Reviews DESC, o.ID LIMIT ?
"""


def main(database: Path, target: Path) -> None:
    """Write the films of `database` to `target`, tab separated, a header first."""
    seen = hashlib.sha256(database.read_bytes()).hexdigest()
    if seen != SHA256:
        sys.exit(f"{database} has sha256 {seen}, not {SHA256}")
    with sqlite3.connect(database) as source, target.open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t", lineterminator="\n")
        rows.writerow(["title", "year", "genres", "director", "rating", "minutes", "countries", "cast"])
        for row in source.execute(QUERY, (FILMS,)):
            cast = ", ".join((row[-1] or "").split(", ")[:CAST])
            rows.writerow([*("" if value is None else value for value in row[:-1]), cast])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
