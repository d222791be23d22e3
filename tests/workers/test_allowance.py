"""Several silos at one worker: runs that only their members reach, and shares of its memory."""

from collections.abc import Callable, Sequence
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
    Commit,
    Done,
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
from codec.plan import LoraPlan, ModelCard, RunPlan
from codec.tensors import decode_tensors, encode_tensors
from workers.allowance import Allowance
from workers.kv import PAGE, KVMemory, KVShape, RowCache
from workers.service import TrunkService
from workers.span import Span

NORTH, SOUTH, WEST = b"north...", b"south...", b"west...."
LORA = LoraPlan(rank=2, targets=("q_proj", "v_proj"))
HIDDEN = 32
PAGE_BYTES = 2 * 4 * 2 * 8 * 4 * PAGE
"""A page of one row: keys and values of four blocks, two groups of eight, fp32."""


class Desk:
    """A service whose silos ask by name."""

    def __init__(self, span: Span, card: ModelCard, handle: Any, **memory: Any) -> None:
        self.service = TrunkService(span, card, **{"kv_bytes": 1 << 22, **memory})
        self.card, self._handle, self._ids = card, handle, count(1)

    def ask(self, silo: bytes, header: Any, tensors: Sequence[Tensor] = ()) -> list[Parcel]:
        specs, frames = encode_tensors(tensors, "exact", "test")
        numbered = msgspec.structs.replace(header, id=next(self._ids), tensors=specs)
        answers: list[Parcel] = self._handle(self.service, [Parcel.of(numbered, frames, silo)])
        return answers

    def says(self, silo: bytes, header: Any, tensors: Sequence[Tensor] = ()) -> Any:
        (answer,) = self.ask(silo, header, tensors)
        return answer.header

    def tensors(self, silo: bytes, header: Any, tensors: Sequence[Tensor] = ()) -> list[Tensor]:
        (answer,) = self.ask(silo, header, tensors)
        return decode_tensors(answer.header.tensors, answer.buffers(), boundary="test")

    def join(self, silo: bytes, *members: str, **plan: Any) -> Any:
        plan = {"silos": len(members) or 1, "members": members, "lora": LORA, **plan}
        return self.says(silo, OpenRun(run="r", model=self.card, start=0, stop=4, plan=RunPlan(**plan)))

    def open(self, silo: bytes, name: str, pages: int, *, replays: bool = True) -> Any:
        fields = {"rows": 1, "capacity": pages * PAGE, "replays": replays}
        return self.says(silo, OpenSession(session=name, model=self.card, start=0, stop=4, **fields))

    def extend(self, silo: bytes, name: str, start: int, tokens: int) -> Any:
        header = Extend(session=name, rows=(0,), starts=(start,), lengths=(tokens,))
        return self.says(silo, header, [states(tokens)])


def states(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def hosted(tiny_model: Callable[[str], Any]) -> tuple[Span, ModelCard]:
    checkpoint = tiny_model("llama").checkpoint
    return Span(checkpoint, Blocks(0, 4)), checkpoint.card(range(4))


@pytest.fixture
def new_desk(hosted: tuple[Span, ModelCard], handle: Any) -> Callable[..., Desk]:
    return lambda **memory: Desk(*hosted, handle, **memory)


# --- runs --------------------------------------------------------------------------------------------


def test_runs_of_one_name_and_other_members_do_not_meet(new_desk: Callable[..., Desk]) -> None:
    """What one run trains is what it trains alone, whatever an outsider does under its name."""

    def train(desk: Desk, disturbed: bool) -> list[Tensor]:
        desk.join(NORTH, "north", silos=1, learning_rate=0.1)
        for step in range(2):
            if disturbed:
                outsider(step)
            desk.says(NORTH, Forward(run="r", microbatch=step, lengths=(3,)), [states(3)])
            if disturbed:  # A step of the other run must not end this one's micro-batches.
                outsider(step)
            desk.says(NORTH, Backward(run="r", microbatch=step), [states(3, 1)])
            desk.says(NORTH, Commit(run="r", step=step, loss_tokens=3, square_norm=0.0))
        return desk.tensors(NORTH, GetAdapter(run="r"))

    alone = train(new_desk(), False)
    desk = new_desk()
    steps, numbers = count(), count()

    def outsider(_: int) -> None:
        number = next(numbers)
        assert isinstance(desk.join(WEST, learning_rate=0.7, steps=100), Opened)
        assert isinstance(
            desk.says(WEST, Forward(run="r", microbatch=number, lengths=(5,)), [states(5, 7)]), Result
        )
        assert isinstance(desk.says(WEST, Backward(run="r", microbatch=number), [states(5, 8)]), Result)
        desk.says(WEST, Commit(run="r", step=next(steps), loss_tokens=5, square_norm=0.0))

    together = train(desk, True)
    assert len(desk.service.holdings.runs) == 2
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert isinstance(desk.says(WEST, CloseRun(run="r")), Done)
    assert list(desk.service.holdings.runs) == [(("north",), "r")]


def test_an_outsiders_request_is_answered_as_one_for_a_name_that_does_not_exist(
    new_desk: Callable[..., Desk],
) -> None:
    desk = new_desk()
    desk.join(NORTH, "north", "south")
    for header in (
        GetAdapter(run="r"),
        Commit(run="r", step=0, loss_tokens=1, square_norm=0.0),
        CloseRun(run="r"),
    ):
        foreign = desk.says(WEST, header)
        unknown = desk.says(WEST, msgspec.structs.replace(header, run="q"))
        assert isinstance(foreign, Error)
        assert msgspec.structs.replace(foreign, id=0, what=foreign.what.replace("'r'", "'q'")) == (
            msgspec.structs.replace(unknown, id=0)
        )
        assert foreign.code == "unknown-name"


def test_a_silo_is_in_one_run_of_a_name(new_desk: Callable[..., Desk]) -> None:
    desk = new_desk()
    assert isinstance(desk.join(NORTH, "north", "south"), Opened)
    assert isinstance(desk.join(NORTH, "north", "south"), Opened), "again"
    assert desk.join(NORTH).code == "mismatch"
    assert isinstance(desk.says(NORTH, CloseRun(run="r")), Done)
    assert isinstance(desk.join(NORTH), Opened)
    assert list(desk.service.holdings.runs) == [((), "r")]


# --- KV memory ---------------------------------------------------------------------------------------


def test_a_share_counts_in_the_whole() -> None:
    whole = KVMemory(100)
    one, other = Allowance(whole, 50), Allowance(whole, 50)
    one.held += 70
    other.held += 20
    assert (whole.held, one.free, other.free) == (90, 10, 10)
    assert (one.borrowed, other.borrowed) == (20, 0)
    one.held -= 70
    assert (whole.held, one.borrowed) == (20, 0)


def test_a_lone_silo_may_have_all_of_it(new_desk: Callable[..., Desk]) -> None:
    desk = new_desk(kv_bytes=4 * PAGE_BYTES, kv_share=2 * PAGE_BYTES)
    assert isinstance(desk.open(NORTH, "s", 4), Opened)
    assert isinstance(desk.extend(NORTH, "s", 0, 4 * PAGE), Result)
    assert desk.service.holdings.memory.held == 4 * PAGE_BYTES


def test_what_was_borrowed_is_given_back_at_once_and_can_be_sent_again(
    new_desk: Callable[..., Desk],
) -> None:
    desk = new_desk(kv_bytes=4 * PAGE_BYTES, kv_share=2 * PAGE_BYTES)
    for name in "ab":
        desk.open(NORTH, name, 2)
        assert isinstance(desk.extend(NORTH, name, 0, 2 * PAGE), Result)
    assert isinstance(desk.open(SOUTH, "s", 2), Opened)
    assert isinstance(desk.extend(SOUTH, "s", 0, 2 * PAGE), Result)
    assert desk.extend(NORTH, "a", 2 * PAGE - 1, 1).code == "unknown-name", "the one used least lately"
    assert isinstance(desk.extend(NORTH, "b", 2 * PAGE - 1, 1), Result)
    refused = desk.open(NORTH, "a", 2)  # South's is its own: nobody may take it back.
    assert (refused.code, refused.side) == ("limit", "worker")
    assert isinstance(desk.extend(SOUTH, "s", 2 * PAGE - 1, 1), Result)


def test_who_has_borrowed_cannot_borrow_from_another_who_has(new_desk: Callable[..., Desk]) -> None:
    desk = new_desk(kv_bytes=6 * PAGE_BYTES, kv_share=2 * PAGE_BYTES)
    for silo in (NORTH, SOUTH):
        desk.open(silo, "s", 3)
        assert isinstance(desk.extend(silo, "s", 0, 3 * PAGE), Result)
    assert desk.open(SOUTH, "t", 1).code == "limit"
    assert isinstance(desk.extend(NORTH, "s", 3 * PAGE - 1, 1), Result)
    assert isinstance(desk.open(WEST, "s", 1), Opened)


def test_memory_that_cannot_be_taken_back_is_not_lent(new_desk: Callable[..., Desk]) -> None:
    desk = new_desk(kv_bytes=4 * PAGE_BYTES, kv_share=2 * PAGE_BYTES)
    assert isinstance(desk.open(NORTH, "a", 1, replays=False), Opened)
    error = desk.open(NORTH, "b", 2, replays=False)
    assert (error.code, error.side) == ("limit", "worker")
    assert "--kv-per-silo" in error.what
    assert isinstance(desk.open(SOUTH, "a", 2, replays=False), Opened)
    assert isinstance(desk.says(NORTH, CloseSession(session="a")), Done)
    assert isinstance(desk.open(NORTH, "b", 2, replays=False), Opened)
    for silo, name in ((NORTH, "b"), (SOUTH, "a")):
        desk.says(silo, CloseSession(session=name))
    assert (desk.service.holdings.memory.held, desk.service.holdings._shares) == (0, {})


# --- adapters ----------------------------------------------------------------------------------------


def test_an_adapter_takes_what_its_weights_take(new_desk: Callable[..., Desk]) -> None:
    desk = new_desk()
    assert isinstance(desk.join(NORTH, lora=LoraPlan(rank=3, targets=("q_proj", "v_proj"))), Opened)
    (run,) = desk.service.holdings.runs.values()
    weights = sum(parameter.nbytes for parameter in run.parameters.values())
    assert list(desk.service.holdings._adapters.values()) == [(NORTH, 5 * weights)]


def test_adapters_are_bounded_for_one_silo_and_for_all(new_desk: Callable[..., Desk]) -> None:
    desk = new_desk()
    desk.join(NORTH)
    ((_, size),) = desk.service.holdings._adapters.values()
    desk = new_desk(adapter_bytes=2 * size)
    error = desk.join(NORTH, "north", lora=LoraPlan(rank=3, targets=("q_proj", "v_proj")))
    assert (error.code, error.side, "--adapter-memory" in error.what) == ("limit", "worker", True)
    assert isinstance(desk.join(NORTH, "north"), Opened)
    assert isinstance(desk.join(SOUTH, "south"), Opened)
    assert desk.join(WEST, "west").code == "limit"
    assert isinstance(desk.says(SOUTH, CloseRun(run="r")), Done)
    assert isinstance(desk.join(WEST, "west"), Opened)
    for silo in (NORTH, WEST):
        desk.says(silo, CloseRun(run="r"))
    assert desk.service.holdings._adapters == {}


# --- activations -------------------------------------------------------------------------------------


def test_a_silo_that_keeps_all_it_may_leaves_others_their_room(new_desk: Callable[..., Desk]) -> None:
    entry = 8 * HIDDEN * 4
    desk = new_desk(activation_bytes=8 * entry, activation_share=4 * entry)
    for silo in (NORTH, SOUTH):
        desk.join(silo, silo.decode().strip("."), silos=1)

    def forward(silo: bytes, number: int) -> Any:
        return desk.says(silo, Forward(run="r", microbatch=number, lengths=(8,)), [states(8)])

    for number in range(4):
        assert isinstance(forward(NORTH, number), Result)
    error = forward(NORTH, 4)
    assert (error.code, "--activation-per-silo" in error.what) == ("limit", True)
    for number in range(4):
        assert isinstance(forward(SOUTH, number), Result)
    for silo in (NORTH, SOUTH):
        for number in range(4):
            header = Backward(run="r", microbatch=number)
            assert isinstance(desk.says(silo, header, [states(8)]), Result)
    assert desk.service.activations.held == 0


def test_graphs_beyond_a_share_are_given_back_and_the_numbers_stay(
    new_desk: Callable[..., Desk], hosted: tuple[Span, ModelCard]
) -> None:
    def train(desk: Desk) -> list[Tensor]:
        out = []
        for silo in (NORTH, SOUTH):
            desk.join(silo, silo.decode().strip("."), silos=1)
        for number in range(3):
            desk.says(NORTH, Forward(run="r", microbatch=number, lengths=(8,)), [states(8, number)])
        desk.says(SOUTH, Forward(run="r", microbatch=0, lengths=(8,)), [states(8, 9)])
        graphs = {key[0] for key, one in desk.service.activations._kept.items() if one.output is not None}
        assert graphs == {NORTH, SOUTH}
        held.append(desk.service.activations.held)
        for silo, number in ((NORTH, 0), (NORTH, 1), (NORTH, 2), (SOUTH, 0)):
            out += desk.tensors(silo, Backward(run="r", microbatch=number), [states(8, 5)])
        return out

    held: list[int] = []
    ample = train(new_desk())
    budget = held[0] * 7 // 8  # Not quite room for all four graphs.
    desk = new_desk(activation_bytes=budget, activation_share=budget // 2)
    scarce = train(desk)
    assert held[1] <= budget < held[0]
    for one, other in zip(ample, scarce, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_rows_of_two_silos_lie_side_by_side() -> None:
    """So that they attend in one call."""
    whole = KVMemory(1 << 20)
    shape = KVShape(layers=1, groups=1, dim=8, dtype=torch.float32, device=torch.device("cpu"))
    rows = [RowCache(shape, 64, Allowance(whole, 1 << 19)) for _ in range(2)]
    for row in rows:
        row.check_room(4)
    places = [row.place for row in rows]
    assert places[0] is not None
    assert places[1] is not None
    assert places[0].slab is places[1].slab
    for row in rows:
        row.free()
    assert whole.held == 0
