"""Read-only SQL over HTTP: one endpoint a process, from the first generation that it opens until the process ends.

It outlives the generations that are opened and closed, so that readers keep the last exact state while Kafka is away.
`POST /sql` with ``{"sql": "SELECT …"}`` answers ``{columns, types, rows, version, lsn, inexact, approximate, parked, truncated}``, an error
``{code, message, remedy}``. `GET /health` is 200 once there is a state to be seen. Both are 503 before.

A page in somebody's browser can reach a loopback address too: only JSON bodies are read, which a browser does not
send across sites unasked, and on a loopback address only loopback names are answered.
"""

from __future__ import annotations

import asyncio
import atexit
import ipaddress
import logging
import socket
import threading
from typing import Any

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headrace.change import format_lsn
from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace.settings import Settings
from headrace.stores.duckdb import Database, query, shown

__all__ = ["serve"]

log = logging.getLogger(__name__)

ROWS = 10_000
"""Most rows of an answer."""
SECONDS = 30.0
"""Longest time of a query."""
_BODY_BYTES = 1_000_000
_QUERIES = 4
_STATUS = {"sql-too-slow": 408, "sql-too-large": 413}

_serving: dict[tuple[str, str], Endpoint] = {}
_starting = threading.Lock()


def serve(settings: Settings) -> None:
    """Answer at `warehouse_listen` for the file `warehouse`, from now until the process ends; again does nothing.

    Raises:
        Misconfigured: `warehouse-listen`: the address is taken or none.
    """
    key = (settings.warehouse_listen, settings.warehouse)
    with _starting:
        if key not in _serving:
            _serving[key] = Endpoint(settings)


def stop() -> None:
    """Stop answering and give the files back."""
    with _starting:
        while _serving:
            _serving.popitem()[1].stop()


atexit.register(stop)


class Endpoint:
    """A server in a thread."""

    def __init__(self, settings: Settings, *, rows: int = ROWS, seconds: float = SECONDS) -> None:
        """Listen and begin to answer.

        Args:
            settings: `warehouse`, `warehouse_memory` and `warehouse_listen`; port 0 takes a free one.
            rows: Most rows of an answer.
            seconds: Longest time of a query.
        """
        self._rows = rows
        self._seconds = seconds
        self._queries = threading.BoundedSemaphore(_QUERIES)
        self._socket = _bound(settings.warehouse_listen)
        self.host, self.port = self._socket.getsockname()[:2]
        try:
            self._database = Database.opened(settings.warehouse, settings.warehouse_memory)
        except HeadraceError:
            self._socket.close()
            raise
        config = uvicorn.Config(self._app(), log_config=None, access_log=False, lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="warehouse-sql", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop answering, and give the file back."""
        self._server.should_exit = True
        self._thread.join(5)
        self._socket.close()
        self._database.release()

    def _app(self) -> Starlette:
        routes = [Route("/sql", self._sql, methods=["POST"]), Route("/health", self._health, methods=["GET"])]
        return Starlette(routes=routes, middleware=_middleware(self.host))

    async def _sql(self, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _error(
                HeadraceError("sql-refused", "The body must be JSON.", "Set Content-Type: application/json."), 415
            )
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _BODY_BYTES:
                return _error(HeadraceError("sql-refused", f"The body is larger than {_BODY_BYTES} bytes."), 413)
        return await run_in_threadpool(self._answer, body)

    def _answer(self, body: bytes) -> Response:
        try:
            return _json(self._query(_statement(body)))
        except HeadraceError as error:
            return _error(error, 503 if isinstance(error, Transient) else _STATUS.get(error.code, 400))

    def _query(self, sql: str) -> dict[str, Any]:
        if not self._queries.acquire(timeout=self._seconds):
            raise Transient("sql-too-slow", f"{_QUERIES} other queries are running.", "Try again.")
        try:
            found = query(self._database, sql, rows=self._rows, seconds=self._seconds)
        finally:
            self._queries.release()
        return {
            "columns": found.columns,
            "types": found.types,
            "rows": found.rows,
            "version": str(found.version),
            "lsn": format_lsn(found.version.lsn),
            "inexact": found.inexact,
            "approximate": found.approximate,
            "parked": found.parked,
            "truncated": found.truncated,
        }

    async def _health(self, _request: Request) -> Response:
        try:
            # Not in the threads of the queries, which may all be waiting.
            version = await asyncio.get_running_loop().run_in_executor(None, shown, self._database)
        except Transient as error:
            return _error(error, 503)
        return _json({"status": "live", "version": str(version), "lsn": format_lsn(version.lsn)})


def _statement(body: bytes) -> str:
    try:
        sql = orjson.loads(body)["sql"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise HeadraceError("sql-refused", f"The body is not {{'sql': …}}: {error!r}.") from error
    if not isinstance(sql, str):
        raise HeadraceError("sql-refused", "The statement must be a string.")
    return sql


def _middleware(host: str) -> list[Middleware]:
    if not ipaddress.ip_address(host).is_loopback:
        return []
    names = ["localhost", "127.0.0.1", host, f"[{host}]"]
    return [Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)]


def _bound(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    try:
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        server = socket.socket(address[0], socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Every connection takes it over. Without, each answer waits 40 ms until its headers are acknowledged.
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.bind(address[4])
        server.listen()
    except (OSError, OverflowError, ValueError) as error:
        raise Misconfigured(
            "warehouse-listen",
            f"The warehouse cannot listen at {listen!r}: {error}.",
            "Stop what uses the port, or set HEADRACE_WAREHOUSE_LISTEN=host:port.",
        ) from error
    return server


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")


def _error(error: HeadraceError, status: int) -> Response:
    return _json({"code": error.code, "message": error.message, "remedy": error.remedy}, status)
