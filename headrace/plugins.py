"""Finding consumers: those that are built in exactly as a stranger's.

By the entry-point group `headrace.consumers`, or as one file: ``path/to/file.py:MyView``.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Collection, Iterable
from hashlib import sha256
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from headrace.consumer import ALL, Consumer
from headrace.errors import HeadraceError, Misconfigured, described

GROUP = "headrace.consumers"


def installed() -> dict[str, EntryPoint]:
    """Return the consumers of every installed distribution, by name."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name)}


def load(name: str) -> type[Consumer]:
    """Return the consumer that is installed as `name`.

    Raises:
        Misconfigured: `unknown-consumer`, `broken-consumer`.
    """
    found = installed()
    if name not in found:
        raise Misconfigured(
            "unknown-consumer",
            f"There is no consumer {name!r}; installed: {', '.join(found) or 'none'}.",
            "Install its package, or give this command its file: --consumer path/to/file.py:ClassName",
        )
    try:
        cls: type[Consumer] = found[name].load()
    except HeadraceError:
        raise
    except Exception as error:
        raise Misconfigured(
            "broken-consumer",
            f"The consumer {name} cannot be imported: {described(error)}.",
            f"Mend {found[name].value}.",
        ) from error
    return _checked(cls, name)


def load_file(spec: str) -> tuple[str, type[Consumer]]:
    """Return name and class of ``path/to/file.py:ClassName``; the name is the class's own, else its class name in snake case.

    Raises:
        Misconfigured: `unknown-consumer`, `broken-consumer`.
    """
    path, _, wanted = spec.rpartition(":")
    file = Path(path)
    if not path or not file.is_file():
        raise Misconfigured(
            "unknown-consumer",
            f"{spec!r} is not path/to/file.py:ClassName of a file that exists.",
            "Change --consumer.",
        )
    # Files in other folders may have the same name, and what is asked for a class's code goes by the name of its module.
    place = sha256(str(file.resolve()).encode()).hexdigest()[:12]
    module_spec = importlib.util.spec_from_file_location(f"headrace_file_{file.stem}_{place}", file)
    if module_spec is None or module_spec.loader is None:
        raise Misconfigured("broken-consumer", f"{file} is not a Python file.", "Change --consumer.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except HeadraceError:
        raise
    except Exception as error:
        raise Misconfigured(
            "broken-consumer", f"{file} cannot be imported: {described(error)}.", "Mend the file."
        ) from error
    cls = getattr(module, wanted, None)
    if cls is None:
        raise Misconfigured("unknown-consumer", f"{file} has no class {wanted}.", "Change --consumer.")
    return getattr(cls, "name", "") or _snake(wanted), _checked(cls, wanted)


def load_files(specs: Iterable[str], taken: Collection[str] = ()) -> dict[str, type[Consumer]]:
    """Return the classes of several such files by name, in their order; `taken` are the names of other consumers beside them.

    Raises:
        Misconfigured: as `load_file`; `consumer-twice`.
    """
    found: dict[str, type[Consumer]] = {}
    for spec in specs:
        name, cls = load_file(spec)
        if name in found or name in taken:
            said = f"{spec} is called {name!r}, as another consumer that is named here: only one of them could keep that view."
            raise Misconfigured("consumer-twice", said, "Leave one out, or give its class another `name`.")
        found[name] = cls
    return found


def _checked(cls: object, name: str) -> type[Consumer]:
    missing = [
        method
        for method in ("generations", "open", "apply", "promote", "drop", "scan", "close")
        if not hasattr(cls, method)
    ]
    if missing or not isinstance(cls, type):
        raise Misconfigured(
            "broken-consumer",
            f"{name} is no consumer: it lacks {', '.join(missing)}.",
            "See docs/writing-a-consumer.md.",
        )
    _check_tables(getattr(cls, "tables", ALL), name)
    return cls


def _check_tables(tables: object, name: str) -> None:
    """Refuse `tables` of a class that name none; those that it makes out for each object are its own matter."""
    remedy = 'Write tables = ("schema.table",) with its comma, or give a DocumentConsumer its `document`.'
    if isinstance(tables, str):
        said = f"The tables of {name} are the text {tables!r}: a comma is missing."
        raise Misconfigured("broken-consumer", said, remedy)
    if not isinstance(tables, Collection) or tuple(tables) == ALL:
        return
    bad = [table for table in tables if not isinstance(table, str) or not all(table.partition("."))]
    if bad or not tables:
        said = f"{name} reads no table: its tables are {tuple(tables)!r}, and each is the name of one with its schema."
        raise Misconfigured("broken-consumer", said, remedy)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
