"""What `make bench-views` measures, in which order: each view from zero against a loader that does only that, and the live path.

headrace against headrace comes first: what it gives twice says how much a ratio is worth. Then both in turn; each pair gives one ratio,
their median counts. Time is from the start of a process until readers see all of it, for both.
"""

from __future__ import annotations

import http.client
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import elasticsearch
import orjson
import redis

from bench import live, loaders, servers, source
from bench.live import Shown
from bench.measure import Say
from bench.pgsync import INDEX as PGSYNC_INDEX
from bench.pgsync import Pgsync
from bench.program import Program
from bench.source import Source
from bench.tools import PATIENCE, Headrace
from headrace.errors import Poison, Transient
from headrace.settings import Settings, environment
from headrace_ops import Stack, ports

PARTS: Final = ("search", "pages", "warehouse", "joined", "live", "backlog")
_VIEWS: Final = {"search": "OrderSearch", "pages": "OrderPages", "joined": "ProductSearch"}
_NAMES: Final = {"search": "order_search", "pages": "order_pages", "joined": "product_search", "warehouse": "warehouse"}
_FILE: Final = Path(__file__).with_name("viewed.py")
_INTERVAL = 0.1


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    rows: int = 500_000
    products: int = 500_000
    reviews: int = 1_000_000
    backlog: int = 50_000
    rate: int = 200
    seconds: int = 30
    warm: int = 10
    pairs: int = 3


FULL: Final = Sizes()
QUICK: Final = Sizes(rows=30_000, products=20_000, reviews=40_000, backlog=5_000, seconds=5, warm=3, pairs=1)


@dataclass(frozen=True, slots=True)
class Run:
    """One filling of a view.

    Attributes:
        kind: By whom.
        count: Documents, pages or rows.
        seconds: From the start of the process until readers saw all of them.
        cpu: Seconds of the processor that it used, without the servers.
        peak: Most bytes of memory resident.
    """

    kind: str
    count: int
    seconds: float
    cpu: float
    peak: int

    @property
    def rate(self) -> float:
        """Return how many a second."""
        return self.count / self.seconds

    def told(self) -> str:
        """Return it in one line."""
        used = f"{self.cpu:.1f} CPU s, {self.peak / 1e6:.0f} MB"
        return f"{self.kind}: {self.count:,} in {self.seconds:.1f} s, {self.rate:,.0f}/s, {used}"


@dataclass(frozen=True, slots=True)
class Part:
    """What one part gave: of headrace against itself, in pairs with the other, what a loader needs where the other is none; of the live
    path each view alone, and all at once."""

    name: str
    again: list[Run] = field(default_factory=list)
    pairs: list[tuple[Run, Run]] = field(default_factory=list)
    limits: list[Run] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    together: list[Shown] = field(default_factory=list)


class Views:
    """Runs parts on servers that run."""

    def __init__(self, stack: Stack, folder: Path, sizes: Sizes, say: Say) -> None:
        """Keep outputs and local state in `folder`."""
        self._postgres, self._kafka = servers.postgres(stack), servers.kafka(stack)
        self._search = elasticsearch.Elasticsearch(stack.server("elasticsearch").address(), request_timeout=60)
        self._pages = redis.Redis.from_url(stack.server("redis").address(), decode_responses=True)
        self._servers = (stack.server("elasticsearch").address(), stack.server("redis").address())
        self._folder = folder
        self._sizes = sizes
        self._say = say
        self._runs = 0
        self._orders: Headrace | None = None

    def run(self, name: str) -> Part:
        """Run one part."""
        if name == "live":
            return self._live()
        if name == "backlog":
            return self._backlog()
        if name == "joined":
            return self._joined()
        tool, rows = self._captured_orders(), self._sizes.rows
        part = Part(name)
        part.again.extend(self._told(self._build(tool, name, rows)) for _ in range(2))
        for _ in range(self._sizes.pairs):
            ours = self._told(self._build(tool, name, rows))
            part.pairs.append((ours, self._told(self._load(tool, name, rows))))
        return part

    # From zero

    def _build(self, tool: Headrace, view: str, count: int) -> Run:
        """Build a view from nothing; take it away again."""
        with self._view(tool, view) as (program, settings):
            self._full(program, settings, view, count)
            return self._run_of("headrace", program, count)

    def _load(self, tool: Headrace, view: str, count: int) -> Run:
        settings, topics = self._settings(tool), tool.topics[: 2 if view == "joined" else 1]
        environ = environment(settings) | {"PYTHONPATH": loaders.FOLDER}
        program = Program(f"loader-{view}", loaders.command(view, *topics), self._folder, environ)
        program.wait(PATIENCE)
        run = self._run_of("loader", program, count)
        found = self._loaded(settings, view)
        if found != count:
            raise Poison("bench-missing", f"The loader of {view} has {found} of {count}.", "Run it again.")
        self._clear()
        return run

    def _joined(self) -> Part:
        sizes = self._sizes
        origin = source.products(self._postgres, "joined", sizes.products, sizes.reviews)
        part = Part("joined")
        with self._captured(origin) as tool:
            part.again.extend(self._told(self._build(tool, "joined", sizes.products)) for _ in range(2))
            for _ in range(sizes.pairs):
                ours = self._told(self._build(tool, "joined", sizes.products))
                part.pairs.append((ours, self._told(self._pgsync(tool, sizes.products))))
                part.limits.append(self._told(self._load(tool, "joined", sizes.products)))
        return part

    def _pgsync(self, tool: Headrace, count: int) -> Run:
        settings = self._settings(tool)
        folder = Path(settings.state)
        theirs = Pgsync(settings, folder)
        program = theirs.load()
        program.wait(6 * PATIENCE)
        run = self._run_of("pgsync", program, count)
        self._search.indices.refresh(index=PGSYNC_INDEX)
        found = self._search.count(index=PGSYNC_INDEX)["count"]
        if found != count:
            raise Poison("bench-missing", f"pgsync has {found} of {count} documents.", program.said()[-2000:])
        theirs.teardown()
        self._clear()
        return run

    # The live path

    def _live(self) -> Part:
        part = Part("live")
        origin = source.orders(self._postgres, "live", live.ROWS)
        with ExitStack() as stack:
            tool = stack.enter_context(self._captured(origin))
            stack.enter_context(tool.awake())
            for views in ([view] for view in live.ASKS):
                part.shown.extend(self._followed(tool, views))
            part.together.extend(self._followed(tool, list(live.ASKS)))
        return part

    def _followed(self, tool: Headrace, views: Sequence[str]) -> Iterator[Shown]:
        """Yield how soon some views that run at the same time show what changes."""
        sizes = self._sizes
        with ExitStack() as stack:
            asks: dict[str, live.Ask] = {}
            for view in views:
                program, settings = stack.enter_context(self._view(tool, view))
                self._full(program, settings, view, live.ROWS)
                asks[view] = live.ASKS[view](settings)
            self._say(f"{', '.join(views)}: {sizes.rate} transactions a second for {sizes.warm} + {sizes.seconds} s")
            measured = live.Live(tool.source, self._kafka, tool.topics[0], asks)
            for one_view in measured.measure(sizes.rate, sizes.seconds, sizes.warm):
                self._say(f"  {one_view.told()}", lasting=True)
                yield one_view

    def _backlog(self) -> Part:
        """Drain one-row updates into Elasticsearch; the consumer was off while they came."""
        sizes, part = self._sizes, Part("backlog")
        origin = source.orders(self._postgres, "backlog", sizes.backlog)
        change = source.change(origin, sizes.backlog, 1)
        with self._captured(origin) as tool:
            for _ in range(2 + sizes.pairs):
                part.again.append(self._told(self._drain(tool, change)))
        return part

    def _drain(self, tool: Headrace, change: Callable[[int], dict[str, int]]) -> Run:
        count = self._sizes.backlog
        with self._view(tool, "search") as (program, settings):
            self._full(program, settings, "search", count)
            program.stop()
            with tool.awake():
                change(count)
                lsn = tool.source.lsn()
                self._wait(lambda: tool.streams_to(lsn))
            oldest = int(tool.source.value("SELECT min(quantity) FROM orders"))
            again = self._start("search", settings)
            self._until(again, lambda: self._newer(oldest) == count)
            run = self._run_of("headrace", again, count)
            again.stop()
        return run

    def _newer(self, oldest: int) -> int:
        newer = {"range": {"quantity": {"gte": oldest}}}
        return int(self._search.count(index=_NAMES["search"], query=newer)["count"])

    # Programs

    @contextmanager
    def _view(self, tool: Headrace, view: str) -> Iterator[tuple[Program, Settings]]:
        """Run a consumer with nothing that it has made before; take away what it makes."""
        settings = self._settings(tool)
        program = self._start(view, settings)
        try:
            yield program, settings
        finally:
            program.stop()
            self._clear()

    def _start(self, view: str, settings: Settings) -> Program:
        self._runs += 1
        what = ["warehouse"] if view == "warehouse" else ["--consumer", f"{_FILE}:{_VIEWS[view]}"]
        command = [sys.executable, "-m", "headrace", "run", *what]
        return Program(f"{view}-{self._runs}", command, self._folder, environment(settings))

    def _settings(self, tool: Headrace) -> Settings:
        self._runs += 1
        state = self._folder / f"state-{self._runs}"
        state.mkdir()
        return replace(
            tool.settings,
            elasticsearch=self._servers[0],
            redis=self._servers[1],
            state=str(state),
            warehouse=str(state / "warehouse.duckdb"),
            warehouse_listen=f"{ports.HOST}:{ports.choose()}",
        )

    def _clear(self) -> None:
        names = f"order_search*,product_search*,{loaders.INDEX},{PGSYNC_INDEX}"
        for index in self._search.indices.get(index=names, ignore_unavailable=True):
            self._search.indices.delete(index=index)
        self._pages.flushall()

    # Counting

    def _count(self, settings: Settings, view: str) -> int:
        """Return how many readers of the live view see; 0 while none is live."""
        if view == "warehouse":
            return _rows(settings)
        if view == "pages":
            return int(self._pages.dbsize()) - 3 if self._pages.get("order_pages:live") else 0
        with suppress(elasticsearch.NotFoundError):
            return int(self._search.count(index=_NAMES[view])["count"])
        return 0

    def _loaded(self, settings: Settings, view: str) -> int:
        if view == "warehouse":
            return loaders.count(settings)
        if view == "pages":
            return int(self._pages.dbsize())
        return int(self._search.count(index=loaders.INDEX)["count"])

    def _captured_orders(self) -> Headrace:
        """Return the orders with their log, made once for all parts."""
        if self._orders is None:
            self._orders = self._capture(source.orders(self._postgres, "orders", self._sizes.rows))
        return self._orders

    @contextmanager
    def _captured(self, origin: Source) -> Iterator[Headrace]:
        tool = self._capture(origin)
        yield tool
        tool.drop()

    def _capture(self, origin: Source) -> Headrace:
        tool = Headrace(origin.dsn.rpartition("/")[2], origin, self._kafka, self._folder)
        self._say(f"{tool.name}: capturing")
        tool.prepare()
        with tool.awake():
            pass
        return tool

    def _run_of(self, kind: str, program: Program, count: int) -> Run:
        return Run(kind, count, time.monotonic() - program.started_at, program.cpu(), program.peak())

    def _full(self, program: Program, settings: Settings, view: str, count: int) -> None:
        self._until(program, lambda: self._count(settings, view) == count)

    def _until(self, program: Program, reached: Callable[[], bool]) -> None:
        def look() -> bool:
            program.check()
            program.peak()
            return reached()

        self._wait(look)

    def _wait(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not reached():
            if time.monotonic() > deadline:
                raise Transient("bench-slow", f"This takes longer than {PATIENCE:.0f} s.", "Run it again.")
            time.sleep(_INTERVAL)

    def _told(self, run: Run) -> Run:
        self._say(f"  {run.told()}", lasting=True)
        return run


def _rows(settings: Settings) -> int:
    connection = http.client.HTTPConnection(settings.warehouse_listen, timeout=10)
    body = orjson.dumps({"sql": "SELECT count(*) FROM orders"})
    with suppress(OSError, KeyError, http.client.HTTPException):
        connection.request("POST", "/sql", body, {"Content-Type": "application/json"})
        return int(orjson.loads(connection.getresponse().read())["rows"][0][0])
    return 0
