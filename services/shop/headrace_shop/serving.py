"""Putting the shop together: views to read, a way to write, a database, a server."""

from __future__ import annotations

import signal
import socket

import typer
import uvicorn

from headrace.errors import Misconfigured
from headrace.settings import Settings
from headrace.stores.elasticsearch import SearchReader
from headrace.stores.redis import PageReader
from headrace_shop import dual
from headrace_shop.views import Views, warehouse_sql
from headrace_shop.web import Shop
from headrace_shop.writes import LogWrites, Writes, pool


def serve(settings: Settings, dsn: str, mode: str, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        settings: Where the views are.
        dsn: The shop's database.
        mode: ``log`` or ``dual``.
        host: Where to listen.
        port: Where to listen; 0 takes a free port.

    Raises:
        Misconfigured: `shop-port`, when the port is taken.
    """
    with _listen(host, port) as listening:
        writes = make_writes(settings, dsn, mode)
        database = pool(dsn, 4)
        try:
            shop = Shop(views(settings, mode), writes, database)
            typer.echo(f"The shop is open at http://{host}:{listening.getsockname()[1]}/")
            config = uvicorn.Config(shop.application(), log_level="warning", timeout_graceful_shutdown=3)
            for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises again what it was ended by
                signal.signal(number, signal.SIG_IGN)
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            writes.close()
            database.close()


def make_writes(settings: Settings, dsn: str, mode: str) -> Writes:
    """Return the way of writing that `mode` names; the dual writer's stores are filled first."""
    if mode == "log":
        return LogWrites(dsn)
    writes = dual.DualWrites(settings, dsn)
    writes.fill()
    return writes


def views(settings: Settings, mode: str) -> Views:
    """Return the views to read: the consumers', or the dual writer's own."""
    prefix = dual.PREFIX if mode == "dual" else ""
    own = dual.own_settings(settings) if mode == "dual" else settings
    return Views(PageReader(own, f"{prefix}pages"), SearchReader(own, f"{prefix}search"), warehouse_sql(own))


def _listen(host: str, port: int) -> socket.socket:
    try:
        server = socket.create_server((host, port), backlog=100)
    except OSError as error:
        raise Misconfigured(
            "shop-port", f"The shop cannot listen on {host}:{port}: {error.strerror}.", "Give another --port."
        ) from error
    # Every connection takes it over. Without, each answer waits 40 ms until its headers are acknowledged.
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return server
