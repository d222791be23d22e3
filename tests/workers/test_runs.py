"""Runs that survive, at the service: seats, epochs, what waits for a save, and a disk that is full."""

import errno
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from broker.parcel import Parcel
from codec.messages import (
    Backward,
    CloseRun,
    Commit,
    Committed,
    Done,
    Error,
    Forward,
    GetAdapter,
    Gone,
    Opened,
    OpenRun,
    OpenSession,
)
from codec.partition import Span as Blocks
from codec.plan import LoraPlan, RunPlan
from codec.tensors import decode_tensors, encode_tensors
from workers.checkpoint import Checkpoint
from workers.inbound import open_up
from workers.place import Directory
from workers.replies import encoded
from workers.service import TrunkService
from workers.span import Span
from workers.state import StateStore

NORTH, SOUTH, EAST = b"north...", b"south...", b"east...."
PLAN = RunPlan(silos=2, steps=3, lora=LoraPlan(rank=2, targets=("q_proj",)))


class Disk(Directory):
    """A directory on a disk that can be full, or take its time."""

    full = False
    slow = threading.Event()

    def at(self, name: str) -> "Disk":
        return type(self)(self.path / name)

    def write(self, name: str, data: bytes) -> None:
        self.slow.wait(20)
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(name, data)


@dataclass
class Desk:
    """A worker's service, and silos that ask it."""

    service: TrunkService
    card: Any
    handle: Any
    numbers: Any = field(default_factory=lambda: count(1))

    def tell(self, silo: bytes, header: Any, tensors: Sequence[Tensor] = ()) -> list[Parcel]:
        return self.handle(self.service, [self.parcel(silo, header, tensors)])

    def parcel(self, silo: bytes, header: Any, tensors: Sequence[Tensor] = ()) -> Parcel:
        specs, frames = encode_tensors(tensors, "exact", "test") if tensors else ((), [])
        return Parcel.of(msgspec.structs.replace(header, id=next(self.numbers), tensors=specs), frames, silo)

    def ask(self, silo: bytes, header: Any, tensors: Sequence[Tensor] = ()) -> Any:
        (parcel,) = [parcel for parcel in self.tell(silo, header, tensors) if parcel.peer == silo]
        return parcel.header

    def join(self, silo: bytes, before: Opened | None = None, **fields: Any) -> Any:
        again = {"ticket": before.ticket, "seat": before.seat} if before else {}
        return self.ask(
            silo, OpenRun(run="r", model=self.card, start=2, stop=4, plan=PLAN, **again, **fields)
        )

    def work(self, silo: bytes, number: int = 0) -> None:
        out = self.ask(silo, Forward(run="r", microbatch=number, lengths=(3,)), [hidden(silo)])
        assert not isinstance(out, Error), out
        self.tell(silo, Backward(run="r", microbatch=number), [torch.ones(3, 64)])

    def commit(self, silo: bytes, step: int = 0) -> list[Parcel]:
        return self.tell(silo, commit(step))

    def gone(self, silo: bytes) -> list[Parcel]:
        return self.handle(self.service, [Parcel.of(Gone(name="x"), peer=silo)])

    def adapter(self, silo: bytes) -> list[Tensor]:
        (parcel,) = self.tell(silo, GetAdapter(run="r"))
        header: Any = parcel.header
        return decode_tensors(header.tensors, parcel.buffers(), boundary="test")


def commit(step: int) -> Commit:
    return Commit(run="r", step=step, loss_tokens=3, square_norm=1.0)


def hidden(silo: bytes) -> Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(silo[0]))


def new_desk(checkpoint: Checkpoint, handle: Any, store: StateStore | None) -> Desk:
    card = checkpoint.card(range(1, 5))
    return Desk(TrunkService(Span(checkpoint, Blocks(1, 5)), card, 1 << 22, store=store), card, handle)


@pytest.fixture
def disk(tmp_path: Path) -> Callable[[], type[Disk]]:
    made = type("OneDisk", (Disk,), {"slow": threading.Event()})
    made.slow.set()
    return made


@pytest.fixture
def desk(tiny_checkpoint: Checkpoint, handle: Any, disk: Any, tmp_path: Path) -> Callable[[], Desk]:
    """Each call is another worker with the same place for its states."""
    return lambda: new_desk(tiny_checkpoint, handle, StateStore(disk(tmp_path)))


def test_a_seat_is_taken_back_under_another_alias(desk: Callable[[], Desk]) -> None:
    home = desk()
    north, south = home.join(NORTH), home.join(SOUTH)
    assert north.ticket == south.ticket != b""
    assert len({north.seat, south.seat, north.ticket}) == 3
    home.work(NORTH)
    home.work(SOUTH)
    assert home.commit(SOUTH) == []
    assert home.join(EAST).code == "limit"
    told = home.tell(EAST, OpenRun(run="r", model=home.card, start=2, stop=4, plan=PLAN, **secret(north)))
    by_silo = {parcel.peer: parcel.header for parcel in told}
    assert by_silo[SOUTH].code == "unavailable", "its commit is of a step that begins anew"
    assert (by_silo[EAST].step, by_silo[EAST].seat) == (0, north.seat)
    forward = Forward(run="r", microbatch=1, lengths=(3,))
    assert home.ask(NORTH, forward, [hidden(NORTH)]).code == "unknown-name", "another has its seat"
    assert home.ask(SOUTH, forward, [hidden(SOUTH)]).code == "unavailable", "it has to join again first"
    assert home.join(SOUTH, south).step == 0
    home.work(SOUTH, 1)
    home.work(EAST)
    assert home.commit(SOUTH) == []
    assert [parcel.header.step for parcel in home.commit(EAST)] == [0, 0]
    assert (
        home.join(NORTH, msgspec.structs.replace(north, seat=secrets.token_bytes(16))).code == "unknown-name"
    )


def secret(opened: Opened) -> dict[str, bytes]:
    return {"ticket": opened.ticket, "seat": opened.seat}


def test_a_silo_without_a_part_in_the_step_disturbs_nobody(desk: Callable[[], Desk]) -> None:
    home = desk()
    home.join(NORTH)
    south = home.join(SOUTH)
    home.work(NORTH)
    assert home.commit(NORTH) == []
    assert home.gone(SOUTH) == []
    assert home.join(EAST, south).step == 0
    assert len(home.commit(EAST)) == 2, "north's commit has waited"


def test_another_worker_goes_on_and_the_home_before_is_fenced(desk: Callable[[], Desk]) -> None:
    first, second = desk(), desk()
    north, south = first.join(NORTH), first.join(SOUTH)
    for silo in (NORTH, SOUTH):
        first.work(silo)
        answers = first.commit(silo)
    assert [type(parcel.header) for parcel in answers] == [Committed, Committed]
    expected = first.adapter(NORTH)
    assert second.join(NORTH, north).step == second.join(EAST, south).step == 1
    assert all(torch.equal(a, b) for a, b in zip(second.adapter(EAST), expected, strict=True))
    stored = second.ask(EAST, commit(0))
    assert msgspec.structs.replace(stored, id=answers[1].header.id) == answers[1].header
    for silo in (NORTH, SOUTH):
        first.work(silo, 1)
        fenced = first.commit(silo, 1)
    assert [parcel.header.code for parcel in fenced] == ["unavailable"] * 2
    assert "another worker has taken over run 'r'" in fenced[0].header.what
    assert not first.service.holdings.runs
    for silo in (NORTH, EAST):
        second.work(silo, 1)
        answers = second.commit(silo, 1)
    assert [parcel.header.step for parcel in answers] == [1, 1]


def test_a_new_run_never_meets_an_old_ones_state(desk: Callable[[], Desk]) -> None:
    home = desk()
    old = home.join(NORTH)
    home.gone(NORTH)
    assert not home.service.holdings.runs
    new = home.join(SOUTH)
    assert (new.step, new.ticket != old.ticket) == (0, True)
    error = home.join(NORTH, old)
    assert (error.code, error.side) == ("mismatch", "silo")
    assert "another run 'r' is under way" in error.what
    home.gone(SOUTH)
    assert home.join(NORTH, old).ticket == old.ticket


def test_before_the_first_step_a_seat_left_empty_is_free(desk: Callable[[], Desk]) -> None:
    home = desk()
    home.join(NORTH)
    home.join(SOUTH)
    home.gone(SOUTH)
    assert isinstance(home.join(EAST), Opened)


def test_a_full_disk_is_told_and_the_step_does_not_count(desk: Callable[[], Desk], disk: Any) -> None:
    home = desk()
    seats = {silo: home.join(silo) for silo in (NORTH, SOUTH)}
    disk.full = True
    for silo in seats:
        home.work(silo)
        answers = home.commit(silo)
    assert [(p.peer, p.header.code, p.header.side) for p in answers] == [
        (silo, "save", "worker") for silo in (NORTH, SOUTH)
    ]
    assert "No space left on device" in answers[0].header.what
    assert "Make room" in answers[0].header.hint
    assert (
        home.ask(NORTH, Forward(run="r", microbatch=1, lengths=(3,)), [hidden(NORTH)]).code == "unknown-name"
    )
    disk.full = False
    assert [home.join(silo, seat).step for silo, seat in seats.items()] == [0, 0]
    for silo in seats:
        home.work(silo, 2)
        answers = home.commit(silo)
    assert [type(parcel.header) for parcel in answers] == [Committed, Committed]


def test_what_waits_for_a_save_holds_up_nobody_else(desk: Callable[[], Desk], disk: Any) -> None:
    """Another silo's session is opened while a step is being saved; the answer comes after that."""
    home = desk()
    for silo in (NORTH, SOUTH):
        home.join(silo)
        home.work(silo)
    assert home.commit(NORTH) == []
    disk.slow.clear()
    service = home.service
    service.add(open_up(home.parcel(SOUTH, commit(0)), service.trunk))
    session = OpenSession(session="s", model=home.card, start=2, stop=4, rows=1, capacity=4)
    service.add(open_up(home.parcel(EAST, session), service.trunk))
    before = [encoded(reply) for _ in range(4) for reply in service.next_pass(time.monotonic()) or ()]
    assert [(parcel.peer, type(parcel.header)) for parcel in before] == [(EAST, Opened)]
    assert not service.idle
    disk.slow.set()
    after = home.handle(service, [])
    assert [(parcel.peer, type(parcel.header)) for parcel in after] == [
        (NORTH, Committed),
        (SOUTH, Committed),
    ]


def test_without_a_place_for_states_a_ticket_finds_nothing(tiny_checkpoint: Checkpoint, handle: Any) -> None:
    home = new_desk(tiny_checkpoint, handle, None)
    opened = home.join(NORTH)
    assert (opened.ticket, opened.seat) == (b"", b"")
    home.gone(NORTH)
    error = home.join(NORTH, Opened(ticket=bytes(16), seat=bytes(16)))
    assert (error.code, error.side) == ("unavailable", "worker")
    assert "--state" in error.what


def test_a_run_that_is_over_leaves_nothing(desk: Callable[[], Desk], tmp_path: Path) -> None:
    home = desk()
    for silo in (NORTH, SOUTH):
        home.join(silo)
    for step in range(PLAN.steps):
        for silo in (NORTH, SOUTH):
            home.work(silo, step)
            home.commit(silo, step)
    assert isinstance(home.ask(NORTH, CloseRun(run="r")), Done)
    assert isinstance(home.ask(SOUTH, CloseRun(run="r")), Done)
    assert home.service.idle
    assert list(tmp_path.iterdir()) == []
