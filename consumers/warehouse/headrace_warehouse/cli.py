"""`headrace sql`: ask the running warehouse."""

from __future__ import annotations

import csv
import http.client
import sys
import urllib.error
import urllib.parse
import urllib.request
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headrace import settings as settings_of
from headrace.errors import CHECK_FAILED, HeadraceError, Misconfigured, Transient

_WAIT_SECONDS = 90
_LATER = 503


def sql(
    query: Annotated[str, typer.Argument(help="One SELECT; DuckDB's dialect.", metavar="SELECT")],
    *,
    json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the rows as CSV.")] = False,
) -> None:
    """Ask the running warehouse.

    Every answer is one state that Postgres really had, and has 10,000 rows at most: it says when there are more. Tables of the
    schema public by their plain name, others by schema.table.

    Example: `headrace sql "SELECT count(*) FROM products"`

    Exit codes: 0 answered; 1 a CSV that lacks rows; 2 wrong use; 3 refused or failed in DuckDB, too slow or too large, or what
    answers is no warehouse; 5 no warehouse answers, or it is still loading or busy.
    """
    if json and as_csv:
        raise typer.BadParameter("--json and --csv exclude each other.")
    answer = ask(settings_of.load().warehouse_listen, query)
    if json:
        sys.stdout.write(orjson.dumps(answer, option=orjson.OPT_INDENT_2).decode() + "\n")
    elif as_csv:
        writer = csv.writer(sys.stdout)
        writer.writerow(answer["columns"])
        writer.writerows([[_text(value, "") for value in row] for row in answer["rows"]])
        _say_what_lacks(answer, Console(stderr=True))
        if answer["truncated"]:
            raise typer.Exit(CHECK_FAILED)
    else:
        _show(answer)


def ask(listen: str, query: str) -> dict[str, Any]:
    """Return the endpoint's answer.

    Raises:
        Misconfigured: `sql-refused`, `sql-failed`, `sql-too-slow`, `sql-too-large`, from the warehouse; `warehouse-not-running`, for good.
        Transient: `warehouse-loading`; `warehouse-not-running`, where one may be there later.
    """
    body = orjson.dumps({"sql": query})
    try:
        url = f"http://{_address(listen)}/sql"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with _direct().open(request, timeout=_WAIT_SECONDS) as answer:
            return _checked(orjson.loads(answer.read()))
    except urllib.error.HTTPError as error:
        raise _refusal(error) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _nobody(f"No warehouse answers at {listen}: {error or type(error).__name__}.", error) from error


def _address(listen: str) -> str:
    host, _, port = listen.rpartition(":")
    if ":" in host and "[" not in host:  # the warehouse listens at ::1:8790 too
        listen = f"[{host}]:{port}"
    at = urllib.parse.urlsplit(f"//{listen}")
    if not (at.hostname and at.port):
        raise ValueError("that is not host:port")
    return listen


def _checked(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict) or not found.keys() >= {"columns", "types", "rows", "lsn", "inexact", "truncated"}:
        raise ValueError("what answers is no warehouse")
    return found


def _direct() -> urllib.request.OpenerDirector:
    """Return an opener that never asks a proxy: the warehouse is near."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _refusal(error: urllib.error.HTTPError) -> HeadraceError:
    try:
        body = orjson.loads(error.read())
        kind = Transient if error.code == _LATER else Misconfigured
        return kind(body["code"], body["message"], body["remedy"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as broken:
        return _nobody(f"What answers is no warehouse: {error}.", broken)


def _nobody(said: str, error: Exception) -> HeadraceError:
    """Return what it means that no answer came: one may come later, but not from something else or at no address."""
    kind = Transient if isinstance(error, (OSError, http.client.IncompleteRead)) else Misconfigured
    remedy = "Run: headrace run warehouse (or set HEADRACE_WAREHOUSE_LISTEN to where it listens)"
    return kind("warehouse-not-running", said, remedy)


def _show(answer: dict[str, Any]) -> None:
    table = Table()
    for column, kind in zip(answer["columns"], answer["types"], strict=True):
        numeric = kind.startswith(("DECIMAL", "DOUBLE", "FLOAT")) or kind.endswith("INT") or kind == "INTEGER"
        table.add_column(Text(column), justify="right" if numeric else "left", footer=kind)
    for row in answer["rows"]:
        table.add_row(*(Text(_text(value, "NULL")) for value in row))
    console = Console()
    console.print(table)
    console.print(f"{len(answer['rows'])} rows at LSN {answer['lsn']}", style="dim", highlight=False)
    _say_what_lacks(answer, console)


def _say_what_lacks(answer: dict[str, Any], console: Console) -> None:
    if answer["truncated"]:
        console.print(f"there are more rows than these {len(answer['rows'])}: ask for less at once", markup=False)
    if answer["inexact"]:
        tables = ", ".join(answer["inexact"])
        console.print(f"{tables} may differ from Postgres: inexact since DDL without events (S12)", markup=False)
    if answer.get("approximate"):
        tables = ", ".join(answer["approximate"])
        console.print(f"{tables} may have values of a later moment: approximate, read again (S7)", markup=False)
    if answer.get("parked"):
        tables = ", ".join(answer["parked"])
        console.print(f"{tables} lack what is parked: see headrace parked list warehouse", markup=False)


def _text(value: Any, null: str) -> str:
    if value is None:
        return null
    return value if isinstance(value, str) else orjson.dumps(value).decode()
