"""Documents of one row are written while a load goes on, to a store that says later what it does not take: in the end they are the rows."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace import codec
from headrace.change import Position, Row
from headrace.documents import Document, DocumentConsumer, Node, consumer, unshown
from headrace.errors import Poison, Transient
from headrace.settings import Settings
from headrace.stores import Doc
from tests.fixtures.documents import PRODUCTS, Memory, Products, World, linear
from tests.unit.test_documents import PRODUCT
from tests.unit.test_documents_parked import Moody, Runner


class Late(Memory):
    """A store whose bulks arrive with a later call, which is then told what they had that it refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.refuses: set[str] = set()
        self.refuses_of: set[str] = set()
        self.away = 0
        self._way: list[Sequence[Doc]] = []

    def open(self, generation: Any) -> Position | None:
        self._way.clear()  # of a process that is gone
        return super().open(generation)

    def write(self, docs: Sequence[Doc], position: Position | None, *, bulk: bool = False) -> None:
        self.away -= 1
        if self.away == 0:
            raise Transient("store-away", "It is away.")
        self.arrive(1 if bulk else 0)
        if bulk:
            self._way.append(list(docs))
            self._die("before")
            return
        self._arrive(docs)
        super().write([], position)

    def arrive(self, most: int = 0) -> None:
        while len(self._way) > most:
            try:
                self._arrive(self._way.pop(0))
            except Poison:
                with suppress(Poison):  # as `Sending` does: the others have arrived too, and nobody is told
                    while self._way:
                        self._arrive(self._way.pop(0))
                self._way.clear()
                raise

    def _arrive(self, docs: Sequence[Doc]) -> None:
        """A bulk is not atomic: what is not refused is written."""
        refused = [doc for doc in docs if doc.body and (doc.id in self.refuses or doc.body["name"] in self.refuses_of)]
        super().write([doc for doc in docs if doc not in refused], None, bulk=True)
        for doc in refused:
            raise Poison("document-refused", f"It refuses {doc.id}.", cursor=("", doc.id))


class Single(Moody):
    document = Document(PRODUCTS)

    def render(self, row: Node) -> Row:
        if row["id"] in self.moods:
            raise ValueError("not in the mood")
        return dict(row)


class Rows(Runner):
    """A world of documents that are rows."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.store: Any = Late()
        self.cls = type("Single", (Single,), {"store": self.store, "moods": set()})
        self.settings = Settings(state=folder)

    def expected(self) -> dict[str, Row]:
        return {str(key): row for key, row in self.log.rows[PRODUCTS].items()}

    def check(self) -> None:
        assert self.parked == set()
        assert self.store.bodies() == self.expected()

    def check_others(self) -> None:
        ids = {id_ for _, id_ in self.parked}
        found, wanted = self.store.bodies(), self.expected()
        assert {id_: found[id_] for id_ in found.keys() - ids} == {id_: wanted[id_] for id_ in wanted.keys() - ids}


@pytest.fixture(autouse=True, scope="module")
def chunks_of_two() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for module in (consumer, unshown):
            patch.setattr(module, "CHUNK", 2)
        yield


def put(world: Rows, number: int, name: str) -> None:
    world.log.put(PRODUCTS, number, {"id": number, "category_id": None, "name": name})


def test_documents_are_written_before_the_load_has_ended(tmp_path: Any) -> None:
    """And once each; a row that changes meanwhile, or goes, is as it is in the end."""
    world = Rows(str(tmp_path / "state"))
    for number in range(1, 9):
        put(world, number, "first")
    put(world, 2, "second")
    world.log.put(PRODUCTS, 3, None)
    world.log.put(PRODUCTS, 99, None)
    world.log.cut()
    world.run(piece=4, stop_after=2)
    assert world.store.position is None
    assert len(world.store.bodies()) > 3
    world.store.wipe()
    world.lose_local()
    world.store.written.clear()
    world.run(piece=4)
    world.check()
    assert sorted(doc.id for doc in world.store.written) == sorted([*"12345678", "2", "3"])


@pytest.mark.parametrize("cls", [Single, Products])
@pytest.mark.parametrize("first", ["from zero", "a reload"])
def test_a_load_for_an_empty_view_is_begun_anew_under_one_that_came_back(
    tmp_path: Any, cls: type[DocumentConsumer], first: str
) -> None:
    """The store was empty for a while; what was read meanwhile was shown there, and of what is gone nothing was kept."""
    world: Any = World(Settings(state=str(tmp_path / "state")), cls)
    for number in (1, 2):
        put(world, number, "first")
    world.log.cut()
    world.run()
    docs, position = dict(world.store.docs), world.store.position
    put(world, 1, "second")
    world.log.put(PRODUCTS, 2, None)
    put(world, 3, "first")
    world.log.cut()
    already = 1 if first == "a reload" else 0
    if already:
        world.lose_local()
    world.run(piece=1, stop_after=already or 10**9)
    world.log.compact()
    world.store.wipe()
    world.run(piece=1, stop_after=4 - already)
    world.store.docs, world.store.position = docs, position
    world.run()
    rows = world.log.rows
    expected = linear(rows) if cls is Products else {str(key): row for key, row in rows[PRODUCTS].items()}
    assert world.store.bodies() == expected


@pytest.mark.parametrize("first", ["from zero", "a reload"])
def test_a_kill_between_the_end_of_a_load_and_its_local_rows_is_no_reason_to_begin_anew(
    tmp_path: Any, first: str
) -> None:
    world: Any = World(Settings(state=str(tmp_path / "state")))
    for number in (1, 1, 1):
        put(world, number, "first")
    world.log.cut()
    if first == "a reload":
        world.run()
        world.lose_local()
        world.log.cut()
    world.run(piece=1, stop_after=2)
    world.run(piece=1, kill="after")
    assert world.store.position is not None
    at = world.opened_at()
    assert at is not None
    assert at.loading
    assert at.offsets == {"t": [2]}
    world.run()
    world.check()


def test_what_the_store_refuses_later_is_parked_and_nothing_else_is_missing(tmp_path: Any) -> None:
    """Refused are documents of early chunks and of the last one, one that cannot be rendered is among them."""
    world = Rows(str(tmp_path / "state"))
    for number in range(1, 30):
        put(world, number, "first")
    world.log.cut()
    world.store.refuses |= {"1", "6", "7", "27", "29"}
    world.moods.update({3, 28})
    world.run(piece=9)
    assert {id_ for _, id_ in world.parked} == {"1", "3", "6", "7", "27", "28", "29"}
    world.check_others()
    world.store.refuses.clear()
    world.moods.clear()
    world.retry()
    world.check()


def test_two_of_one_large_batch_are_parked_and_the_rest_goes_on(tmp_path: Any) -> None:
    """The later one in a bulk that is on its way when the first is known; live, and again from zero."""
    world = Rows(str(tmp_path / "state"))
    put(world, 1, "first")
    world.log.cut()
    world.run()
    for number in range(1, 12):
        put(world, number, "second")
    world.log.cut()
    world.store.refuses |= {"2", "8", "11"}
    world.run()
    assert {id_ for _, id_ in world.parked} == {"2", "8", "11"}
    world.check_others()
    world.store.wipe()
    world.run()
    assert {id_ for _, id_ in world.parked} == {"2", "8", "11"}
    world.check_others()


def test_a_document_that_was_refused_early_and_is_right_in_the_end_is_not_parked(tmp_path: Any) -> None:
    """Its bulk was on its way when the row changed."""
    world = Rows(str(tmp_path / "state"))
    world.store.refuses_of = {"bad"}
    put(world, 1, "bad")
    put(world, 2, "good")
    put(world, 1, "good")
    world.log.cut()
    world.run(piece=2)
    world.check()


def test_the_local_rows_can_be_opened_after_an_error_amid_the_documents(tmp_path: Any) -> None:
    """The cursor over what is touched lives on in the error's trace; the connection must not."""
    world = Rows(str(tmp_path / "state"))
    for number in range(1, 9):
        put(world, number, "first")
    world.log.cut()
    world.store.away = 2
    with pytest.raises(Transient) as kept:
        world.run()
    world.run()
    world.check()
    assert kept.value.code == "store-away"


class Weighed(Memory):
    """Notes how many bytes of documents it was given at once."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[int] = []

    def write(self, docs: Sequence[Doc], position: Position | None, *, bulk: bool = False) -> None:
        self.weights.append(sum(len(codec.dumps(doc.body)) for doc in docs))
        super().write(docs, position, bulk=bulk)


@pytest.mark.parametrize("cls", [Single, Products])
def test_what_a_store_is_given_at_once_is_bounded_in_bytes(
    cls: type[DocumentConsumer], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Early, at the end of a load, and in a large batch [I10]; many small ones go together."""
    monkeypatch.setattr(unshown, "CHUNK", 1_000)
    monkeypatch.setattr(unshown, "CHUNK_BYTES", 5_000)
    world = World(Settings(state=str(tmp_path / "state")), cls, Weighed())
    for name, most in (("x" * 1_000, 6_100), ("y" * 1_000, 6_100), ("z" * 3_000, 8_100), ("small", 5_100)):
        world.store.weights.clear()
        for number in range(1, 41):
            world.log.put(PRODUCTS, number, {"id": number, "category_id": None, "name": name})
        world.log.cut()
        world.run(piece=25)
        assert 0 < max(world.store.weights) <= most
        assert {body["name"] for body in world.store.bodies().values() if body} == {name}
    assert len(world.store.weights) <= 3


STEP = st.one_of(
    PRODUCT,
    st.tuples(st.just("mood"), st.frozensets(st.integers(1, 4), max_size=1)),
    st.tuples(st.just("refuse"), st.frozensets(st.sampled_from("1234"), max_size=2)),
    st.just(("retry",)),
    st.tuples(
        st.just("run"), st.sampled_from([None, None, "before", "middle", "after"]), st.integers(1, 5), st.integers(1, 9)
    ),
    st.sampled_from([("lose",), ("wipe",), ("compact",), ("run", None, 10**9, 10**9)]),
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEP, max_size=40))
def test_any_history_equals_the_rows(steps: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = Rows(f"{folder}/state")
        for step in steps:
            if step[0] == "mood":
                world.moods.clear()
                world.moods.update(step[1])
            elif step[0] == "refuse":
                world.store.refuses = set(step[1])
            elif step[0] == "retry":
                world.retry()
            else:
                world.take(step)
        world.moods.clear()
        world.store.refuses.clear()
        world.log.cut()
        world.run()
        world.check_others()
        world.retry()
        world.check()
