"""Control: how everybody else talks to the process that runs a view [I13].

One compacted topic, `headrace.control`. Keys are ``{"source","name","kind","id"}``:

- ``report``, id = generation (or 0 for a service): what the runner says of it every second;
- ``request``, id = a unique text: what somebody asks of the runner of `name`; tombstoned by the runner when it has answered;
- ``answer``, id = the request's: what the runner says to it (not to ``leave``: who asked for a scan is gone);
- ``clock``: a tombstone, for the broker's time of it, when the clock here may differ: ages are counted by the broker's clock;
- anything else is a service's own memory, kept beside them (capture's ``resnapshot`` and ``catalogue``, written in its cuts; a
  runner's ``standing``: whether its view is to stay paused or dropped; and ``shown``: which generations readers have seen).

Kafka has no compare-and-set, so there is one writer of reports and answers for each name: its runner (S30), or who has one forgotten that
nobody can run. A report older than `DEAD_SECONDS` is of a process that died. All but what capture writes in its cuts is read whether a
cut is open or not: one that a killed capture has left would hide every later report, of whatever source, until Kafka ends it.

Rows go to `headrace.answers`, in pages keyed by the request's id: a page has as many rows as fit into PAGE_BYTES, and one at least.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from headrace import codec
from headrace.change import NOWHERE, Version
from headrace.consumer import ViewRow
from headrace.errors import HeadraceError, Misconfigured, Poison, Transient
from headrace.log import Log
from headrace.log.plain import PlainWriter, shared
from headrace.log.tail import BEGINNING, Tail, end_of_partition, read_to_end
from headrace.log.topics import ANSWERS, CONTROL
from headrace.requests import Request, RequestBox

DEAD_SECONDS = 10.0
_LOOK_SECONDS = 2.0
_AGREE_SECONDS = 2.0
_CLOCK_SECONDS = 60.0
_CUT_ENDS_SECONDS = 90.0  # one that a killed capture has left: after a minute (`transaction.timeout.ms`), and ten seconds until Kafka looks
PAGE_BYTES = 512 * 1024
LEAVE = "leave"  # it has no answer: who asked for a scan reads it no more
_KINDS = {"Transient": Transient, "Misconfigured": Misconfigured, "Poison": Poison}


@dataclass(slots=True)
class Report:
    """What a process says of one generation, or of itself (a service: generation 0).

    Attributes:
        phase: ``loading``, ``catching up``, ``live``, ``following`` (up to date, not live), ``paused``, ``waiting`` (a server
            is away), ``stopped`` (with reason), ``stale`` (built by other code), ``dropped`` (generation 0: there is none, and none is
            begun before it is asked for); for capture also ``snapshot`` and ``streaming``.
            Readers of reports see ``dead`` when it is old.
        lag: records, wal (bytes), seconds: what `headrace.log.Lag` says.
        rate: Changes applied a second, over the last seconds.
        eta: Seconds until it has caught up, -1 when unknown.
        progress: (done, total) of long work, (0, 0) when there is none.
        reason, code, remedy: Why it stopped, or it or its snapshot waits; of one that follows, why it is not promoted though none is live.
        facts: What a service adds.
        ended: The process has ended by itself, and this is its last word.
        process: Which process wrote it; empty of an older headrace's.
        age, at: Seconds since it was written; the broker's time of that, ms.
    """

    name: str
    generation: int = 0
    fingerprint: str = ""
    live: bool = False
    phase: str = "starting"
    version: Version = NOWHERE
    lag: tuple[int, int, float] = (0, 0, 0.0)
    rate: float = 0.0
    eta: float = -1.0
    progress: tuple[int, int] = (0, 0)
    reason: str = ""
    code: str = ""
    remedy: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    ended: bool = False
    process: str = ""
    age: float = 0.0
    at: int = 0

    @property
    def shows(self) -> float:
        """How old the state that a view shows was when this was written, seconds, both by the broker's clock; 0 when there is none."""
        written: int = self.facts.get("written_ms", self.at)
        return max(0.0, (self.at - written) / 1000)

    @property
    def dead(self) -> bool:
        """Whether the process that wrote it no longer writes."""
        return self.age > DEAD_SECONDS and self.phase not in {"stopped", "off"}

    @property
    def heard(self) -> bool:
        """Whether the process that wrote it has said something lately, and not that it ends."""
        return self.age <= DEAD_SECONDS and not self.ended

    @property
    def gone(self) -> bool:
        """Whether it is of a service that runs no more: dead, stopped or ended."""
        return self.dead or self.phase in {"stopped", "off"}


class Control:
    """Reads and writes `headrace.control` for one source.

    Attributes:
        ahead: By how many seconds the clock here is ahead of the broker's, by which records are timed; 0 while nothing hints that it is.
    """

    def __init__(self, log: Log) -> None:
        """Connect to nothing yet."""
        self._log = log
        self._source = log.settings.source
        self._writer = PlainWriter(log.settings)
        self._asked = 0.0
        self.ahead = 0.0

    def kept(
        self, name: str, *kinds: str, committed: bool = True, wait: Callable[[], None] | None = None
    ) -> list[dict[str, dict[str, Any]]]:
        """Return the records of each of `kinds` that the service `name` keeps for itself, by id, oldest first; of cuts the `committed`.

        Behind the first record of an open cut, of any source, nothing is shown: who must know all waits for it, and calls `wait` meanwhile.
        """
        found: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in kinds}
        for (kind, who, id_), (_, value) in self._newest(*kinds, committed=committed, wait=wait).items():
            if who == name:
                found[kind][id_] = value
        return list(found.values())

    def keep(self, name: str, kind: str, value: dict[str, Any] | None, id_: str = "") -> None:
        """Keep a record of the service `name` for itself, None to take it away. Raises Transient: `kafka-away`."""
        self._writer.write(CONTROL, self._key(name, kind, id_), codec.dumps(value) if value is not None else None)

    # What a runner does

    def report(self, report: Report) -> None:
        """Publish what a generation or a service says of itself; does not wait for Kafka."""
        value = asdict(report) | {"version": list(report.version)}
        del value["age"], value["at"]
        self._put(self._key(report.name, "report", str(report.generation)), value)

    def forget(self, name: str, generation: int) -> None:
        """Take the report of a dropped generation away."""
        self._put(self._key(name, "report", str(generation)), None)

    def requests(self, names: Sequence[str]) -> RequestBox:
        """Return the requests to `names` that nobody has answered, and then those that come."""
        return RequestBox(self._log, set(names))

    def answer(self, name: str, request: Request, value: dict[str, Any]) -> None:
        """Answer a request, by `refusal` too, and take it away. Raises Transient: `kafka-away`."""
        self._writer.write(CONTROL, self._key(name, "answer", request.id), codec.dumps(value))
        self.take_away(name, request)

    def take_away(self, name: str, request: Request) -> None:
        """Take a request away. Raises Transient: `kafka-away`."""
        self._request(name, request.id, None)

    def send_rows(self, request: Request, rows: Sequence[ViewRow], *, last: bool) -> int:
        """Send rows that were asked for, in pages; `last` ends them. Return how many bytes they are.

        Raises:
            Transient: `kafka-away`; Misconfigured: `record-too-large`, by the row; and what else Kafka refuses a page with.
        """
        page: list[bytes] = []
        size = sent = 0
        ends = ("", "")
        for row in rows:
            made = codec.dumps((*row[:3], list(row.version)))
            if page and size + len(made) > PAGE_BYTES:
                self._send_page(request, page, ends, last=False)
                page, size = [], 0
            page.append(made)
            ends = row[:2]
            size += len(made)
            sent += len(made)
        self._send_page(request, page, ends, last=last)
        return sent

    def break_off(self, request: Request, error: HeadraceError) -> None:
        """End rows by an error, which is raised where they are read."""
        self._writer.write(ANSWERS, request.id.encode(), codec.dumps(refusal(error)))

    def _send_page(self, request: Request, rows: Sequence[bytes], ends: tuple[str, str], *, last: bool) -> None:
        """Send a page; `ends` is its last row, and the only one of a page that is too large."""
        page = b'{"rows":[%b],"last":%b}' % (b",".join(rows), b"true" if last else b"false")
        try:
            self._writer.write(ANSWERS, request.id.encode(), page)
        except Misconfigured as error:
            said = f"Sending the row {ends[1]} of {ends[0] or 'the view'}, {len(page)} bytes: {error.message}"
            raise Misconfigured(error.code, said, error.remedy) from error

    # What everybody else does

    def reports(self) -> dict[str, list[Report]]:
        """Return the newest report of each generation and service, by name, oldest generation first."""
        found: dict[str, list[Report]] = {}
        reports = self._newest("report")
        now = self._now(max((timestamp for timestamp, _ in reports.values()), default=0) / 1000)
        for key, (timestamp, value) in sorted(reports.items(), key=lambda item: int(item[0][2])):
            lag, progress = tuple(value["lag"]), tuple(value["progress"])
            value |= {"version": Version(*value["version"]), "lag": lag, "progress": progress}
            report = Report(**codec.fields_of(Report, value), age=max(0.0, now - timestamp / 1000), at=timestamp)
            found.setdefault(key[1], []).append(report)
        return found

    def _now(self, newest: float) -> float:
        """Return the broker's time, seconds. The clock here is believed if somebody has reported just now by it; else it is compared."""
        if not self._asked or time.monotonic() - self._asked > _CLOCK_SECONDS:
            self._asked = self.ahead = 0.0
            if newest and abs(time.time() - newest) > _AGREE_SECONDS:
                self._asked = time.monotonic()
                with suppress(HeadraceError):  # who may only read has but the clock here
                    written = self._writer.write(CONTROL, self._key("clock", "clock", ""), None)
                    self.ahead = time.time() - written / 1000
        return time.time() - self.ahead

    def running(self, name: str) -> list[Report]:
        """Return the reports of a consumer whose process is alive.

        Raises:
            Misconfigured: `consumer-not-running`, `capture-not-running`, or what stopped its process.
        """
        found = self.reports().get(name, [])
        if alive := [report for report in found if report.heard]:
            return alive
        command = f"Run: {command_of(name)}"
        for report in sorted(found, key=lambda report: report.live, reverse=True):
            if report.phase == "stopped":
                said = f"{name} has stopped, and its process with it: {report.reason}"
                raise Misconfigured(
                    report.code, said, f"{report.remedy.removesuffix('.')}. It has to run for that. {command}"
                )
        if name == "capture":
            raise Misconfigured("capture-not-running", "No capture runs.", command)
        raise Misconfigured("consumer-not-running", f"No process runs the consumer {name}.", command)

    def ask(self, name: str, verb: str, args: dict[str, Any] | None = None, timeout: float = 30.0) -> dict[str, Any]:
        """Send a request to the runner of `name` and wait for its answer.

        Raises:
            Misconfigured: as `running`, also when its process ends meanwhile; and whatever the runner refuses it with.
            Transient: `no-answer`, when none comes within `timeout` seconds.
        """
        self.running(name)
        request = uuid.uuid4().hex
        # An answer of capture is not heard before what it has written in its cut can be read.
        tail = Tail(self._log.settings, {(CONTROL, 0): self._end(CONTROL)}, committed=name == "capture")
        try:
            self._request(name, request, {"verb": verb, "args": args or {}, "timeout": timeout})
            key = self._key(name, "answer", request)
            value = next(_values(tail, key, timeout, name, lambda: self.running(name)))
        except BaseException:  # who is told so, or no longer waits, must not see it carried out later
            with suppress(HeadraceError):
                self._request(name, request, None)
            raise
        finally:
            tail.close()
        with suppress(Transient):  # only tidied up: what was answered is known
            self._writer.write(CONTROL, key, None)
        return _answer(value)

    def scan(self, name: str, generation: int | None = None, timeout: float = 60.0) -> Iterator[ViewRow]:
        """Yield the rows of a generation (the live one when None) as its readers see them, in (collection, key) order.

        The runner reads on between pages, so the rows are not all of one moment: each carries its version.

        Args:
            name: The consumer.
            generation: Which one.
            timeout: Longest wait for a page, seconds.
        """
        with self.stream(name, "scan", {"generation": generation}, timeout) as (answer, rows):
            try:
                yield from rows
            except BaseException:  # the rows that are left would be sent for nobody
                with suppress(HeadraceError):
                    self._request(name, uuid.uuid4().hex, {"verb": LEAVE, "args": {"rows": answer["rows"]}})
                raise

    def rows(
        self, name: str, generation: int, keys: Sequence[tuple[str, str]], timeout: float = 30.0
    ) -> tuple[Version, dict[tuple[str, str], ViewRow]]:
        """Return some rows of a generation by (collection, key), as readers see them, and the version of the state that they are of.

        That is NOWHERE while it is not certain, shortly after an error. They are in memory at once here and there: ask for few.
        """
        with self.stream(name, "rows", {"generation": generation, "keys": list(keys)}, timeout) as (answer, rows):
            return Version(*answer["version"]), {(row.collection, row.key): row for row in rows}

    def counts(self, name: str, generation: int, timeout: float = 150.0) -> tuple[Version, dict[str, int]]:
        """Return how many rows each collection of a generation has, and the version of the state that was counted, as `rows` does."""
        answer = self.ask(name, "count", {"generation": generation}, timeout)
        return Version(*answer["version"]), answer["counts"]

    @contextmanager
    def stream(
        self, name: str, verb: str, args: dict[str, Any], timeout: float
    ) -> Iterator[tuple[dict[str, Any], Iterator[ViewRow]]]:
        """Ask for what is answered by rows: give the answer, and the rows as they come after it. Errors are those of `ask`."""
        tail = Tail(self._log.settings, {(ANSWERS, 0): self._end(ANSWERS)})
        try:
            answer = self.ask(name, verb, args, timeout)
            values = _values(tail, str(answer["rows"]).encode(), timeout, name, lambda: self.running(name))
            yield answer, _pages(values)
        finally:
            tail.close()

    def flush(self, seconds: float = 15.0) -> None:
        """Wait up to `seconds` until what was written is in Kafka. Raises Transient: `kafka-away`."""
        self._writer.flush(seconds)

    def _request(self, name: str, request: str, said: dict[str, Any] | None) -> None:
        value = None if said is None else codec.dumps(said)
        self._writer.write(CONTROL, self._key(name, "request", request), value)

    def _put(self, key: bytes, value: dict[str, Any] | None) -> None:
        self._writer.send(CONTROL, key, codec.dumps(value) if value is not None else None)

    def _key(self, name: str, kind: str, id_: str) -> bytes:
        return record_key(self._source, name, kind, id_)

    def _end(self, topic: str, *, committed: bool = True) -> int:
        with shared():
            return self._log.topics.ends({topic: 1}, committed=committed)[topic][0]

    def _newest(
        self, *kinds: str, committed: bool = False, wait: Callable[[], None] | None = None
    ) -> dict[tuple[str, str, str], tuple[int, dict[str, Any]]]:
        if CONTROL not in self._log.topics.names():
            return {}
        found: dict[tuple[str, str, str], tuple[int, dict[str, Any]]] = {}
        read = partial(read_to_end, self._log.settings, {(CONTROL, 0): BEGINNING}, committed=committed)
        if wait:
            ends = {(CONTROL, 0): self._end(CONTROL, committed=False)}
            read = partial(read, ends, timeout=_CUT_ENDS_SECONDS, idle=wait)
        for record in read():
            key = codec.loads(record.key)
            if key["source"] != self._source or key["kind"] not in kinds:
                continue
            place = (key["kind"], key["name"], key["id"])
            found.pop(place, None)
            if record.value is not None:
                found[place] = (record.timestamp, codec.loads(record.value))
        return found


def record_key(source: str, name: str, kind: str, id_: str) -> bytes:
    """Return the key of a record in control."""
    return codec.dumps({"source": source, "name": name, "kind": kind, "id": id_})


def _values(tail: Tail, key: bytes, timeout: float, name: str, look: Callable[[], object]) -> Iterator[dict[str, Any]]:
    """Yield the values written under `key` from now on, until none comes for `timeout` seconds or `look` raises."""
    looked = time.monotonic()
    deadline = looked + timeout
    while time.monotonic() < deadline:
        if time.monotonic() - looked > _LOOK_SECONDS:
            look()
            looked = time.monotonic()
        for message in tail.poll(0.2):
            value = None if end_of_partition(message) else message.value()
            if value is not None and message.key() == key:
                yield codec.loads(value)
                deadline = time.monotonic() + timeout  # from when it is waited for again
    raise Transient("no-answer", f"The runner of {name} said nothing for {timeout:.0f} s.", "See: headrace status")


def _pages(values: Iterator[dict[str, Any]]) -> Iterator[ViewRow]:
    for page in map(_answer, values):
        for collection, key, value, version in page["rows"]:
            yield ViewRow(collection, key, value, Version(*version))
        if page["last"]:
            return


def command_of(name: str) -> str:
    """Return the command that runs a service or a view."""
    return "headrace capture" if name == "capture" else f"headrace run {name}"


def refusal(error: HeadraceError) -> dict[str, Any]:
    """Return the answer that raises `error` where it was asked."""
    kind = next((kind for kind, cls in _KINDS.items() if isinstance(error, cls)), "Misconfigured")
    return {"error": {"kind": kind, "code": error.code, "message": error.message, "remedy": error.remedy}}


def _answer(value: dict[str, Any]) -> dict[str, Any]:
    error = value.get("error")
    if error:
        raise _KINDS[error["kind"]](error["code"], error["message"], error["remedy"])
    return value
