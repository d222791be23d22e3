"""Which worker or workers get a session or run, and what is said when none can."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.pool import Worker
from broker.routes import Stage, choose_home, choose_route
from codec.errors import MismatchError, UnavailableError
from codec.messages import ENCODINGS, Encodings
from codec.partition import Span
from codec.plan import ModelCard

CARD = ModelCard(name="tiny", fingerprint="f", blocks=6, hidden=4, samples={2: "aa", 3: "bb"})


def worker(name: str, start: int = 0, stop: int = 6, load: int = 0, model: ModelCard = CARD) -> Worker:
    return Worker(name.encode(), name=name, model=model, blocks=Span(start, stop), load=load)


def choose_worker(pool: list[Worker], model: ModelCard, blocks: Span, encodings: Encodings) -> Worker:
    """The home of some run."""
    return choose_home("diagnoses", pool, model, blocks, encodings)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_a_session_goes_to_the_least_loaded_worker(loads: list[int]) -> None:
    pool = [worker(str(i), load=load) for i, load in enumerate(loads)]
    (stage,) = choose_route(pool, CARD, Span(1, 5), ())
    assert stage.worker.load == min(loads)


@given(
    st.text(min_size=1, max_size=20),
    st.lists(st.integers(0, 5), min_size=1, max_size=6).flatmap(
        lambda loads: st.tuples(st.just(loads), st.permutations(range(len(loads))))
    ),
)
def test_brokers_with_the_same_workers_choose_the_same_home(
    run: str, given_pool: tuple[list[int], list[int]]
) -> None:
    """In whatever order they came, and whatever load each broker has given them."""
    loads, order = given_pool
    here = [worker(str(i)) for i in range(len(loads))]
    there = [worker(str(i), load=loads[i]) for i in order]
    homes = [choose_home(run, pool, CARD, Span(1, 5), ()) for pool in (here, there)]
    assert homes[0].alias == homes[1].alias
    # Without another worker it would be the same: only the runs of one that leaves move.
    for gone in here:
        staying = [each for each in here if each is not gone]
        if gone is not homes[0]:
            assert choose_home(run, staying, CARD, Span(1, 5), ()) is homes[0]


def test_runs_are_spread() -> None:
    pool = [worker(str(i)) for i in range(4)]
    homes = [choose_home(f"run {i}", pool, CARD, Span(1, 5), ()).name for i in range(400)]
    assert all(60 < homes.count(str(i)) < 140 for i in range(4)), "six deviations either way"


def test_only_workers_that_host_every_block_are_chosen() -> None:
    pool = [worker("short", 2, 4), worker("late", 3, 6), worker("fits", 1, 5, load=99)]
    assert choose_worker(pool, CARD, Span(2, 5), ()).name == "fits"
    (stage,) = choose_route(pool, CARD, Span(2, 4), ())
    assert stage.worker.name == "short"


def test_only_workers_with_the_same_model_are_chosen() -> None:
    other = ModelCard(name="tiny", fingerprint="other", blocks=6, hidden=4)
    tuned = ModelCard(name="tiny", fingerprint="f", blocks=6, hidden=4, samples={3: "zz"})
    pool = [worker("other", model=other), worker("tuned", model=tuned), worker("same", load=9)]
    assert choose_worker(pool, CARD, Span(0, 6), ()).name == "same"


def test_an_empty_pool_is_unavailable_and_says_how_to_fill_it() -> None:
    with pytest.raises(UnavailableError) as caught:
        choose_worker([], CARD, Span(0, 6), ())
    assert caught.value.at == "worker"
    assert "no worker is attached" in caught.value.what
    assert "trunkline worker --broker URL --model tiny" in caught.value.hint


def test_other_blocks_are_a_mismatch_that_names_the_blocks() -> None:
    with pytest.raises(MismatchError) as caught:
        choose_worker([worker("a", 0, 3), worker("b", 3, 6)], CARD, Span(2, 5), ())
    assert caught.value.at == "worker"
    assert "blocks 2:5 are needed, the workers host 0:3, 3:6" in caught.value.what
    assert "--blocks" in caught.value.hint


@pytest.mark.parametrize(
    ("card", "why"),
    [
        (ModelCard(name="big", fingerprint="g", blocks=6, hidden=4), "architectures or tensors differ"),
        (
            ModelCard(name="tuned", fingerprint="f", blocks=6, hidden=4, samples={2: "aa", 3: "zz"}),
            "weights differ, first in block 3",
        ),
    ],
)
def test_another_model_is_a_mismatch_that_says_why(card: ModelCard, why: str) -> None:
    with pytest.raises(MismatchError) as caught:
        choose_worker([worker("a", model=card)], CARD, Span(2, 5), ())
    assert caught.value.at == "silo"
    assert "the silo holds tiny" in caught.value.what
    assert f"{card.name} (their {why})" in caught.value.what
    assert "--model" in caught.value.hint


def test_only_workers_that_read_what_will_be_sent_are_chosen() -> None:
    old, new = worker("old"), worker("new")
    old.encodings, old.load, new.load = frozenset({"raw", "planes"}), 0, 5
    new.encodings = frozenset(ENCODINGS)
    assert choose_worker([old, new], CARD, Span(0, 6), ("raw",)) is old
    assert choose_worker([old, new], CARD, Span(0, 6), ("raw", "steps")) is new
    with pytest.raises(MismatchError, match="reads all of raw, blocks") as caught:
        choose_worker([old], CARD, Span(0, 6), ("raw", "blocks"))
    assert (caught.value.at, "--wire" in caught.value.hint) == ("worker", True)


def test_a_session_may_have_several_workers_and_a_run_may_not() -> None:
    pool = [worker("first", 0, 4), worker("second", 3, 6)]
    assert choose_route(pool, CARD, Span(1, 6), ()) == (
        Stage(pool[0], Span(1, 4)),
        Stage(pool[1], Span(4, 6)),
    )
    with pytest.raises(MismatchError, match="blocks 1:6 are needed"):
        choose_worker(pool, CARD, Span(1, 6), ())


def test_one_worker_is_better_than_two_idle_ones() -> None:
    pool = [worker("first", 0, 3), worker("second", 3, 6), worker("whole", load=9)]
    (stage,) = choose_route(pool, CARD, Span(1, 5), ())
    assert (stage.worker.name, stage.blocks) == ("whole", Span(1, 5))


spans = st.tuples(st.integers(0, 5), st.integers(1, 6)).filter(lambda span: span[0] < span[1])
pools = st.lists(st.tuples(spans, st.integers(0, 5)), max_size=5)


@given(pools, spans)
def test_a_route_tiles_the_blocks_with_few_and_idle_workers(
    given_pool: list[tuple[tuple[int, int], int]], wanted: tuple[int, int]
) -> None:
    pool = [worker(str(n), *span, load=load) for n, (span, load) in enumerate(given_pool)]
    possible = [
        (count, sum(w.load for w in chosen))
        for count in range(1, len(pool) + 1)
        for chosen in permutations(pool, count)
        if tiles(chosen, *wanted)
    ]
    if not possible:
        with pytest.raises((MismatchError, UnavailableError)):
            choose_route(pool, CARD, Span(*wanted), ())
        return
    route = choose_route(pool, CARD, Span(*wanted), ())
    assert (len(route), sum(stage.worker.load for stage in route)) == min(possible)
    assert all(stage.worker.blocks.contains(stage.blocks) and len(stage.blocks) for stage in route)
    edges = [wanted[0], *(stage.blocks.stop for stage in route)]
    assert [stage.blocks.start for stage in route] == edges[:-1]
    assert edges[-1] == wanted[1]


def tiles(workers: tuple[Worker, ...], start: int, stop: int) -> bool:
    """Whether these can take blocks one after another, each at least one."""
    reached = {start}
    for one in workers:
        reached = {
            to
            for at in reached
            for to in range(at + 1, stop + 1)
            if one.blocks.start <= at and to <= one.blocks.stop
        }
    return stop in reached


def test_nothing_new_goes_to_who_is_about_to_leave() -> None:
    leaving, staying = worker("leaving"), worker("staying", load=9)
    leaving.draining = True
    assert choose_worker([leaving, staying], CARD, Span(1, 5), ()) is staying
    for choose in (choose_worker, choose_route):
        with pytest.raises(UnavailableError, match="every worker that hosts 1:5 is about to leave") as caught:
            choose([leaving], CARD, Span(1, 5), ())
        assert caught.value.at == "worker"
        assert "trunkline worker --broker URL --model tiny" in caught.value.hint


def test_a_route_is_as_long_as_it_must_be_without_those_that_leave() -> None:
    whole, first, second = worker("whole"), worker("first", 0, 3), worker("second", 3, 6)
    whole.draining = True
    route = choose_route([whole, first, second], CARD, Span(2, 5), ())
    assert [(stage.worker.name, str(stage.blocks)) for stage in route] == [
        ("first", "2:3"),
        ("second", "3:5"),
    ]


def test_every_stage_reads_what_will_be_sent() -> None:
    pool = [worker("old", 0, 3), worker("new", 0, 3, load=9), worker("second", 3, 6)]
    pool[0].encodings = frozenset({"raw", "planes"})
    pool[1].encodings = pool[2].encodings = frozenset(ENCODINGS)
    assert [stage.worker.name for stage in choose_route(pool, CARD, Span(0, 6), ("steps",))] == [
        "new",
        "second",
    ]
    with pytest.raises(MismatchError, match="reads all of steps"):
        choose_route([pool[0], pool[2]], CARD, Span(0, 6), ("steps",))
