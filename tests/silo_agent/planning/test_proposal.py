"""What is proposed, against bounds that are reckoned by hand, for all figures there may be."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from broker.speed import Speed
from codec.errors import LimitError, UsageError
from codec.partition import Partition
from silo_agent.noise import NoiseScale
from silo_agent.planning.proposal import BOUNDARIES, Block, Line, Measured, Proposal, Rest, Wishes, propose
from silo_agent.planning.reasons import reasons
from silo_agent.planning.work import Work, generating_work
from silo_agent.wires import CANDIDATES, Cost

MB = 1_000_000
SIZES = st.integers(0, 1 << 34)
SECONDS = st.floats(1e-9, 10)
BLOCKS = st.builds(Block, SECONDS, SECONDS, SIZES, st.integers(0, 1 << 28), st.floats(0, 1e7), SIZES)
RESTS = st.builds(Rest, SECONDS, SECONDS, SIZES, st.integers(0, 1 << 22))
COSTS = st.builds(Cost, *[st.floats(0, 1e-2)] * 2, st.integers(0, 1000), st.floats(0.01, 4))
WIRES = st.fixed_dictionaries(
    {boundary: st.fixed_dictionaries(dict.fromkeys(CANDIDATES, COSTS)) for boundary in BOUNDARIES[False]}
)
RATES = st.one_of(st.floats(1e3, 1e10), st.just(math.inf))
LINES = st.builds(Line, st.builds(Speed, st.floats(0, 1), RATES), st.one_of(st.none(), SECONDS))
TRAINING = st.builds(
    Work,
    st.just(True),
    st.lists(st.integers(1, 1000), min_size=1, max_size=8).map(tuple),
    st.integers(1, 1000),
    st.integers(1, 10_000),
    st.integers(1, 10_000),
    st.integers(1, 8),
)
WORKS = st.one_of(TRAINING, st.builds(generating_work, st.integers(1, 16), st.integers(1, 4096)))
WISHES = st.builds(Wishes, st.builds(Partition, st.integers(0, 5), st.integers(0, 5)), WORKS)
FIGURES = st.builds(
    Measured,
    st.lists(BLOCKS, min_size=3, max_size=8).map(tuple),
    RESTS,
    st.integers(1, 8192),
    st.integers(1, 1 << 40),
)


def of(**changes: Any) -> Measured:
    """Six blocks of 100 MB, an adapter of 1 MB, 1 kB a token; embeddings of 50 MB."""
    block = Block(2e-3, 3e-3, 100 * MB, MB, 1000.0, 100)
    figures = {"blocks": (block,) * 6, "rest": Rest(0.0, 4e-3, 50 * MB, 4000), "hidden": 10, "memory": 10**9}
    return Measured(**{**figures, **changes})


LEARN = Work(True, (100, 200), 75, most=1000, most_predicted=500, flights=3)
TWO = Wishes(Partition(2, 2), LEARN)


def try_to(measured: Measured, wishes: Wishes) -> Proposal | None:
    try:
        return propose(measured, wishes)
    except (LimitError, UsageError):
        return None


def kept(proposal: Proposal | None) -> int:
    """Blocks on the silo; fewer than any if nothing can be proposed."""
    if proposal is None:
        return -1
    return proposal.chosen.partition.head + proposal.chosen.partition.tail


def test_memory_is_the_sum_of_what_is_held() -> None:
    proposal = propose(of(), TWO)
    weights = 50 * MB + 4 * (100 * MB + 4 * MB)
    waiting = 1000 * (3 * 2 + 2) * 1000
    passing = 1000 * 1000 + 500 * 4000
    assert proposal.chosen.memory == weights + 2 * (waiting + passing)


def test_generation_holds_caches_and_no_graphs() -> None:
    proposal = propose(of(), Wishes(Partition(2, 2), generating_work(4, 250)))
    weights = 50 * MB + 4 * 101 * MB
    assert proposal.chosen.memory == weights + 1000 * 4 * 100 + 2 * (1000 * 1000 + 4 * 4000)


def test_seconds_are_those_of_blocks_and_logits() -> None:
    assert propose(of(), TWO).chosen.silo_s == pytest.approx(4 * 5e-3 + 4e-3 * 75 / 300)


@pytest.mark.parametrize(
    ("memory", "blocks", "wish", "expected", "binding"),
    [
        (1000 * MB, 6, (2, 2), (2, 2), "wish"),
        (1000 * MB, 6, (0, 2), (0, 2), "wish"),
        (450 * MB, 6, (2, 2), (2, 1), "memory"),
        (300 * MB, 6, (2, 2), (1, 1), "memory"),
        (1000 * MB, 4, (2, 2), (2, 1), "model"),
        (1000 * MB, 4, (4, 4), (2, 1), "model"),
        (300 * MB, 4, (4, 4), (1, 1), "memory"),
    ],
)
def test_the_wish_is_met_as_far_as_memory_and_model_allow(
    memory: int, blocks: int, wish: tuple[int, int], expected: tuple[int, int], binding: str
) -> None:
    measured = of(memory=memory, blocks=of().blocks[:1] * blocks)
    wishes = Wishes(Partition(*wish), LEARN)
    proposal = propose(measured, wishes)
    assert proposal.chosen.partition == Partition(*expected)
    assert proposal.binding == binding
    why = reasons(measured, wishes, NoiseScale(), proposal)[0].why
    named = {"wish": "as wished", "memory": "memory: ", "model": f"the model: its {blocks} blocks"}
    assert why.startswith(named[binding])
    assert f"of {memory / 1e9:.2f} GB" in why


def test_where_nothing_fits_it_says_what_is_needed() -> None:
    with pytest.raises(LimitError, match=r"0\.27 GB for a partition of 1, 1, 0\.20 GB may be taken"):
        propose(of(memory=200 * MB), TWO)


@pytest.mark.parametrize(("wish", "blocks"), [((1, 1), 2), ((0, 3), 1), ((-1, 2), 6)])
def test_a_model_that_cannot_be_split_so_is_refused(wish: tuple[int, int], blocks: int) -> None:
    with pytest.raises(UsageError, match=r"leave no trunk|cannot be negative"):
        propose(of(blocks=of().blocks[:1] * blocks), Wishes(Partition(*wish), LEARN))


@given(FIGURES, WISHES)
def test_what_is_proposed_is_legal_and_fits(measured: Measured, wishes: Wishes) -> None:
    proposal = try_to(measured, wishes)
    assume(proposal is not None)
    assert proposal is not None
    chosen, wish = proposal.chosen, wishes.partition
    _, trunk, _ = chosen.partition.spans(len(measured.blocks))
    assert len(trunk) >= 1
    assert chosen.memory <= measured.memory
    assert min(wish.head, 1) <= chosen.partition.head <= wish.head
    assert min(wish.tail, 1) <= chosen.partition.tail <= wish.tail
    assert chosen in proposal.compared
    assert proposal.wanted in proposal.compared
    fits = {one.partition: one.memory <= measured.memory for one in proposal.compared}
    assert {one.partition: one.fits for one in proposal.compared} == fits
    if chosen.partition != wish:
        assert proposal.binding != "wish"
    if wish.head + wish.tail < len(measured.blocks) and chosen.partition != wish:
        assert proposal.binding == "memory"
        assert proposal.wanted.memory > measured.memory


@given(FIGURES, WISHES, st.floats(0, 1))
def test_less_memory_never_proposes_more_blocks(measured: Measured, wishes: Wishes, share: float) -> None:
    less = dataclasses.replace(measured, memory=int(measured.memory * share))
    assert kept(try_to(less, wishes)) <= kept(try_to(measured, wishes))


@given(WIRES, LINES, st.floats(1e-3, 1), st.integers(1, 4096))
def test_a_slower_line_never_proposes_more_bytes(wires: Any, line: Line, share: float, rows: int) -> None:
    assert line.speed is not None
    slower = dataclasses.replace(line, speed=Speed(line.speed.rtt, min(line.speed.rate, 1e12) * share))
    wishes = Wishes(Partition(2, 2), generating_work(rows, 2))
    slow, fast = (propose(of(wires=wires, line=one), wishes).wires for one in (slower, line))
    for boundary, costs in wires.items():
        sizes = [costs[picks[boundary].wire].bytes(rows * 10) for picks in (slow, fast)]
        assert sizes[0] <= sizes[1] * (1 + 1e-9)


@given(FIGURES, WISHES, LINES)
def test_the_line_decides_nothing_about_the_partition(measured: Measured, wishes: Wishes, line: Line) -> None:
    assert kept(try_to(dataclasses.replace(measured, line=line), wishes)) == kept(try_to(measured, wishes))


def line_of(rate: float, rtt: float = 0.0, trunk_s: float | None = None) -> Measured:
    """One wire of 2 bytes an element."""
    wires: Any = {boundary: {"raw": Cost(0, 0, 0, 2)} for boundary in BOUNDARIES[True]}
    return of(wires=wires, line=Line(Speed(rtt, rate), trunk_s))


def test_in_training_the_busier_direction_and_the_slowest_part_decide() -> None:
    proposal = propose(line_of(rate=40.0, trunk_s=1e-3), TWO)
    assert proposal.crossings["raw"].bytes == pytest.approx(4 * 2 * 10)
    # Two tensors each way; a token's backward takes 1.5 times its forward here, so in the trunk too.
    assert proposal.seconds == pytest.approx({"silo": 0.021, "line": 1.0, "trunk": 2.5e-3})
    assert proposal.slowest == "line"
    (*_, speed) = reasons(line_of(rate=40.0), TWO, NoiseScale(), proposal)
    assert speed.value == "1 tokens/s at most"
    assert "the line is the slowest" in speed.why


def test_a_generated_token_waits_for_both_ways_and_the_round_trip() -> None:
    wires: Any = {boundary: {"raw": Cost(0, 0, 0, 2)} for boundary in BOUNDARIES[False]}
    measured = dataclasses.replace(line_of(rate=40.0, rtt=0.5), wires=wires)
    proposal = propose(measured, Wishes(Partition(2, 2), generating_work(2, 50)))
    assert proposal.seconds["line"] == pytest.approx(2 * 2 * 10 / 40 + 0.5 / 2)
    (*_, speed) = reasons(measured, Wishes(Partition(2, 2), generating_work(2, 50)), NoiseScale(), proposal)
    assert speed.why.endswith("one after another, most of it in the line; the trunk not measured")


@pytest.mark.parametrize(
    ("noise", "value"),
    [
        (NoiseScale(), "none"),
        (NoiseScale(relative=0.05), "--noise 0.05"),
        (NoiseScale(0, 2), "--noise-abs 2"),
    ],
)
def test_noise_is_as_wished_and_never_called_private(noise: NoiseScale, value: str) -> None:
    measured = line_of(rate=1e6)
    said = reasons(measured, TWO, noise, propose(measured, TWO))
    assert said[1].value == value
    assert not any("private" in reason.why for reason in said)


def test_what_a_wire_is_picked_for_is_said() -> None:
    costs: Any = {"raw": Cost(0, 0, 0, 4), "steps": Cost(0, 1e-6, 0, 1)}
    wires: Any = dict.fromkeys(BOUNDARIES[True], costs)
    for rate, wire in ((1e3, "steps"), (math.inf, "raw")):
        measured = of(wires=wires, line=Line(Speed(0.0, rate)))
        said = reasons(measured, TWO, NoiseScale(), propose(measured, TWO))[2]
        assert said.value == "--wire auto"
        assert said.why.endswith(f"{wire} everywhere")
    fixed = line_of(rate=1e6)
    said = reasons(fixed, TWO, NoiseScale(), propose(fixed, TWO))[2]
    assert (said.value, said.why) == ("--wire raw", "as wished")
