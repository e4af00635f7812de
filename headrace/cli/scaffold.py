"""`headrace new`: a consumer's package, ready to run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from headrace.cli.show import out
from headrace.errors import Misconfigured

app = typer.Typer(help="Write the beginning of something.", no_args_is_help=True)

_PROJECT = """[project]
name = "headrace-{name}"
version = "0.1.0"
requires-python = ">=3.11"
dependencies = ["headrace"]

[project.entry-points."headrace.consumers"]
{name} = "headrace_{name}:{cls}"

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
"""

_MODULE = '''"""The view {name}: one document for each row of {table}."""

from headrace.documents import Document, DocumentConsumer, Node
from headrace.stores.elasticsearch import ElasticsearchIndex


class {cls}(DocumentConsumer):
    """What the view holds. Change the declaration and `render`, then: headrace rebuild {name} --wait."""

    document = Document("{table}")
    store = ElasticsearchIndex("{name}", mappings={{"dynamic": True}})

    def render(self, row: Node) -> dict[str, object]:
        """Return the document of one row."""
        return dict(row)
'''


@app.callback()
def _group() -> None:
    """Write the beginning of something."""


@app.command()
def consumer(
    name: Annotated[str, typer.Argument(help="Names the view: lower case letters, digits and _.")],
    table: Annotated[str, typer.Option(help="The table whose rows become documents.")] = "public.products",
    folder: Annotated[Path, typer.Option("--dir", help="Where the package's folder is made.")] = Path(),
) -> None:
    """Write a consumer's package: a declaration, a `render`, an entry point.

    Exit codes: 0 written; 3 the name cannot be used, or the folder is there already.

    Example:

        headrace new consumer titles --table public.products && pip install -e ./headrace-titles && headrace run titles
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise Misconfigured(
            "bad-name", f"{name!r} is not a name of lower case letters, digits and _.", "Choose another name."
        )
    root = folder / f"headrace-{name}"
    if root.exists():
        raise Misconfigured("exists", f"{root} exists already.", "Choose another name or --dir.")
    fields = {"name": name, "table": table, "cls": "".join(part.title() for part in name.split("_"))}
    package = root / f"headrace_{name}"
    package.mkdir(parents=True)
    (root / "pyproject.toml").write_text(_PROJECT.format(**fields))
    (package / "__init__.py").write_text(_MODULE.format(**fields))
    out.print(f"wrote {root}; next: pip install -e {root} && headrace run {name}")
