"""The cut-aligned reader against every log there can be: each state that it calls exact is one that the writer had (S18, S19)."""

from __future__ import annotations

import copy
import random
from collections import deque
from dataclasses import replace
from typing import Any

import pytest

from headrace import codec
from headrace.change import Change, Checkpoint, Column, Position, Source, TableSchema, Version
from headrace.consumer import ALL, Batch
from headrace.errors import Refused
from headrace.log import Log, spine
from headrace.log.reader import Reader
from headrace.log.spine import Named
from headrace.log.topics import checkpoints_topic, schemas_topic
from headrace.settings import Settings
from tests.fixtures.feed import encode_headers
from tests.fixtures.seeds import ASKED, seeds
from tests.fixtures.simulated import Broker, Place, SimulatedTopics, simulate

SOURCE = Source("7", 1, "shop", "headrace", "headrace")
SEEDS = seeds("0-59")
HOUR = 3_600_000
LAG, STAYS = HOUR, 20 * HOUR
State = dict[tuple[str, bytes], Any]


class Capture:
    """Writes cuts as capture does, and knows the state at each."""

    def __init__(self, broker: Broker, settings: Settings, chance: random.Random) -> None:
        self.broker, self.settings, self.chance = broker, settings, chance
        self.epoch, self.lsn, self.n = 1, 100, 0
        self.source = SOURCE
        self.ends: dict[str, list[int]] = {}
        self.rows: State = {}
        self.states: dict[Version, State] = {}
        self.named = Named()
        self.keys = deque[bytes]()
        self.pending: list[tuple[Place, int, bool]] = []
        self.schemas: dict[str, int] = {}
        for topic in (checkpoints_topic(settings.source), schemas_topic(settings.source)):
            broker.make(topic)

    @property
    def tables(self) -> list[str]:
        return [topic.removeprefix(f"{self.settings.source}.") for topic in self.ends]

    def add_table(self, table: str) -> None:
        topic = f"{self.settings.source}.{table}"
        self.broker.make(topic, self.chance.choice([1, 1, 2, 3]))
        self.ends[topic] = [0] * len(self.broker.topics[topic])

    def settle(self, most: int = 1000) -> None:
        """Write markers that are due: they come partition by partition."""
        for place, of, commit in self.pending[:most]:
            self.broker.mark(place, of, commit=commit)
        self.pending = self.pending[most:]

    def cut(self, changes: int, *, partial: bool = False, abort: bool = False) -> None:
        self.settle()
        of, places = self.broker.begin(), set[Place]()
        before = copy.deepcopy((self.rows, self.ends, self.schemas))
        begun = self.lsn
        self.lsn += self.chance.randint(1, 5) if changes or self.chance.random() < 0.7 else 0
        half = bool(changes) and partial
        for ordinal in range(changes):
            self._change(of, places, ordinal)
        if abort:
            self.rows, self.ends, self.schemas = before
            self.lsn = begun
        else:
            self._seal(of, places, Version(self.epoch, begun), partial=half)
        ended = [(place, of, not abort) for place in sorted(places)]
        self.chance.shuffle(ended)
        self.pending = ended

    def delete_all(self, *, partial: bool) -> None:
        """Delete every row, in one transaction."""
        self.settle()
        of, places, before = self.broker.begin(), set[Place](), Version(self.epoch, self.lsn)
        self.lsn += 1
        for ordinal, (table, key) in enumerate(list(self.rows)):
            self._put(of, places, ordinal, table, key, None)
        self._seal(of, places, before, partial=partial)
        self.pending = [(place, of, True) for place in sorted(places)]

    def _change(self, of: int, places: set[Place], ordinal: int) -> None:
        table = self.chance.choice(self.tables)
        if table not in self.schemas or self.chance.random() < 0.1:
            version = self.schemas[table] = self.schemas.get(table, 0) + 1
            shape = TableSchema(table, version, (Column("id", "integer"), Column("n", "integer")), ("id",))
            written = codec.encode_schema_key(shape), codec.encode_schema(shape)
            self._write((schemas_topic(self.settings.source), 0), *written, [], of, places)
        id_ = self.chance.randint(1, self.chance.choice([3, 12]))
        self.n += 1
        row = {"id": id_, "n": self.n} if self.chance.random() < 0.7 else None
        self._put(of, places, ordinal, table, codec.encode_key({"id": id_}), row)

    def _put(self, of: int, places: set[Place], ordinal: int, table: str, key: bytes, row: Any) -> None:
        topic = f"{self.settings.source}.{table}"
        place = topic, codec.decode_key(key)["id"] % len(self.ends[topic])
        headers = encode_headers(Version(self.epoch, self.lsn), ordinal, 7, self.schemas[table])
        self.rows.pop((table, key), None)
        if row:
            self.rows[table, key] = row
        value = codec.dumps({"op": "c" if row else "d", "after": row})
        self.ends[topic][place[1]] = self._write(place, key, value, headers, of, places)
        if row is None:
            self.ends[topic][place[1]] = self._write(place, key, None, headers, of, places)

    def _write(self, place: Place, key: bytes, value: bytes | None, headers: Any, of: int, places: set[Place]) -> int:
        places.add(place)
        return self.broker.write(place, key, value, headers, of)

    def _seal(self, of: int, places: set[Place], before: Version, *, partial: bool) -> None:
        version = before if partial else Version(self.epoch, self.lsn)
        ends = {topic: list(each) for topic, each in self.ends.items()}
        half = (self.lsn, 1) if partial else None
        made, named = self.named.choose(Checkpoint(version, 0, 7, ends, self.source, half, base=version.lsn))
        key = codec.encode_checkpoint_key(made)
        spine_ = checkpoints_topic(self.settings.source), 0
        self._write(spine_, key, codec.encode_checkpoint(made, named), [], of, places)
        if not partial:
            self.states[version] = dict(self.rows)
        if not self.keys or self.keys[-1] != key:
            self.keys.append(key)
        for old in spine.outdated(self.keys, 6):
            self._write(spine_, old, None, [], of, places)

    def restart(self) -> None:
        """Begin anew after the newest checkpoint."""
        self.settle()
        self.named, topics = Named(), SimulatedTopics(self.broker)
        self.keys = spine.kept(self.settings, topics, lambda: None)  # type: ignore[arg-type]  what it needs of topics

    def begin_epoch(self) -> None:
        """Go on from another server, whose LSNs may be lower."""
        self.restart()
        self.epoch, self.lsn = self.epoch + 1, self.chance.randint(1, self.lsn)
        self.source = replace(self.source, system_id=str(self.epoch))
        self.cut(self.chance.randint(0, 3))


class View:
    """A store with transactions: what it shows, what it has staged, and where it stands, all of it durable with each batch."""

    def __init__(self, log: Log, tables: Any, until: Version | None = None) -> None:
        self.log, self.tables, self.until = log, tables, until
        self.begin()

    def begin(self) -> None:
        self.shown: State = {}
        self.staged: list[Change] = []
        self.position: Position | None = None
        self.reader: Reader | None = None

    def poll(self) -> Batch | None:
        if self.reader is None:
            position = self.position.copy() if self.position else None
            reader = self.log.reader(self.tables, position, until=self.until)
            assert isinstance(reader, Reader)
            self.reader = reader
        batch = self.reader.poll(0.0)
        if batch is not None:
            self._apply(batch)
        return batch

    def _apply(self, batch: Batch) -> None:
        for change in batch.changes:
            assert (change.table, change.schema) in batch.schemas
        self.staged += batch.changes
        if batch.complete or batch.loading:
            for change in self.staged:
                self.shown.pop((change.table, change.key), None)
                if change.row is not None:
                    self.shown[change.table, change.key] = change.row
            self.staged = []
        self.position = batch.position.copy()
        if batch.complete:
            assert batch.position.version == batch.checkpoint.version  # type: ignore[union-attr]


class World:
    """A log, who writes it, and two views of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        monkeypatch.setattr(spine, "WHOLE_PARTITIONS", chance.choice([256, 2]))
        monkeypatch.setattr(spine, "WHOLE_EVERY", 4)
        self.broker = Broker(chance)
        kept = {"min_compaction_lag_ms": LAG, "delete_retention_ms": STAYS}
        settings = Settings(source="s", batch_records=chance.choice([1, 3, 50, 1000]), **kept)
        self.log = simulate(monkeypatch, self.broker, settings)
        self.capture = Capture(self.broker, settings, chance)
        self.broker.idle = lambda: self.capture.settle(1)
        self.capture.add_table("public.a")
        if chance.random() < 0.7:
            self.capture.add_table("public.b")
        self.capture.cut(chance.randint(0, 5))
        self.views = [View(self.log, ALL if chance.random() < 0.5 else ["public.a"]) for _ in range(2)]
        self.seen = self.refused = 0

    def run(self) -> None:
        doing = {
            self.cut: 25,
            self.mark: 10,
            self.wait: 10,
            self.compact: 15,
            self.add_table: 2,
            self.sweep: 0.5,
            self.capture.restart: 1,
            self.capture.begin_epoch: 0.5,
            self.kill: 6,
            self.replace: 2,
            self.read: 28,
        }
        for do in self.chance.choices(list(doing), list(doing.values()), k=self.chance.randint(20, 120)):
            do()
        self.capture.cut(0)
        self.capture.settle()
        for view in self.views:
            self.finish(view)

    def cut(self) -> None:
        chance = self.chance
        self.capture.cut(chance.choice([0, 1, 2, 10]), partial=chance.random() < 0.2, abort=chance.random() < 0.15)

    def mark(self) -> None:
        self.capture.settle(self.chance.randint(0, 3))

    def wait(self) -> None:
        self.broker.now += self.chance.choice([1000, LAG // 3, LAG + 1, 2 * LAG, LAG, STAYS // 2, STAYS + LAG])

    def compact(self) -> None:
        place = self.chance.choice(self.broker.places())
        if self.chance.random() < 0.5:
            self.broker.roll(place)
        of_spine = place[0].endswith((".checkpoints", ".schemas"))
        self.broker.compact(place, 0 if of_spine else LAG, 60_000 if of_spine else STAYS)

    def sweep(self) -> None:
        """Let tombstones go: what is deleted now, and two passes of the cleaner, each after a long time."""
        self.capture.cut(3)
        self.capture.settle()
        for _ in range(2):
            self.broker.now += STAYS + LAG
            for place in self.broker.places():
                self.broker.roll(place)
                self.broker.compact(place, LAG, STAYS)

    def add_table(self) -> None:
        if len(self.capture.tables) < 4:
            self.capture.add_table(f"public.t{len(self.capture.tables)}")

    def kill(self) -> None:
        self.chance.choice(self.views).reader = None

    def replace(self) -> None:
        until = self.chance.choice([None, *self.capture.states])
        self.views[self.chance.randrange(2)] = View(self.log, ALL, until)

    def read(self) -> None:
        view = self.chance.choice(self.views)
        for _ in range(self.chance.choice([1, 6, 20])):
            self.poll(view)

    def poll(self, view: View) -> None:
        try:
            batch = view.poll()
        except Refused as error:
            self.is_right(error, view)
            view.begin()
            self.refused += 1
            return
        if batch is not None and batch.complete:
            self.check(view)
            self.seen += 1

    def is_right(self, refusal: Refused, view: View) -> None:
        assert refusal.code in {"away-too-long", "build-too-slow"}, refusal
        fed = view.position.appended if view.position else 0
        assert self.broker.now - fed > STAYS, "no tombstone can be gone"

    def check(self, view: View) -> None:
        assert view.position is not None
        wanted = self.capture.states[view.position.version]
        if view.tables != ALL:
            wanted = {place: row for place, row in wanted.items() if place[0] in view.tables}
        assert view.shown == wanted, (view.position.version, view.until)

    def finish(self, view: View) -> None:
        """Without a limit it comes to the newest state."""
        for _ in range(1000 if view.until is None else 0):
            self.poll(view)
            self.broker.now += 10
            if view.position and view.position.version == max(self.capture.states):
                self.check(view)
                return
        assert view.until is not None, f"it stands at {view.position and view.position.version}"


@pytest.mark.parametrize("half", [False, True])
def test_a_state_whose_rows_were_deleted_so_long_ago_that_their_tombstones_are_gone_is_not_exact(
    half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing follows it any more; up to there because another view stands there, or because capture stopped amid a transaction."""
    world = World(monkeypatch, 1)
    capture, broker = world.capture, world.broker
    while not capture.rows:
        capture.cut(10)
    until = max(capture.states)
    capture.delete_all(partial=half)
    capture.settle()
    for _ in range(2):
        broker.now += STAYS + LAG
        for place in broker.places():
            broker.roll(place)
            if place[0] not in (checkpoints_topic("s"), schemas_topic("s")):
                broker.compact(place, LAG, STAYS, whole=True)
    view = View(world.log, ALL, None if half else until)
    assert not any(batch.complete for _ in range(50) if (batch := view.poll()))
    capture.cut(0)
    capture.settle()
    if half:
        world.finish(view)
        assert view.shown == {}


def test_a_log_that_lost_its_end_and_forgot_what_came_before_is_not_the_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new epoch grows past the view, and the checkpoints of the old one were trimmed, but for its last."""
    world = World(monkeypatch, 1)
    capture, broker = world.capture, world.broker
    view = View(world.log, ALL)
    ends = []
    for _ in range(2):
        capture.cut(10)
        capture.settle()
        ends.append({place: broker.at(place).end for place in broker.places()})
    world.finish(view)
    view.reader = None
    del ends[0][schemas_topic("s"), 0]  # capture knows which are there
    for place, end in ends[0].items():
        broker.truncate(place, end)
    capture.begin_epoch()
    for _ in range(60):
        capture.cut(5)
    capture.settle()
    spines = checkpoints_topic("s"), 0
    broker.roll(spines)
    broker.compact(spines, 0, 0, whole=True)
    assert sum(record.value is not None for record in broker.at(spines).records) < 20
    with pytest.raises(Refused, match="has lost the state"):
        view.poll()
    fresh = View(world.log, ALL)
    world.finish(fresh)


def history(monkeypatch: pytest.MonkeyPatch, seed: int) -> tuple[int, int]:
    """Run one; return how many states were seen, and how many views were refused."""
    world = World(monkeypatch, seed)
    world.run()
    return world.seen, world.refused


@pytest.mark.parametrize("seed", [564, 1001])
def test_what_was_found_stays_mended(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last state of an earlier epoch is there, and those after it were trimmed: a reader stops at one of these, a view is at one."""
    history(monkeypatch, seed)


def test_every_state_that_is_called_exact_is_one_that_the_writer_had(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = refused = 0
    for seed in SEEDS:
        try:
            states, refusals = history(monkeypatch, seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        finally:
            monkeypatch.undo()
        seen, refused = seen + states, refused + refusals
    assert seen > len(SEEDS)
    assert ASKED or refused > len(SEEDS) / 10, "views are away for too long, too"
