"""Sessions served together: the same results as alone, in one pass, and each with its own errors."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from broker.parcel import Parcel
from codec.messages import CloseSession, Error, Extend, OpenSession, Result
from codec.partition import Span as Blocks
from codec.plan import LoraPlan
from codec.tensors import decode_tensors, encode_tensors
from workers import catalog
from workers.checkpoint import Checkpoint
from workers.lora import adapter_tensors, add_adapter, drop_adapter
from workers.service import TrunkService
from workers.span import Span

NORTH, SOUTH, EAST = b"north...", b"south...", b"east...."
TRUNK = Blocks(2, 4)
HIDDEN = 64
LORA = LoraPlan(rank=2, targets=("q_proj", "v_proj"))


class Desk:
    """A service whose passes are counted."""

    def __init__(self, span: Span, card: Any) -> None:
        self.service, self.card, self.passes = TrunkService(span, card, 1 << 24), card, 0
        self._ids = count(1)
        self._run = span.run

    def run(self, *arguments: Any, **options: Any) -> Tensor:
        self.passes += 1
        return self._run(*arguments, **options)

    def parcel(self, silo: bytes, header: Any, tensors: list[Tensor] | None = None) -> Parcel:
        specs, frames = encode_tensors(tensors or [], "raw", "test")
        return Parcel.of(msgspec.structs.replace(header, id=next(self._ids), tensors=specs), frames, silo)

    def open(self, silo: bytes, session: str = "s", **fields: Any) -> None:
        fields = {"rows": 2, "capacity": 32, "start": TRUNK.start, "stop": TRUNK.stop} | fields
        header = OpenSession(session=session, model=self.card, **fields)
        tensors = list(fields.pop("tensors", []))
        self.service.handle([self.parcel(silo, header, tensors)])

    def serve(self, *parcels: Parcel) -> tuple[dict[int, Any], int]:
        """Answers by request number, and how many passes they took."""
        before = self.passes
        answers = {parcel.header.id: parcel for parcel in self.service.handle(parcels)}
        assert answers.keys() == {parcel.header.id for parcel in parcels}
        return answers, self.passes - before


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Span, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRUNKLINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        checkpoint = Checkpoint(str(catalog.fetch("tiny")))
    return Span(checkpoint, Blocks(1, 5)), checkpoint.card(range(1, 5))


@pytest.fixture
def desk(model: tuple[Span, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    made = Desk(*model)
    monkeypatch.setattr(model[0], "run", made.run)
    yield made
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
    """What was planned for the base model must not be computed with it any more."""
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
    assert passes == 2
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
        patch.setattr("workers.service.extend_together", broken)
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
