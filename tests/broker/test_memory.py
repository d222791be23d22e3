"""The broker without sockets behaves as the one with: the same router, the same links."""

import threading
import time
from typing import Any

import pytest

from broker.memory import MemoryBroker, MemoryLink
from broker.parcel import Parcel
from broker.quota import Limits
from broker.router import Router
from codec.errors import LinkError, ProtocolError
from codec.messages import Attach, Gone, Heartbeat, Opened, OpenSession, Result


@pytest.fixture
def hub() -> MemoryBroker:
    return MemoryBroker()


@pytest.fixture
def pair(hub: MemoryBroker, introduce: Any, opening: Any) -> tuple[MemoryLink, MemoryLink]:
    """A worker and a silo with session `s`, opened by request 1."""
    worker, silo = hub.link(introduce("worker")), hub.link(introduce("silo"))
    silo.send(Parcel.of(opening("s", id=1)))
    request = worker.receive(5)
    assert request is not None
    assert isinstance(request.header, OpenSession)
    worker.send(Parcel.of(Opened(id=1), peer=request.peer))
    answer = silo.receive(5)
    assert answer is not None
    assert answer.header == Opened(id=1)
    return worker, silo


def test_frames_cross_as_bytes(pair: tuple[MemoryLink, MemoryLink], extending: Any) -> None:
    worker, silo = pair
    sent = bytearray(b"abc")
    silo.send(Parcel.of(extending("s", 2), [sent, b""]))
    sent[0] = 0
    request = worker.receive(5)
    assert request is not None
    assert request.tensors == (b"abc", b"")
    worker.send(Parcel.of(Result(id=2), request.tensors, request.peer))
    answer = silo.receive(5)
    assert answer is not None
    assert (answer.tensors, answer.peer) == ((b"abc", b""), b"")


def test_errors_of_requests_are_messages_and_of_the_link_are_raised(
    hub: MemoryBroker, pair: tuple[MemoryLink, MemoryLink], extending: Any
) -> None:
    _, silo = pair
    silo.send(Parcel.of(extending("other", 2)))
    answer = silo.receive(5)
    assert answer is not None
    assert answer.header.code == "unknown-name"  # type: ignore[union-attr]
    silo.send(Parcel.of(extending("s", 0)))
    with pytest.raises(ProtocolError):
        silo.receive(5)


def test_a_refused_identity_is_raised(hub: MemoryBroker, introduce: Any) -> None:
    silo, worker = introduce("silo"), introduce("worker")
    hub.link(silo)
    fields = {name: getattr(worker, name) for name in worker.__struct_fields__}
    impostor = hub.link(Attach(**{**fields, "peer": silo.peer}))
    with pytest.raises(ProtocolError, match="attached as a silo"):
        impostor.receive(5)


def test_welcomes_and_heartbeats_stay_within_the_link(hub: MemoryBroker, introduce: Any) -> None:
    silo = hub.link(introduce("silo"))
    silo.send(Parcel.of(Heartbeat()))
    assert silo.receive(0.05) is None


def test_closing_is_a_goodbye(
    hub: MemoryBroker, pair: tuple[MemoryLink, MemoryLink], extending: Any, introduce: Any
) -> None:
    worker, silo = pair
    silo.close()
    gone = worker.receive(5)
    assert gone is not None
    assert gone.header == Gone(name="north")
    silo.close()
    late = hub.link(introduce("silo", "late"))
    late.close()
    assert not hub.router.registry.silos
    assert len(hub._inboxes) == 1, "closed links leave nothing behind"


def test_sending_on_a_closed_link_is_refused(pair: tuple[MemoryLink, MemoryLink], extending: Any) -> None:
    _, silo = pair
    silo.close()
    with pytest.raises(LinkError, match="closed"):
        silo.send(Parcel.of(extending("s", 2)))


def test_waiting_ends_in_time(hub: MemoryBroker, introduce: Any) -> None:
    silo = hub.link(introduce("silo"))
    begun = time.monotonic()
    assert silo.receive(0.1) is None
    assert silo.receive(-1) is None
    assert 0.09 < time.monotonic() - begun < 5


def test_nobody_falls_silent_in_one_process(introduce: Any) -> None:
    hub = MemoryBroker(Router(Limits(silence=0.01)))
    silo, other = hub.link(introduce("silo")), hub.link(introduce("silo", "other"))
    time.sleep(0.03)
    silo.send(Parcel.of(Heartbeat()))
    assert hub.router.tick(time.monotonic()) == []
    assert other.receive(0.01) is None


def test_everything_that_passed_can_be_looked_at(
    hub: MemoryBroker, pair: tuple[MemoryLink, MemoryLink], extending: Any
) -> None:
    _, silo = pair
    before = len(hub.passed)
    silo.send(Parcel.of(extending("s", 2), [b"x"]))
    assert [(parcel.header, parcel.tensors) for parcel in hub.passed[before:]] == [
        (extending("s", 2), [b"x"])
    ]


def test_threads_do_not_lose_messages(pair: tuple[MemoryLink, MemoryLink], extending: Any) -> None:
    worker, silo = pair

    def ask(first: int) -> None:
        for number in range(first, first + 200):
            silo.send(Parcel.of(extending("s", number)))

    threads = [threading.Thread(target=ask, args=(first,)) for first in (1000, 2000, 3000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    seen = [worker.receive(5) for _ in range(600)]
    numbers = [parcel.header.id for parcel in seen if parcel]
    assert sorted(numbers) == [first + i for first in (1000, 2000, 3000) for i in range(200)]
    for first in (1000, 2000, 3000):
        mine = [number for number in numbers if first <= number < first + 1000]
        assert mine == sorted(mine)
