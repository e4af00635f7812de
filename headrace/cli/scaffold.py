"""`headrace new`: a consumer's package with its test, ready to run."""

from __future__ import annotations

import re
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from headrace.cli.show import out
from headrace.errors import Misconfigured

app = typer.Typer(help="Write the beginning of something.", no_args_is_help=True)


class Store(StrEnum):
    """Where a view is kept."""

    elasticsearch = "elasticsearch"
    redis = "redis"
    duckdb = "duckdb"
    kafka = "kafka"
    custom = "custom"


@app.callback()
def _group() -> None:
    """Write the beginning of something."""


@app.command()
def consumer(
    name: Annotated[str, typer.Argument(help="Names the view: lower case letters, digits and _.")],
    store: Annotated[
        Store, typer.Option(help="Where the view is kept; custom: a store of your own.")
    ] = Store.elasticsearch,
    table: Annotated[str, typer.Option(help="The table whose rows it is made of.")] = "public.products",
    folder: Annotated[Path, typer.Option("--dir", help="Where the package's folder is made.")] = Path(),
) -> None:
    """Write a consumer's package: what the view holds, an entry point, and the test that every consumer passes.

    Exit codes: 0 written; 3 the name cannot be used, or the folder is there already.

    Examples:

        headrace new consumer titles --table public.products && pip install -e ./headrace-titles && headrace run titles

        headrace new consumer titles --store redis && pip install -e './headrace-titles[test]' && pytest headrace-titles
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise Misconfigured(
            "bad-name", f"{name!r} is not a name of lower case letters, digits and _.", "Choose another name."
        )
    root = folder / f"headrace-{name}"
    if root.exists():
        raise Misconfigured("exists", f"{root} exists already.", "Choose another name or --dir.")
    fields = {"name": name, "table": table, "cls": "".join(part.title() for part in name.split("_"))}
    written = {
        root / "pyproject.toml": "pyproject.toml.txt",
        root / f"headrace_{name}" / "__init__.py": f"{store}.py.txt",
        root / "tests" / f"test_{name}.py": "test.py.txt",
    }
    for path, scaffold in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = files("headrace.cli").joinpath("scaffolds", scaffold).read_text()
        path.write_text(Template(text).substitute(fields))
    out.print(f"wrote {root}; next: pip install -e {root} && headrace run {name}")
