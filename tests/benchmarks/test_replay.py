"""What replay silos send, whatever order answers come in; and the published way's round trips."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.published import MaskedTraining, PublishedGeneration
from benchmarks.replay import Crossing, Generation, Replay, Replayed, Training, Trunk
from broker.parcel import Parcel
from codec.errors import ProtocolError
from codec.messages import (
    Answer,
    Backward,
    Commit,
    Committed,
    Extend,
    Forward,
    Opened,
    OpenRun,
    OpenSession,
    Result,
    TensorSpec,
)
from codec.partition import Span
from codec.plan import ModelCard

pytestmark = pytest.mark.timeout(60)

HIDDEN = 4
TRUNK = Trunk(ModelCard(name="m", fingerprint="f", blocks=6, hidden=HIDDEN), Span(1, 5), "raw")


def rows(tokens: int) -> Crossing:
    return Crossing(TensorSpec("f16", (tokens, HIDDEN), "raw", (tokens * HIDDEN * 2,)), bytes(tokens * 8))


def batch(tokens: int) -> Replayed:
    return Replayed((tokens,), rows(tokens), rows(tokens), tokens)


def answer(parcel: Parcel) -> Answer:
    """What a worker would say."""
    header = parcel.header
    if isinstance(header, OpenRun | OpenSession):
        return Opened(id=header.id)
    if isinstance(header, Commit):
        return Committed(id=header.id, step=header.step, divisor=1.0, clip=1.0, grad_norm=1.0)
    return Result(id=header.id, tensors=header.tensors)


def exchange(replay: Replay, rounds: int) -> list[list[Parcel]]:
    """What is sent in each round trip, when all that was sent is answered before the next."""
    sent = [[replay.opening()]]
    for _ in range(rounds):
        sent.append([new for parcel in sent[-1] for new in replay.answered(answer(parcel))])
    return sent


@given(
    window=st.integers(1, 5),
    accumulate=st.integers(1, 6),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    picks=st.lists(st.integers(0, 100), min_size=10, max_size=80),
)
def test_training_keeps_its_window_and_commits_whole_steps(
    window: int, accumulate: int, sizes: list[int], picks: list[int]
) -> None:
    replay = Training(TRUNK, "r", 1, [batch(size) for size in sizes], window=window, accumulate=accumulate)
    waiting, forwards, backwards, commits, tokens = [replay.opening()], 0, 0, 0, 0
    lengths: dict[int, int] = {}
    for pick in picks:
        parcel = waiting.pop(pick % len(waiting))
        sent = replay.answered(answer(parcel))
        if isinstance(parcel.header, Commit):
            tokens += parcel.header.loss_tokens
        assert replay.tokens == tokens
        for new in sent:
            match new.header:
                case Forward(microbatch=number):
                    assert number == forwards
                    lengths[number] = sum(new.header.lengths)
                    assert lengths[number] == sizes[number % len(sizes)]
                    forwards += 1
                case Backward():
                    assert isinstance(parcel.header, Forward)
                    assert new.header.microbatch == parcel.header.microbatch
                    backwards += 1
                case Commit(step=step, loss_tokens=loss):
                    assert step == commits
                    assert forwards == backwards == (commits + 1) * accumulate
                    assert loss == sum(lengths[commits * accumulate + i] for i in range(accumulate))
                    commits += 1
        waiting += sent
        assert len(waiting) <= window
        assert waiting
        assert len({new.header.id for new in waiting}) == len(waiting)


def test_generation_decodes_behind_its_prompt_and_begins_anew() -> None:
    replay = Generation(TRUNK, rows(5), rows(1), new=2)
    sent = exchange(replay, 7)
    steps = [(p.header.starts[0], p.header.lengths[0]) for (p,) in sent[1:] if isinstance(p.header, Extend)]
    assert steps == [(0, 5), (5, 1), (6, 1), (0, 5), (5, 1), (6, 1), (0, 5)]
    assert replay.tokens == 4
    opening = sent[0][0].header
    assert isinstance(opening, OpenSession)
    assert opening.capacity == 7


def test_an_answer_of_another_shape_is_noticed() -> None:
    replay = Generation(TRUNK, rows(5), rows(1), new=2)
    (prompt,) = exchange(replay, 1)[1]
    wrong = msgspec.structs.replace(answer(prompt), tensors=(rows(4).spec,))
    with pytest.raises(ProtocolError, match="5 by 4 was due"):
        replay.answered(wrong)


def kinds(parcels: list[Parcel]) -> list[str]:
    return [str(type(parcel.header).__struct_config__.tag) for parcel in parcels]


def test_a_published_training_step_takes_three_round_trips_and_a_mask_crosses_dense() -> None:
    mask = Crossing(TensorSpec("f16", (920, 920), "raw", (920 * 920 * 2,)), bytes(920 * 920 * 2))
    how: dict[str, Any] = {"window": 1, "accumulate": 1}
    masked = exchange(MaskedTraining(TRUNK, "r", 1, [batch(920)], mask=mask, **how), 6)
    plain = exchange(Training(TRUNK, "r", 1, [batch(920)], **how), 6)
    assert [kinds(parcels) for parcels in plain[1:4]] == [["forward"], ["backward"], ["commit"]]
    assert [kinds(p) for p in masked[1:4]] == [["open-session", "forward"], ["backward"], ["commit"]]
    bytes_of = [sum(parcel.size for parcel in parcels) for parcels in (masked[4], plain[4])]
    assert bytes_of[0] - bytes_of[1] == 920 * 920 * 2


@pytest.mark.parametrize(("cached", "sizes"), [(True, [24, 1, 1, 24]), (False, [24, 24, 24, 24])])
@pytest.mark.parametrize("trips", [1, 2])
def test_published_generation_takes_its_round_trips_with_and_without_a_cache(
    cached: bool, sizes: list[int], trips: int
) -> None:
    def fresh() -> PublishedGeneration:
        return PublishedGeneration(TRUNK, rows(24), rows(1), 2, cached=cached, masks=None, trips=trips)

    sent = [parcel for parcels in exchange(fresh(), 4 * trips)[1:] for parcel in parcels]
    extends = [parcel.header for parcel in sent if isinstance(parcel.header, Extend)]
    assert len(sent) == 4 * trips
    assert [header.lengths[0] for header in extends] == sizes
    assert [header.starts[0] for header in extends] == ([0, 24, 25, 0] if cached else [0, 0, 0, 0])
    served = fresh()
    exchange(served, 1 + 3 * trips)
    assert served.tokens == (2 if cached else 3)


def test_masks_cross_with_the_sequence_and_with_a_token() -> None:
    masks = rows(100), rows(10)
    replay = PublishedGeneration(TRUNK, rows(24), rows(1), 2, cached=True, masks=masks, trips=2)
    sent = exchange(replay, 6)
    found = [(kinds(parcels), [parcel.size for parcel in parcels]) for parcels in sent[1:6:2]]
    assert found == [(["open-session", "extend"], [100 * 8, 24 * 8])] + 2 * [
        (["open-session", "extend"], [10 * 8, 8])
    ]
    assert [kinds(parcels) for parcels in sent[2:7:2]] == 3 * [["open-session"]]
