"""`headrace new`: a consumer's package with its test, ready to run."""

from __future__ import annotations

import keyword
import re
import shlex
from collections.abc import Iterable
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, distribution, entry_points
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

    Exit codes: 0 written; 3 the name, or that of the table, cannot be used or is taken, or the folder is there already.

    Examples:

        headrace new consumer titles --table public.products && pip install -e ./headrace-titles && headrace run titles

        headrace new consumer titles --store redis && pip install -e './headrace-titles[test]' && pytest headrace-titles
    """
    cls = "".join(part.title() for part in name.split("_"))
    root = folder / f"headrace-{name}"
    written = {
        root / "pyproject.toml": "pyproject.toml.txt",
        root / f"headrace_{name}" / "__init__.py": f"{store}.py.txt",
        root / "tests" / f"test_{name}.py": "test.py.txt",
    }
    texts = {
        path: files("headrace.cli").joinpath("scaffolds", scaffold).read_text() for path, scaffold in written.items()
    }
    _check(name, cls, texts.values())
    if not re.fullmatch(r'[^."\\\s]+\.[^"\\\s]+', table):
        raise Misconfigured(
            "bad-name", f"{table!r} is no name of a table.", "Write it as schema.table, without quotes."
        )
    needs = ', "headrace-warehouse"' if store == Store.duckdb else ""
    if root.exists():
        raise Misconfigured("exists", f"{root} exists already.", "Choose another name or --dir.")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(text).substitute(name=name, table=table, cls=cls, upper=name.upper(), needs=needs))
    place = shlex.quote(str(root))
    out.print(f"wrote {root}; next: pip install -e {place} && headrace run {name}", soft_wrap=True, markup=False)


def _check(name: str, cls: str, texts: Iterable[str]) -> None:
    """Refuse a name that a package, a class or a view cannot have, or that another has: `pip install` would put this one in its place."""
    if not re.fullmatch(r"[a-z]([a-z0-9_]*[a-z0-9])?", name):
        said = f"{name!r} is not a name of lower case letters, digits and _ within."
        raise Misconfigured("bad-name", said, "Choose another name.")
    imports = [line for text in texts for line in text.splitlines() if line.startswith(("from ", "import "))]
    if keyword.iskeyword(cls) or cls in re.findall(r"\w+", " ".join(imports)):
        raise Misconfigured(
            "bad-name", f"The class of {name} would be {cls}, which is something else.", "Choose another name."
        )
    groups = ("headrace.consumers", "headrace.commands")
    if _has(f"headrace-{name}") or any(name in entry_points(group=group).names for group in groups):
        said = f"A package headrace-{name}, or a consumer or command {name}, is installed already."
        raise Misconfigured("bad-name", said, "Choose another name, or uninstall that first.")


def _has(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True
