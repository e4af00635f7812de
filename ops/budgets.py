"""Hold the size budgets: functions to 50 lines, modules to 400, in everything that is shipped and in bench.

Complexity (8) is ruff's C901. A docstring counts: what needs a page to be explained is two things.
Prints each excess as `path:line: what`, and the median length of a function; exits 1 if there is one.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

FUNCTION_LINES = 50
MODULE_LINES = 400
MEDIAN_LINES = 8
ROOTS = ("headrace", "ops", "services", "consumers", "bench")


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function and method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return its number of lines, from `def` to its end."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def excesses(path: Path, text: str) -> Iterator[str]:
    """Yield what is too long in one module."""
    lines = text.count("\n")
    if lines > MODULE_LINES:
        yield f"{path}:1: {lines} lines, over {MODULE_LINES}"
    for function in functions(ast.parse(text)):
        if length(function) > FUNCTION_LINES:
            yield f"{path}:{function.lineno}: {function.name} has {length(function)} lines, over {FUNCTION_LINES}"


def main() -> int:
    """Check every module under `ROOTS`; return the exit code."""
    texts = {path: path.read_text() for root in ROOTS for path in sorted(Path(root).rglob("*.py"))}
    found = [line for path, text in texts.items() for line in excesses(path, text)]
    median = statistics.median(length(function) for text in texts.values() for function in functions(ast.parse(text)))
    if median > MEDIAN_LINES:
        found.append(f"the median function has {median} lines, over {MEDIAN_LINES}")
    sys.stdout.writelines(f"{line}\n" for line in found)
    sys.stdout.write(f"{len(texts)} modules, median function {median} lines, {len(found)} over budget\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
