"""The fingerprint: a name of the code that builds a view, the same in every process that finds the same files.

It covers the name of the consumer's class; the source files of it and of its bases outside headrace; what these import of their own
top-level package, and what that imports of it, also where the import stands in a function; and the files that the consumer names in
`fingerprint_files` (templates, for example). Nothing is imported to find out. Other packages are
dependencies, whose versions are the image's.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

_NOBODYS = frozenset({"builtins", "headrace", "typing", "abc"})


def fingerprint(consumer: type[Any]) -> str:
    """Return 12 hex digits for the code of a consumer."""
    digest = hashlib.sha256(consumer.__qualname__.encode())
    for path in _sources(consumer):
        digest.update(path.read_bytes())
    _add_files(digest, consumer)
    return digest.hexdigest()[:12]


def files_print(consumer: type[Any]) -> str:
    """Return 12 hex digits for the files that a consumer names: Python reads its modules once, but these each object reads anew."""
    digest = hashlib.sha256()
    _add_files(digest, consumer)
    return digest.hexdigest()[:12]


def _add_files(digest: hashlib._Hash, consumer: type[Any]) -> None:
    for path in sorted(getattr(consumer, "fingerprint_files", list)()):
        digest.update(path.name.encode() + path.read_bytes())


def _sources(consumer: type[Any]) -> list[Path]:
    classes = [cls for cls in consumer.__mro__ if cls.__module__.partition(".")[0] not in _NOBODYS]
    found = {cls.__module__: Path(inspect.getfile(cls)) for cls in classes}
    unread = dict(found)
    while unread:
        module, path = unread.popitem()
        for name in set(_imported(module, path)) - found.keys():
            file = _file(name)
            if file is not None:
                found[name] = unread[name] = file
    return [found[name] for name in sorted(found)]


def _imported(module: str, path: Path) -> Iterator[str]:
    """Yield what a file imports of its own top-level package; some of these names are no modules but what is in them."""
    if path.suffix != ".py":
        return
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = util.resolve_name("." * node.level + (node.module or ""), package)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name.partition(".")[0] == module.partition(".")[0])


def _file(module: str) -> Path | None:
    try:
        spec = util.find_spec(module)
    except (ImportError, ValueError):  # a name in a module that is no package
        return None
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None
