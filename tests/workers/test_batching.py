"""Sessions served together: the same results as alone, in one pass, and each with its own errors."""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from broker.parcel import Parcel
from codec.messages import (
    Backward,
    CloseRun,
    CloseSession,
    Error,
    Extend,
    Forward,
    GetAdapter,
    Opened,
    OpenRun,
    OpenSession,
    Result,
)
from codec.partition import Span as Blocks
from codec.plan import LoraPlan, RunPlan
from codec.tensors import decode_tensors, encode_tensors
from workers.checkpoint import Checkpoint
from workers.kv import PAGE
from workers.lora import adapter_tensors, add_adapter, drop_adapter
from workers.service import TrunkService
from workers.span import Span

NORTH, SOUTH, EAST = b"north...", b"south...", b"east...."
TRUNK = Blocks(2, 4)
HIDDEN = 64
LORA = LoraPlan(rank=2, targets=("q_proj", "v_proj"))


class Desk:
    """A service whose passes are counted."""

    def __init__(self, span: Span, card: Any, handle: Any) -> None:
        self.handle = handle
        self.service, self.card = TrunkService(span, card, 1 << 24), card
        self._ids = count(1)

    @property
    def passes(self) -> int:
        """Passes through the trunk so far."""
        return sum(number for kind, number in self.service.busy.passes.items() if kind != "alone")

    def parcel(self, silo: bytes, header: Any, tensors: list[Tensor] | None = None) -> Parcel:
        specs, frames = encode_tensors(tensors or [], "raw", "test")
        return Parcel.of(msgspec.structs.replace(header, id=next(self._ids), tensors=specs), frames, silo)

    def open(self, silo: bytes, session: str = "s", **fields: Any) -> None:
        fields = {"rows": 2, "capacity": 32, "start": TRUNK.start, "stop": TRUNK.stop} | fields
        header = OpenSession(session=session, model=self.card, **fields)
        tensors = list(fields.pop("tensors", []))
        self.handle(self.service, [self.parcel(silo, header, tensors)])

    def serve(self, *parcels: Parcel) -> tuple[dict[int, Any], int]:
        """Answers by request number, and how many passes they took."""
        before = self.passes
        answers = {parcel.header.id: parcel for parcel in self.handle(self.service, parcels)}
        assert answers.keys() == {parcel.header.id for parcel in parcels}
        return answers, self.passes - before


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Checkpoint) -> tuple[Span, Any]:
    return Span(tiny_checkpoint, Blocks(1, 5)), tiny_checkpoint.card(range(1, 5))


@pytest.fixture
def desk(model: tuple[Span, Any], handle: Any) -> Iterator[Desk]:
    yield Desk(*model, handle)
    assert not [name for name, _ in model[0].model.named_parameters() if "lora" in name]


def step(rows: list[int], starts: list[int], lengths: list[int], session: str = "s") -> Extend:
    return Extend(session=session, rows=tuple(rows), starts=tuple(starts), lengths=tuple(lengths))


def hidden(tokens: int, seed: int) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def tensor(parcel: Parcel) -> Tensor:
    assert isinstance(parcel.header, Result), parcel.header
    (found,) = decode_tensors(parcel.header.tensors, parcel.buffers(), boundary="test")
    return found


def test_sessions_at_different_positions_share_a_pass_and_nothing_else(desk: Desk) -> None:
    silos, prompts = (NORTH, SOUTH, EAST), (5, 1, 9)
    wanted = []
    for alone in (True, False):
        for silo in silos:
            desk.open(silo)
        prefill = [
            desk.parcel(silo, step([0], [0], [length]), [hidden(length, length)])
            for silo, length in zip(silos, prompts, strict=True)
        ]
        decode = [
            desk.parcel(silo, step([0, 1], [length, 0], [1, 2]), [hidden(3, 50 + length)])
            for silo, length in zip(silos, prompts, strict=True)
        ]
        for parcels in (prefill, decode):
            if alone:
                found = [desk.serve(parcel)[0][parcel.header.id] for parcel in parcels]
                wanted += [tensor(parcel) for parcel in found]
                continue
            answers, passes = desk.serve(*parcels)
            assert passes == 1
            for parcel in parcels:
                assert answers[parcel.header.id].peer == parcel.peer
                assert torch.allclose(tensor(answers[parcel.header.id]), wanted.pop(0), atol=1e-5)
    assert not wanted


def test_one_bad_request_among_others_is_its_own_trouble(desk: Desk) -> None:
    for silo in (NORTH, SOUTH):
        desk.open(silo)
    good = [desk.parcel(silo, step([0], [0], [3]), [hidden(3, 1)]) for silo in (NORTH, SOUTH)]
    bad = [
        desk.parcel(EAST, step([0], [0], [3]), [hidden(3, 1)]),
        desk.parcel(NORTH, step([0], [9], [1]), [hidden(1, 1)]),
        desk.parcel(SOUTH, step([7], [0], [1]), [hidden(1, 1)]),
        desk.parcel(SOUTH, step([0], [3], [2]), [hidden(1, 1)]),
    ]
    answers, _ = desk.serve(good[0], *bad, good[1])
    codes = [answers[parcel.header.id].header.code for parcel in bad]
    assert codes == ["unknown-name", "limit", "limit", "mismatch"]
    first, second = (tensor(answers[parcel.header.id]) for parcel in good)
    assert torch.allclose(first, second, atol=1e-5)


def test_a_session_asked_twice_at_once_goes_on_where_it_was(desk: Desk) -> None:
    desk.open(NORTH)
    whole = tensor(
        desk.serve(request := desk.parcel(NORTH, step([0], [0], [5]), [hidden(5, 3)]))[0][request.header.id]
    )
    parts = [
        desk.parcel(NORTH, step([0], [0], [2]), [hidden(5, 3)[:2]]),
        desk.parcel(NORTH, step([0], [2], [3]), [hidden(5, 3)[2:]]),
    ]
    answers, passes = desk.serve(*parts)
    assert passes == 2
    joined = torch.cat([tensor(answers[parcel.header.id]) for parcel in parts])
    assert torch.allclose(joined, whole, atol=1e-5)


def test_a_session_closed_and_opened_with_an_adapter_meanwhile_runs_with_it(
    desk: Desk, model: tuple[Span, Any]
) -> None:
    span = model[0]
    add_adapter(span, "fresh", LORA, 3, TRUNK)
    tensors = {name: torch.randn_like(value) for name, value in adapter_tensors(span, "fresh").items()}
    drop_adapter(span, "fresh")
    fields = {"adapter": LORA, "names": tuple(tensors), "start": TRUNK.start, "stop": TRUNK.stop}
    opening = OpenSession(session="s", model=desk.card, rows=1, capacity=8, **fields)
    desk.open(NORTH)
    desk.open(SOUTH)
    asks = [desk.parcel(silo, step([0], [0], [2]), [hidden(2, 1)]) for silo in (NORTH, SOUTH)]
    answers, passes = desk.serve(desk.parcel(NORTH, opening, list(tensors.values())), *asks)
    adapted, base = (tensor(answers[parcel.header.id]) for parcel in asks)
    assert passes == 1, "whatever their adapters"
    assert not torch.allclose(adapted, base, atol=1e-3)
    again = desk.parcel(NORTH, step([0], [0], [2]), [hidden(2, 1)])
    assert torch.allclose(tensor(desk.serve(again)[0][again.header.id]), adapted, atol=1e-5)
    desk.serve(desk.parcel(NORTH, CloseSession(session="s")))


def test_a_pass_that_fails_is_an_error_for_all_in_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    for silo in (NORTH, SOUTH):
        desk.open(silo)
    asks = [desk.parcel(silo, step([0], [0], [2]), [hidden(2, 1)]) for silo in (NORTH, SOUTH)]
    with monkeypatch.context() as patch:
        patch.setattr(desk.service._span, "run_parts", broken)
        answers, _ = desk.serve(*asks)
    for parcel in asks:
        answer = answers[parcel.header.id]
        assert answer.peer == parcel.peer
        assert isinstance(answer.header, Error)
        assert "out of memory" in answer.header.what
    assert "request failed" in caplog.text
    answers, passes = desk.serve(*asks)
    assert passes == 1
    assert all(isinstance(answer.header, Result) for answer in answers.values())


def test_a_long_prompt_is_cut_so_that_others_decode_between_its_parts(desk: Desk) -> None:
    desk.open(NORTH, capacity=300)
    desk.open(SOUTH)
    desk.service._chunk = 64
    prompt = desk.parcel(NORTH, step([0, 1], [0, 0], [90, 60]), [hidden(150, 1)])
    begin = desk.parcel(SOUTH, step([0], [0], [1]), [hidden(1, 2)])
    answers, passes = desk.serve(prompt, begin)
    assert passes > 1
    assert next(iter(answers)) == begin.header.id
    again = desk.parcel(NORTH, step([0, 1], [0, 0], [90, 60]), [hidden(150, 1)])
    desk.service._agenda._decoded = float("-inf")
    whole, passes = desk.serve(again)
    assert passes == 1
    cut, uncut = tensor(answers[prompt.header.id]), tensor(whole[again.header.id])
    assert torch.allclose(cut, uncut, atol=1e-5)
    # Both rows go on from the same place, however they came there.
    following = desk.parcel(NORTH, step([0, 1], [90, 60], [1, 1]), [hidden(2, 3)])
    assert isinstance(desk.serve(following)[0][following.header.id].header, Result)


def train(desk: Desk, silos: Sequence[bytes], together: bool) -> tuple[list[Tensor], int]:
    """Outputs and input gradients of one micro-batch of each silo, and the passes that they took."""
    plan = RunPlan(silos=len(silos), lora=LORA)
    opening = OpenRun(run="r", model=desk.card, start=TRUNK.start, stop=TRUNK.stop, plan=plan)
    desk.serve(*(desk.parcel(silo, opening) for silo in silos))
    outputs, passes = [], 0
    for back in (False, True):
        parcels = []
        for seed, silo in enumerate(silos):
            lengths = (3 + seed, 2)
            request: Any = Backward(run="r", microbatch=0)
            if not back:
                request = Forward(run="r", microbatch=0, lengths=lengths)
            parcels.append(desk.parcel(silo, request, [hidden(sum(lengths), 10 * seed + back)]))
        for group in [parcels] if together else [[parcel] for parcel in parcels]:
            answers, used = desk.serve(*group)
            passes += used
            outputs += [tensor(answers[parcel.header.id]) for parcel in group]
    run = desk.service.holdings.runs[(), "r"]
    outputs += [p.grad.clone() for p in run.parameters.values() if p.grad is not None]
    desk.serve(*(desk.parcel(silo, CloseRun(run="r")) for silo in silos))
    return outputs, passes


def test_small_micro_batches_of_several_silos_share_their_passes(desk: Desk) -> None:
    silos = [NORTH, SOUTH, EAST]
    (alone, six), (together, two) = train(desk, silos, False), train(desk, silos, True)
    assert (six, two) == (6, 2)
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_session_idle_for_long_makes_room_if_it_can_be_sent_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = desk.service._span.kv_shape(TRUNK).bytes_for(PAGE)
    desk.service.holdings.memory.budget = 2 * page
    desk.open(NORTH, rows=1, capacity=PAGE, replays=True)
    desk.open(SOUTH, rows=1, capacity=PAGE)

    def opened(silo: bytes) -> Any:
        opening = OpenSession(
            session="s", model=desk.card, start=2, stop=4, rows=1, capacity=PAGE, replays=True
        )
        return desk.serve(request := desk.parcel(silo, opening))[0][request.header.id].header

    assert isinstance(opened(EAST), Error), "north was here just now"
    monkeypatch.setattr("workers.holdings._IDLE_S", -1.0)
    assert isinstance(opened(EAST), Opened)
    assert desk.service.holdings.evicted == 1
    for silo, code in ((NORTH, "unknown-name"), (SOUTH, ""), (EAST, "")):
        ask = desk.parcel(silo, step([0], [0], [2]), [hidden(2, 1)])
        header = desk.serve(ask)[0][ask.header.id].header
        assert getattr(header, "code", "") == code
    desk.service.holdings.memory.budget = 1 << 24


def tight(desk: Desk, tokens: int) -> None:
    """So much KV memory and no more."""
    desk.service.holdings.memory.budget = desk.service._span.kv_shape(TRUNK).bytes_for(tokens)


def test_a_session_does_not_make_room_for_itself_by_leaving(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.holdings._IDLE_S", -1.0)
    tight(desk, PAGE)
    desk.open(NORTH, rows=1, capacity=4 * PAGE, replays=True)
    begin = desk.parcel(NORTH, step([0], [0], [60]), [hidden(60, 1)])
    assert isinstance(desk.serve(begin)[0][begin.header.id].header, Result)
    more = desk.parcel(NORTH, step([0], [60], [10]), [hidden(10, 2)])
    assert desk.serve(more)[0][more.header.id].header.code == "limit"
    one = desk.parcel(NORTH, step([0], [60], [1]), [hidden(1, 3)])
    assert isinstance(desk.serve(one)[0][one.header.id].header, Result)
    assert desk.service.holdings.evicted == 0
    desk.serve(desk.parcel(NORTH, CloseSession(session="s")))
    assert desk.service.holdings.memory.held == 0


def test_a_request_that_is_refused_in_one_row_changes_none(desk: Desk) -> None:
    desk.open(NORTH, rows=2, capacity=2 * PAGE)
    start = desk.parcel(NORTH, step([0, 1], [0, 0], [60, 60]), [hidden(120, 1)])
    desk.serve(start)
    refused = desk.parcel(NORTH, step([0, 1], [0, 61], [100, 1]), [hidden(101, 2)])
    assert desk.serve(refused)[0][refused.header.id].header.code == "limit"
    following = desk.parcel(NORTH, step([0], [60], [1]), [hidden(1, 3)])
    found = tensor(desk.serve(following)[0][following.header.id])
    desk.open(SOUTH, rows=2, capacity=2 * PAGE)
    desk.serve(desk.parcel(SOUTH, step([0, 1], [0, 0], [60, 60]), [hidden(120, 1)]))
    undisturbed = desk.parcel(SOUTH, step([0], [60], [1]), [hidden(1, 3)])
    assert torch.allclose(found, tensor(desk.serve(undisturbed)[0][undisturbed.header.id]), atol=1e-5)


def test_nobody_is_closed_for_a_request_that_cannot_be_served_anyway(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.holdings._IDLE_S", -1.0)
    tight(desk, 3 * PAGE)
    desk.open(NORTH, rows=1, capacity=PAGE, replays=True)
    desk.open(SOUTH, rows=1, capacity=PAGE, replays=True)
    fields: Any = {"model": desk.card, "start": 2, "stop": 4}
    greedy = desk.parcel(EAST, OpenSession(session="s", rows=4000, capacity=1 << 20, **fields))
    assert desk.serve(greedy)[0][greedy.header.id].header.code == "limit"
    again = desk.parcel(NORTH, OpenSession(session="s", rows=9, capacity=PAGE, **fields))
    assert desk.serve(again)[0][again.header.id].header.code == "limit"
    assert desk.service.holdings.evicted == 0
    for silo in (NORTH, SOUTH):
        ask = desk.parcel(silo, step([0], [0], [2]), [hidden(2, 1)])
        assert isinstance(desk.serve(ask)[0][ask.header.id].header, Result)


def test_a_silo_that_repeats_itself_cannot_spoil_anothers_activations(desk: Desk) -> None:
    plan = RunPlan(silos=2, lora=LORA)
    opening = OpenRun(run="r", model=desk.card, start=TRUNK.start, stop=TRUNK.stop, plan=plan)
    desk.serve(*(desk.parcel(silo, opening) for silo in (NORTH, SOUTH)))

    def forward(silo: bytes, number: int) -> Parcel:
        return desk.parcel(silo, Forward(run="r", microbatch=number, lengths=(3,)), [hidden(3, number)])

    def backward(silo: bytes, number: int) -> Parcel:
        return desk.parcel(silo, Backward(run="r", microbatch=number), [hidden(3, 9)])

    desk.serve(forward(SOUTH, 1), forward(SOUTH, 2))
    desk.serve(
        forward(SOUTH, 1),
        forward(NORTH, 5),
        forward(SOUTH, 2),
        desk.parcel(SOUTH, GetAdapter(run="r")),
        backward(SOUTH, 1),
        backward(SOUTH, 2),
    )
    victim = backward(NORTH, 5)
    assert isinstance(desk.serve(victim)[0][victim.header.id].header, Result)
    desk.serve(*(desk.parcel(silo, CloseRun(run="r")) for silo in (NORTH, SOUTH)))


def test_what_says_little_and_holds_much_is_refused_before_it_is_decoded(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.open(NORTH)
    large = desk.parcel(NORTH, step([0], [0], [1]), [torch.zeros(1000, HIDDEN)])
    two = desk.parcel(NORTH, Backward(run="r", microbatch=0), [torch.zeros(0, HIDDEN), torch.zeros(9, 9)])

    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr("workers.inbound.decode_tensors", decoded)
    for parcel in (large, two):
        assert desk.serve(parcel)[0][parcel.header.id].header.code == "mismatch"
