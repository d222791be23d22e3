"""The trunk service: bad requests get clear answers, and nobody else is disturbed by them."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from broker.parcel import Parcel
from codec.frames import encode_raw
from codec.messages import (
    Adapter,
    Backward,
    CloseRun,
    CloseSession,
    Commit,
    Committed,
    Done,
    Error,
    Extend,
    Forward,
    GetAdapter,
    Gone,
    Heartbeat,
    Opened,
    OpenRun,
    OpenSession,
    Result,
    TensorSpec,
)
from codec.partition import Span as Blocks
from codec.plan import LoraPlan, ModelCard, RunPlan
from codec.tensors import decode_tensors, encode_tensors
from workers.checkpoint import Checkpoint
from workers.lora import adapter_tensors, add_adapter, drop_adapter
from workers.service import TrunkService
from workers.span import Span

NORTH, SOUTH, EAST = b"north...", b"south...", b"east...."
HOSTED, TRUNK = Blocks(1, 5), Blocks(2, 4)
HIDDEN, CAPACITY = 64, 8
LORA = LoraPlan(rank=2, targets=("q_proj", "v_proj"))
PLAN = RunPlan(silos=2, steps=3, lora=LORA)
TOKEN_BYTES = 2 * len(TRUNK) * 2 * 16 * 4
"""Keys and values of one token: two blocks, two groups of 16, fp32."""


@dataclass(frozen=True)
class Worker:
    """What a worker process loads once."""

    span: Span
    card: ModelCard


@pytest.fixture(scope="session")
def worker(tiny_checkpoint: Checkpoint) -> Worker:
    card = tiny_checkpoint.card(range(HOSTED.start, HOSTED.stop))
    return Worker(Span(tiny_checkpoint, HOSTED), card)


class Office:
    """A service, and silos that ask it by name."""

    def __init__(self, worker: Worker, kv_bytes: int, handle: Any) -> None:
        self.worker, self.handle = worker, handle
        self.service = TrunkService(worker.span, worker.card, kv_bytes)
        self._ids = count(1)

    def tell(self, silo: bytes, header: Any, tensors: Sequence[Any] = ()) -> list[Parcel]:
        """All answers that a request causes, to whomever."""
        if tensors and isinstance(tensors[0], Tensor):
            specs, frames = encode_tensors(tensors, "exact", "test")
        else:
            specs, frames = tuple(s for s, _ in tensors), [f for _, f in tensors]
        numbered = msgspec.structs.replace(header, id=next(self._ids), tensors=specs)
        return self.handle(self.service, [Parcel.of(numbered, frames, silo)])

    def ask(self, silo: bytes, header: Any, tensors: Sequence[Any] = ()) -> Any:
        """The one answer, which is the asker's; with `tensors` where it has some."""
        (parcel,) = self.tell(silo, header, tensors)
        assert parcel.peer == silo
        return parcel.header

    def compute(self, silo: bytes, header: Any, tensors: Sequence[Any]) -> Tensor:
        (parcel,) = self.tell(silo, header, tensors)
        assert isinstance(parcel.header, Result), parcel.header
        (tensor,) = received(parcel)
        return tensor

    def open_session(self, silo: bytes, **fields: Any) -> Any:
        return self.ask(silo, self.session(**fields))

    def open_run(self, silo: bytes, **fields: Any) -> Any:
        return self.ask(silo, self.run(**fields))

    def session(self, **fields: Any) -> OpenSession:
        common = {"session": "s", "model": self.worker.card, "start": TRUNK.start, "stop": TRUNK.stop}
        return OpenSession(**{**common, "rows": 2, "capacity": CAPACITY, **fields})

    def run(self, **fields: Any) -> OpenRun:
        common = {"run": "r", "model": self.worker.card, "start": TRUNK.start, "stop": TRUNK.stop}
        return OpenRun(**{**common, "plan": PLAN, **fields})

    def gone(self, silo: bytes) -> list[Parcel]:
        return self.handle(self.service, [Parcel.of(Gone(name=silo.decode().strip(".")), peer=silo)])

    def lora_tensors(self) -> list[str]:
        return [name for name, _ in self.worker.span.model.named_parameters() if "lora" in name]


@pytest.fixture
def new_office(worker: Worker, handle: Any) -> Iterator[Callable[[int], Office]]:
    """`new_office(kv_bytes)`: nothing of any silo may remain in the span once all are gone."""
    made: list[Office] = []

    def make(kv_bytes: int = 1 << 20) -> Office:
        made.append(Office(worker, kv_bytes, handle))
        return made[-1]

    yield make
    for office in made:
        for silo in (NORTH, SOUTH, EAST):
            office.gone(silo)
        assert office.lora_tensors() == []


@pytest.fixture
def office(new_office: Callable[[], Office]) -> Office:
    return new_office()


@pytest.fixture
def busy(office: Office) -> Office:
    """North and south each have a session `s` of two rows, three tokens in row 0, and run `r`."""
    for silo in (NORTH, SOUTH):
        assert isinstance(office.open_session(silo), Opened)
        assert isinstance(office.open_run(silo), Opened)
        office.compute(silo, extend([0], [0], [3]), [hidden(3)])
    return office


def hidden(tokens: int, seed: int = 0, width: int = HIDDEN) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def extend(rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int], name: str = "s") -> Extend:
    return Extend(session=name, rows=tuple(rows), starts=tuple(starts), lengths=tuple(lengths))


def forward(microbatch: int, *lengths: int, run: str = "r") -> Forward:
    return Forward(run=run, microbatch=microbatch, lengths=lengths)


def commit(step: int = 0, **fields: Any) -> Commit:
    return Commit(**{"run": "r", "step": step, "loss_tokens": 4, "square_norm": 0.0, **fields})


def received(parcel: Parcel) -> list[Tensor]:
    header: Any = parcel.header
    return decode_tensors(header.tensors, parcel.buffers(), boundary="test")


def bare(*values: float, shape: tuple[int, ...] | None = None) -> tuple[TensorSpec, Any]:
    """A tensor frame that no encoder of ours would make: not finite, or of another shape."""
    data = np.array(values, dtype=np.float32).view(np.uint8)
    spec, frame = encode_raw(data, "f32", (1, len(values)))
    return msgspec.structs.replace(spec, shape=shape or spec.shape), frame


NAN, INF = float("nan"), float("inf")
ONE = [0.0] * (HIDDEN - 1)

BAD: dict[str, tuple[Any, Sequence[Any], str, str, str]] = {
    # what: request of north, tensors, code, side, words
    "extend: flat": (extend([0], [3], [1]), [torch.ones(HIDDEN)], "mismatch", "silo", "[tokens, 64]"),
    "extend: narrow": (extend([0], [3], [1]), [hidden(1, width=63)], "mismatch", "silo", "[tokens, 64]"),
    "extend: none": (extend([0], [3], [1]), [], "mismatch", "silo", "one tensor"),
    "extend: two": (extend([0], [3], [1]), [hidden(1), hidden(1)], "mismatch", "silo", "one tensor"),
    "extend: count": (extend([0], [3], [2]), [hidden(1)], "mismatch", "silo", "sum to 2, the tensor holds 1"),
    "extend: stranger": (extend([0], [0], [1], "x"), [hidden(1)], "unknown-name", "silo", "no session 'x'"),
    "extend: row": (extend([2], [0], [1]), [hidden(1)], "limit", "silo", "has 2 rows"),
    "extend: twice": (extend([1, 1], [0, 1], [1, 1]), [hidden(2)], "protocol", "silo", "distinct rows"),
    "extend: starts": (extend([0, 1], [3], [1, 1]), [hidden(2)], "protocol", "silo", "one each"),
    "extend: lengths": (extend([0, 1], [3, 0], [2]), [hidden(2)], "protocol", "silo", "one each"),
    "extend: start": (extend([0], [4], [1]), [hidden(1)], "limit", "silo", "position 4, the cache ends at 3"),
    "extend: capacity": (extend([0], [3], [6]), [hidden(6)], "limit", "silo", "9 tokens do not fit"),
    "extend: 2nd start": (extend([0, 1], [1, 1], [1, 1]), [hidden(2)], "limit", "silo", "cache ends at 0"),
    "extend: 2nd full": (extend([0, 1], [1, 0], [1, 9]), [hidden(10)], "limit", "silo", "9 tokens do not"),
    "extend: NaN": (extend([0], [3], [1]), [bare(NAN, *ONE)], "frame", "silo", "silo's extend: NaN"),
    "extend: inf": (extend([0], [3], [1]), [bare(-INF, *ONE)], "frame", "silo", "silo's extend: NaN"),
    "extend: lie": (extend([0], [3], [1]), [bare(1.0, shape=(1, 64))], "frame", "silo", "takes 256 bytes"),
    "close: stranger": (CloseSession(session="x"), [], "unknown-name", "silo", "no session 'x'"),
    "forward: stranger": (forward(0, 1, run="x"), [hidden(1)], "unknown-name", "silo", "no run 'x'"),
    "forward: shape": (forward(0, 1), [hidden(1, width=65)], "mismatch", "silo", "[tokens, 64]"),
    "forward: count": (forward(0, 2, 3), [hidden(4)], "mismatch", "silo", "sum to 5, the tensor holds 4"),
    "forward: NaN": (forward(0, 1), [bare(*ONE, NAN)], "frame", "silo", "silo's forward: NaN"),
    "backward: stranger": (Backward(run="x", microbatch=0), [hidden(1)], "unknown-name", "silo", "run 'x'"),
    "backward: unknown": (
        Backward(run="r", microbatch=7),
        [hidden(1)],
        "unknown-name",
        "silo",
        "micro-batch 7",
    ),
    "backward: none": (Backward(run="r", microbatch=7), [], "mismatch", "silo", "one tensor"),
    "backward: NaN": (Backward(run="r", microbatch=7), [bare(NAN, *ONE)], "frame", "silo", "backward: NaN"),
    "commit: step": (commit(1), [], "protocol", "silo", "at step 0, the commit is of step 1"),
    "commit: stranger": (commit(run="x"), [], "unknown-name", "silo", "no run 'x'"),
    "commit: nameless": (commit(), [hidden(1)], "protocol", "silo", "1 tensors came with 0 names"),
    "commit: bare name": (commit(names=("a",)), [], "protocol", "silo", "0 tensors came with 1 names"),
    "commit: same name": (commit(names=("a", "a")), [hidden(1)] * 2, "protocol", "silo", "2 tensors"),
    "commit: own ends": (commit(names=("a",)), [hidden(1)], "protocol", "silo", "--ends shared"),
    "adapter: stranger": (GetAdapter(run="x"), [], "unknown-name", "silo", "no run 'x'"),
    "close run: stranger": (CloseRun(run="x"), [], "unknown-name", "silo", "no run 'x'"),
}


def undisturbed(office: Office, silo: bytes) -> None:
    """The silo's session continues where it stood, and its run goes on."""
    alone = Office(office.worker, 1 << 20, office.handle)
    alone.open_session(EAST)
    alone.compute(EAST, extend([0], [0], [3]), [hidden(3)])
    expected = alone.compute(EAST, extend([0, 1], [3, 0], [1, 2]), [hidden(3, seed=5)])
    assert torch.equal(office.compute(silo, extend([0, 1], [3, 0], [1, 2]), [hidden(3, seed=5)]), expected)
    out = office.compute(silo, forward(90, 2, 1), [hidden(3)])
    gradient = office.compute(silo, Backward(run="r", microbatch=90), [torch.ones_like(out)])
    assert gradient.shape == (3, HIDDEN)
    assert gradient.abs().sum() > 0
    assert isinstance(office.tell(silo, commit(names=("x",)))[0].header, Error)


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_is_answered_and_disturbs_nobody(busy: Office, what: str) -> None:
    header, tensors, code, side, words = BAD[what]
    error = busy.ask(NORTH, header, tensors)
    assert isinstance(error, Error), error
    assert (error.code, error.side) == (code, side)
    assert words in error.what + error.hint
    undisturbed(busy, SOUTH)
    undisturbed(busy, NORTH)


def test_anothers_session_and_run_look_like_none(office: Office) -> None:
    office.open_session(NORTH)
    office.open_run(NORTH)
    for request, tensors in (
        (extend([0], [0], [1]), [hidden(1)]),
        (CloseSession(session="s"), []),
        (forward(0, 1), [hidden(1)]),
        (Backward(run="r", microbatch=0), [hidden(1)]),
        (commit(), []),
        (GetAdapter(run="r"), []),
        (CloseRun(run="r"), []),
    ):
        mine, theirs = office.ask(EAST, request, tensors), office.ask(EAST, renamed(request), tensors)
        assert (mine.code, mine.side, mine.hint) == (theirs.code, theirs.side, theirs.hint)
        assert mine.code == "unknown-name"
        assert mine.what.replace("'s'", "'x'").replace("'r'", "'x'") == theirs.what


def renamed(request: Any) -> Any:
    field = "session" if hasattr(request, "session") else "run"
    return msgspec.structs.replace(request, **{field: "x"})


def refused(office: Office, request: Any, tensors: Sequence[Any] = (), silo: bytes = EAST) -> Error:
    """The error that answers an open; nothing was opened."""
    lora = office.lora_tensors()
    error = office.ask(silo, request, tensors)
    assert isinstance(error, Error), error
    assert office.lora_tensors() == lora, "a refused open leaves no adapter behind"
    return error


@pytest.mark.parametrize("kind", ["session", "run"])
def test_another_model_is_refused(busy: Office, kind: str) -> None:
    make, card = getattr(busy, kind), busy.worker.card
    for changed, words in (
        ({"fingerprint": "another"}, "architectures or tensors differ"),
        ({"samples": {3: "another"}}, "weights differ, first in block 3"),
    ):
        error = refused(busy, make(**{kind: "n", "model": msgspec.structs.replace(card, **changed)}))
        assert (error.code, error.side) == ("mismatch", "silo")
        assert words in error.what
        assert "--model" in error.hint
    undisturbed(busy, NORTH)


@pytest.mark.parametrize("kind", ["session", "run"])
@pytest.mark.parametrize(
    ("start", "stop", "code", "side"),
    [
        (0, 4, "mismatch", "worker"),
        (2, 6, "mismatch", "worker"),
        (0, 6, "mismatch", "worker"),
        (3, 3, "protocol", "silo"),
        (4, 2, "usage", "silo"),
    ],
)
def test_blocks_it_does_not_host_are_refused(
    busy: Office, kind: str, start: int, stop: int, code: str, side: str
) -> None:
    error = refused(busy, getattr(busy, kind)(**{kind: "n", "start": start, "stop": stop}))
    assert (error.code, error.side) == (code, side)
    if code == "mismatch":
        assert "hosts blocks 1:5" in error.what
    undisturbed(busy, NORTH)


def test_the_kv_budget_counts_every_session_until_it_ends(new_office: Callable[..., Office]) -> None:
    office = new_office(4 * CAPACITY * TOKEN_BYTES)
    assert isinstance(office.open_session(NORTH), Opened)
    error = refused(office, office.session(rows=3))
    assert (error.code, error.side) == ("limit", "worker")
    assert "KV cache" in error.what
    assert "--kv-memory" in error.hint
    assert isinstance(office.open_session(SOUTH), Opened)
    assert refused(office, office.session(rows=1, capacity=1)).code == "limit"
    office.compute(SOUTH, extend([0], [0], [2]), [hidden(2)])
    assert isinstance(office.ask(NORTH, CloseSession(session="s")), Done)
    assert isinstance(office.open_session(EAST), Opened)
    assert refused(office, office.session(session="t", rows=1, capacity=1)).code == "limit"
    office.gone(SOUTH)
    assert isinstance(office.open_session(EAST, session="t"), Opened)


def test_opening_a_session_again_begins_it_anew(new_office: Callable[..., Office]) -> None:
    office = new_office(2 * CAPACITY * TOKEN_BYTES)
    office.open_session(NORTH)
    office.compute(NORTH, extend([0], [0], [3]), [hidden(3)])
    assert isinstance(office.open_session(NORTH), Opened), "its own memory is free to it"
    assert office.ask(NORTH, extend([0], [3], [1]), [hidden(1)]).code == "limit"
    office.compute(NORTH, extend([0], [0], [3]), [hidden(3)])
    # One that is refused leaves the session as it was, as the broker takes it to be.
    assert office.ask(NORTH, office.session(rows=9)).code == "limit"
    assert office.ask(NORTH, office.session(adapter=LORA, names=("x",)), [hidden(1)]).code == "mismatch"
    office.compute(NORTH, extend([0], [3], [1]), [hidden(1)])


def adapter_for(worker: Worker, seed: int = 0) -> dict[str, Tensor]:
    """Values for every tensor of an adapter on the trunk, B not zero."""
    add_adapter(worker.span, "probe", LORA, 0, TRUNK)
    found = {name: tensor.detach() for name, tensor in adapter_tensors(worker.span, "probe").items()}
    drop_adapter(worker.span, "probe")
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in found.items()}


def test_an_adapter_that_does_not_fit_is_refused(busy: Office) -> None:
    good = adapter_for(busy.worker)
    first = next(iter(good))
    missing = {name: tensor for name, tensor in good.items() if name != first}
    misshapen = {**good, first: torch.ones(3, 3)}
    for tensors, words in ((missing, f"{first} is missing"), (misshapen, f"{first} is (3, 3)")):
        names, values = tuple(tensors), list(tensors.values())
        for request in (
            busy.session(session="n", adapter=LORA, names=names),
            busy.run(run="n", plan=PLAN, names=names),
        ):
            error = refused(busy, request, values)
            assert (error.code, error.side) == ("mismatch", "silo")
            assert words in error.what
    undisturbed(busy, NORTH)


def test_an_open_with_the_wrong_tensors_is_refused(busy: Office) -> None:
    good = adapter_for(busy.worker)
    names, values = tuple(good), list(good.values())
    session, run = busy.session(session="n", adapter=LORA), busy.run(run="n")
    for request, tensors in (
        (session, values),
        (run, values),
        (msgspec.structs.replace(session, names=names), values[1:]),
        (msgspec.structs.replace(run, names=names[1:]), values),
        (msgspec.structs.replace(run, names=(names[0], *names[:-1])), values),
        (busy.session(session="n", names=names), values),
    ):
        error = refused(busy, request, tensors)
        assert (error.code, error.side) == ("protocol", "silo")
    bad = [bare(NAN, *ONE), *[bare(*ONE, 0.0)] * (len(names) - 1)]
    for request in (session, run):
        error = refused(busy, msgspec.structs.replace(request, names=names), bad)
        assert (error.code, error.side) == ("frame", "silo")
    undisturbed(busy, NORTH)


def test_layers_that_the_model_does_not_have_are_refused(busy: Office) -> None:
    lora = LoraPlan(rank=2, targets=("q_proj", "no_such"))
    plan = msgspec.structs.replace(PLAN, lora=lora)
    for request in (busy.session(session="n", adapter=lora), busy.run(run="n", plan=plan)):
        error = refused(busy, request)
        assert error.side == "silo"
        assert "no_such" in error.what
    undisturbed(busy, NORTH)


def test_silos_of_one_run_agree(office: Office) -> None:
    good = adapter_for(office.worker)
    names, values = tuple(good), list(good.values())
    assert isinstance(office.ask(NORTH, office.run(names=names), values), Opened)
    other = list(adapter_for(office.worker, seed=1).values())
    three = msgspec.structs.replace(PLAN, silos=3)
    for request, tensors, words in (
        (office.run(names=names), other, "another first adapter"),
        (office.run(), (), "another first adapter"),
        (office.run(names=names, start=1), values, "trunk is 2:4"),
        (office.run(names=names, plan=three), values, "other settings"),
    ):
        error = refused(office, request, tensors, SOUTH)
        assert (error.code, error.side) == ("mismatch", "silo")
        assert words in error.what
    assert isinstance(office.ask(SOUTH, office.run(names=names), values), Opened)
    error = refused(office, office.run(names=names), values)
    assert (error.code, error.side) == ("limit", "silo")


def test_a_refused_extend_rolls_no_row_back(busy: Office) -> None:
    """Row 0 would be cut to one token before row 1 turns out to be too full."""
    assert busy.ask(NORTH, extend([0, 1], [1, 0], [1, 9]), [hidden(10)]).code == "limit"
    busy.compute(NORTH, extend([0], [3], [1]), [hidden(1)])


def test_a_gradient_of_the_wrong_shape_can_be_sent_again(busy: Office) -> None:
    busy.compute(NORTH, forward(0, 2, 1), [hidden(3)])
    error = busy.ask(NORTH, Backward(run="r", microbatch=0), [hidden(2)])
    assert (error.code, error.side) == ("mismatch", "silo")
    busy.compute(NORTH, Backward(run="r", microbatch=0), [hidden(3)])
    again = busy.ask(NORTH, Backward(run="r", microbatch=0), [hidden(3)])
    assert again.code == "unknown-name", "a gradient counts once"


def test_a_micro_batch_is_its_silos_own(busy: Office) -> None:
    busy.compute(NORTH, forward(0, 1), [hidden(1)])
    assert busy.ask(SOUTH, Backward(run="r", microbatch=0), [hidden(1)]).code == "unknown-name"
    busy.compute(NORTH, Backward(run="r", microbatch=0), [hidden(1)])


def test_sessions_that_come_and_go_do_not_disturb_a_backward(busy: Office) -> None:
    """PEFT freezes adapters when another is selected or deleted: the gradient must flow all the same."""
    good = adapter_for(busy.worker)
    opening = busy.session(session="n", adapter=LORA, names=tuple(good))

    def step(disturb: bool) -> tuple[Tensor, dict[str, Tensor]]:
        number = int(disturb)
        out = busy.compute(NORTH, forward(number, 3), [hidden(3)])
        if disturb:
            assert isinstance(busy.ask(EAST, opening, list(good.values())), Opened)
            busy.compute(EAST, extend([0], [0], [2], "n"), [hidden(2)])
            assert isinstance(busy.ask(EAST, CloseSession(session="n")), Done)
        gradient = busy.compute(NORTH, Backward(run="r", microbatch=number), [torch.ones_like(out)])
        run = busy.service.holdings.runs[(), "r"]
        grads = {name: p.grad.clone() for name, p in run.parameters.items() if p.grad is not None}
        for parameter in run.parameters.values():
            parameter.grad = None
        return gradient, grads

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (calm, calm_grads), (disturbed, disturbed_grads) = step(False), step(True)
    assert torch.equal(calm, disturbed)
    assert calm_grads.keys() == disturbed_grads.keys() != set()
    assert all(torch.equal(grad, disturbed_grads[name]) for name, grad in calm_grads.items())


def test_a_step_is_answered_to_every_silo(busy: Office) -> None:
    for silo in (NORTH, SOUTH):
        out = busy.compute(silo, forward(0, 2), [hidden(2)])
        busy.compute(silo, Backward(run="r", microbatch=0), [torch.ones_like(out)])
    assert busy.tell(NORTH, commit(loss_tokens=1, square_norm=9.0)) == []
    again = busy.ask(NORTH, commit(loss_tokens=2))
    assert (again.code, again.side) == ("protocol", "silo")
    answers = busy.tell(SOUTH, commit(loss_tokens=3, square_norm=16.0))
    assert [parcel.peer for parcel in answers] == [NORTH, SOUTH]
    first, second = (parcel.header for parcel in answers)
    assert isinstance(first, Committed)
    assert isinstance(second, Committed)
    assert first.id < second.id
    assert (first.step, first.divisor) == (second.step, second.divisor) == (0, 4.0)
    assert first.grad_norm == second.grad_norm > (25.0**0.5) / 4
    again = busy.ask(NORTH, commit(0))
    assert msgspec.structs.replace(again, id=first.id) == first, "who asks again is told again"
    assert busy.ask(NORTH, commit(2)).code == "protocol"


def test_a_gradient_that_is_not_finite_takes_no_step_and_all_hear_it(busy: Office) -> None:
    before = received(busy.tell(NORTH, GetAdapter(run="r"))[0])
    for number in range(3):
        out = busy.compute(NORTH, forward(number, 2), [hidden(2)])
        big = torch.full_like(out, 1e38)
        busy.tell(NORTH, Backward(run="r", microbatch=number, wants_gradient=False), [big])
    assert busy.tell(NORTH, commit()) == []
    answers = busy.tell(SOUTH, commit())
    assert [parcel.peer for parcel in answers] == [NORTH, SOUTH]
    for parcel in answers:
        assert isinstance(parcel.header, Error)
        assert parcel.header.side == "worker"
        assert "gradient of step 0 is not finite" in parcel.header.what
        assert "learning rate" in parcel.header.hint
    after = received(busy.tell(NORTH, GetAdapter(run="r"))[0])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert busy.tell(NORTH, commit()) == []
    assert isinstance(busy.tell(SOUTH, commit())[0].header, Committed), "and the step can be taken again"


def test_shared_ends_are_summed_and_of_one_shape(office: Office) -> None:
    plan = msgspec.structs.replace(PLAN, ends="shared")
    for silo in (NORTH, SOUTH):
        office.open_run(silo, plan=plan)
    assert office.tell(NORTH, commit(names=("a", "b")), [torch.ones(2, 3), torch.ones(1)]) == []
    error = office.ask(SOUTH, commit(names=("a", "b")), [torch.ones(1, 3), torch.ones(1)])
    assert (error.code, error.side) == ("mismatch", "silo")
    assert "a is (1, 3) here and (2, 3) at another silo" in error.what
    error = office.ask(SOUTH, commit(names=("a",)), [torch.ones(2, 3)])
    assert error.code == "mismatch"
    answers = office.tell(SOUTH, commit(names=("a", "b")), [torch.full((2, 3), 2.0), torch.ones(1)])
    assert [parcel.peer for parcel in answers] == [NORTH, SOUTH]
    for parcel in answers:
        a, b = received(parcel)
        assert torch.equal(a, torch.full((2, 3), 3.0))
        assert torch.equal(b, torch.full((1,), 2.0))


def test_a_fetched_adapter_is_not_changed_by_the_next_step(busy: Office) -> None:
    """Frames leave without a copy: they must not be the memory that the optimizer writes to."""
    (parcel,) = busy.tell(NORTH, GetAdapter(run="r"))
    assert isinstance(parcel.header, Adapter)
    sent = [bytes(buffer) for buffer in parcel.buffers()]
    for silo in (NORTH, SOUTH):
        out = busy.compute(silo, forward(0, 2), [hidden(2)])
        busy.compute(silo, Backward(run="r", microbatch=0), [torch.ones_like(out)])
        busy.tell(silo, commit())
    assert [bytes(buffer) for buffer in parcel.buffers()] == sent
    after = received(busy.tell(NORTH, GetAdapter(run="r"))[0])
    assert any(not torch.equal(a, b) for a, b in zip(received(parcel), after, strict=True))


def test_an_answer_that_cannot_cross_is_an_error_of_the_workers(office: Office) -> None:
    office.open_session(NORTH)
    office.open_session(SOUTH)
    narrow = msgspec.structs.replace(extend([0], [0], [1]), wire="fp16")
    error = office.ask(NORTH, narrow, [hidden(1) * 1e6])
    assert (error.code, error.side) == ("frame", "worker")
    assert "worker's result" in error.what
    assert "bf16" in error.hint
    office.compute(SOUTH, extend([0], [0], [1]), [hidden(1) * 1e6])


def test_a_defect_is_an_answer_too(
    busy: Office, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Span, "run_parts", broken)
        error = busy.ask(NORTH, extend([1], [0], [1]), [hidden(1)])
    assert (error.code, error.side) == ("error", "worker")
    assert "RuntimeError: out of memory" in error.what
    assert "log" in error.hint
    assert any(record.exc_info for record in caplog.records)
    undisturbed(busy, SOUTH)
    undisturbed(busy, NORTH)


def test_what_is_no_request_is_not_answered(busy: Office) -> None:
    for header in (Heartbeat(), Result(id=1), Opened(id=1), Error(id=1, code="x", what="y", side="broker")):
        assert busy.handle(busy.service, [Parcel.of(header, peer=NORTH)]) == []


def test_a_silo_that_is_gone_leaves_nothing(new_office: Callable[..., Office]) -> None:
    office = new_office(4 * CAPACITY * TOKEN_BYTES)
    good = adapter_for(office.worker)
    names, values = tuple(good), list(good.values())
    clean = office.worker.span.weight_bytes
    for silo in (NORTH, SOUTH):
        assert isinstance(office.ask(silo, office.session(adapter=LORA, names=names), values), Opened)
    one = msgspec.structs.replace(PLAN, silos=1)
    for name in ("north's", "another"):
        assert isinstance(office.open_run(NORTH, run=name, plan=one), Opened)
        office.compute(NORTH, forward(0, 2, run=name), [hidden(2)])
    per_adapter = len(good)
    assert len(office.lora_tensors()) == 4 * per_adapter
    expected = office.compute(SOUTH, extend([0], [0], [2]), [hidden(2)])
    assert office.gone(NORTH) == []
    assert len(office.lora_tensors()) == per_adapter, "south's alone"
    assert list(office.service.holdings.runs) == []
    assert list(office.service.holdings._sessions) == [(SOUTH, "s")]
    assert torch.equal(office.compute(SOUTH, extend([0], [0], [2]), [hidden(2)]), expected)
    assert isinstance(office.open_session(EAST), Opened), "north's KV memory is free again"
    for request in (extend([0], [0], [1]), forward(0, 1, run="another")):
        assert office.ask(NORTH, request, [hidden(1)]).code == "unknown-name"
    office.gone(SOUTH)
    office.gone(EAST)
    assert office.worker.span.weight_bytes == clean


def test_a_silo_that_goes_mid_step_is_told_to_those_who_wait(busy: Office) -> None:
    assert busy.tell(NORTH, commit()) == []
    (parcel,) = busy.gone(SOUTH)
    assert parcel.peer == NORTH
    assert isinstance(parcel.header, Error)
    assert (parcel.header.code, parcel.header.side) == ("ended", "silo")
    assert "silo 'south' left the run at step 0" in parcel.header.what
    for request, tensors in ((forward(1, 1), [hidden(1)]), (commit(), [])):
        assert busy.ask(NORTH, request, tensors).code == "ended"
    assert busy.open_run(SOUTH).code == "unavailable", "nobody joins what cannot go on"
    busy.gone(NORTH)
    assert isinstance(busy.open_run(SOUTH), Opened), "a new run of the same name"


def test_a_silo_that_closes_mid_run_is_told_to_those_who_wait(busy: Office) -> None:
    assert busy.tell(NORTH, commit()) == []
    waiting, done = busy.tell(SOUTH, CloseRun(run="r"))
    assert (waiting.peer, done.peer) == (NORTH, SOUTH)
    assert isinstance(waiting.header, Error)
    assert (waiting.header.code, waiting.header.side) == ("ended", "silo")
    assert "left the run at step 0" in waiting.header.what
    assert isinstance(done.header, Done)


def test_after_its_last_step_a_run_is_closed_one_by_one(office: Office) -> None:
    plan = msgspec.structs.replace(PLAN, steps=1)
    for silo in (NORTH, SOUTH):
        office.open_run(silo, plan=plan)
        office.tell(silo, commit())
    assert isinstance(office.ask(NORTH, CloseRun(run="r")), Done)
    assert isinstance(office.tell(SOUTH, GetAdapter(run="r"))[0].header, Adapter)
    assert office.lora_tensors() != []
    assert isinstance(office.ask(SOUTH, CloseRun(run="r")), Done)
    assert office.lora_tensors() == []


def test_a_broker_that_forgot_everyone_frees_everything(busy: Office) -> None:
    """The link says so with an empty peer frame."""
    busy.tell(NORTH, commit())
    busy.handle(busy.service, [Parcel.of(Gone(name="every silo"))])
    assert (busy.service.holdings._sessions, busy.service.holdings.runs) == ({}, {})
    assert busy.lora_tensors() == []
    assert isinstance(busy.open_session(NORTH), Opened)


def test_gone_of_a_silo_that_held_nothing_changes_nothing(busy: Office) -> None:
    assert busy.gone(EAST) == []
    undisturbed(busy, NORTH)
