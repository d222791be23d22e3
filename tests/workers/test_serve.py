"""The worker's threads: codec work beside the passes, order kept, and an end that leaves nothing behind."""

import queue
import secrets
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

import workers.serve
from broker.memory import MemoryBroker, MemoryLink
from broker.parcel import Parcel
from codec.errors import LinkError
from codec.messages import Attach, Error, Extend, Opened, OpenSession, Result
from codec.partition import Span as Blocks
from codec.tensors import encode_tensors
from workers.checkpoint import Checkpoint
from workers.inbound import Trunk, Work
from workers.parts import Part
from workers.serve import serve
from workers.service import TrunkService
from workers.span import Span

WAIT_S = 20.0
BLOCKS = Blocks(2, 4)


class Running:
    """A worker's loop on a thread, and a silo's link to it."""

    def __init__(self, span: Span, card: Any) -> None:
        self.broker, self.stop, self.card = MemoryBroker(), threading.Event(), card
        attach = Attach(
            role="worker", name="w", peer=secrets.token_bytes(16), model=card, start=0, stop=card.blocks
        )
        self.link = self.broker.link(attach)
        self.ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._serve, args=(TrunkService(span, card, 1 << 24),))
        self.thread.start()
        self.silo = self.broker.link(Attach(role="silo", name="s", peer=secrets.token_bytes(16)))
        self.send(1, OpenSession(session="s", model=card, start=2, stop=4, rows=4, capacity=64))
        assert isinstance(self.header(), Opened)

    def _serve(self, service: TrunkService) -> None:
        try:
            serve(self.link, service, self.stop)
        except Exception as error:
            self.ended.put(error)
        else:
            self.ended.put(None)

    def send(self, number: int, header: Any, *tensors: torch.Tensor) -> None:
        specs, frames = encode_tensors(tensors, "raw", "test")
        self.silo.send(Parcel.of(msgspec.structs.replace(header, id=number, tensors=specs), frames))

    def header(self) -> Any:
        parcel = self.silo.receive(WAIT_S)
        assert parcel is not None, "no answer in time"
        return parcel.header

    def finish(self) -> Exception | None:
        self.stop.set()
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        assert not [t for t in threading.enumerate() if t.name in ("open", "pack")]
        return self.ended.get(timeout=WAIT_S)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Checkpoint) -> tuple[Span, Any]:
    blocks = Blocks(0, tiny_checkpoint.blocks)
    return Span(tiny_checkpoint, blocks), tiny_checkpoint.card(range(tiny_checkpoint.blocks))


@pytest.fixture
def running(model: tuple[Span, Any]) -> Iterator[Running]:
    made = Running(*model)
    yield made
    made.stop.set()
    made.thread.join(WAIT_S)


def step(row: int, start: int = 0) -> Extend:
    return Extend(session="s", rows=(row,), starts=(start,), lengths=(1,), wire="raw")


def test_requests_are_opened_up_while_a_pass_runs(
    running: Running, model: tuple[Span, Any], monkeypatch: pytest.MonkeyPatch
) -> None:

    opened, started, run, open_up = (
        threading.Event(),
        threading.Event(),
        model[0].run_parts,
        workers.serve.open_up,
    )

    def passing(parts: list[Part]) -> list[torch.Tensor]:
        started.set()
        assert opened.wait(WAIT_S), "nothing was opened up meanwhile"
        return run(parts)

    def opening(parcel: Parcel, trunk: Trunk) -> Work:
        work = open_up(parcel, trunk)
        if parcel.header.id == 3:
            opened.set()
        return work

    monkeypatch.setattr(model[0], "run_parts", passing)
    monkeypatch.setattr(workers.serve, "open_up", opening)
    running.send(2, step(0), torch.randn(1, 64))
    assert started.wait(WAIT_S)
    running.send(3, step(1), torch.randn(1, 64))
    headers = [running.header() for _ in range(2)]
    assert [(type(header), header.id) for header in headers] == [(Result, 2), (Result, 3)]
    assert running.finish() is None


def test_what_cannot_be_read_is_an_answer_in_its_place(running: Running) -> None:
    for number in range(2, 12):
        width = 64 if number % 2 else 63
        running.send(number, step(0, (number - 2) // 2), torch.randn(1, width))
    running.silo.send(
        Parcel.of(
            msgspec.structs.replace(
                step(1), id=12, tensors=encode_tensors([torch.ones(1, 64)], "raw", "t")[0]
            )
        )
    )
    headers = [running.header() for _ in range(11)]
    assert [header.id for header in headers] == list(range(2, 13))
    assert [isinstance(header, Result) for header in headers] == [n % 2 == 1 for n in range(2, 12)] + [False]
    assert isinstance(headers[-1], Error)
    assert headers[-1].code == "frame"


def test_a_link_that_fails_ends_the_worker(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_self: MemoryLink, _timeout: float) -> None:
        raise LinkError("no broker for 60 s")

    monkeypatch.setattr(MemoryLink, "receive", lost)
    running.thread.join(WAIT_S)
    error = running.finish()
    assert isinstance(error, LinkError)
