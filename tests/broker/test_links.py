"""A worker's several links as one: real brokers that stop, and links that fail."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

import broker.links
from broker.links import Links
from broker.memory import MemoryBroker
from broker.parcel import Parcel
from broker.pool import alias_of
from codec.errors import LinkError, RefusedError, TrunklineError, UsageError
from codec.messages import Drain, Error, Gone, Opened, OpenSession, Result

A, B = "tcp://127.0.0.1:1", "tcp://127.0.0.1:2"


class FakeLink:
    """A link in the test's hands."""

    speed, encodings = None, ("raw", "planes")

    def __init__(self) -> None:
        self.attached = True
        self.came: queue.SimpleQueue[Parcel | TrunklineError] = queue.SimpleQueue()
        self.sent: list[Parcel] = []
        self.closed = False

    def send(self, parcel: Parcel) -> None:
        self.sent.append(parcel)

    def receive(self, timeout: float) -> Parcel | None:
        try:
            item = self.came.get(timeout=min(timeout, 0.02))
        except queue.Empty:
            return None
        if isinstance(item, TrunklineError):
            self.attached = False
            raise item
        return item

    def elsewhere(self) -> None: ...

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def join() -> Iterator[Callable[..., tuple[Links, dict[str, list[FakeLink]]]]]:
    """`join(patience=1.0)`: two fake links joined, and all links that were made, by endpoint."""
    joined: list[Links] = []

    def make(patience: float = 5.0) -> tuple[Links, dict[str, list[FakeLink]]]:
        made: dict[str, list[FakeLink]] = {A: [], B: []}

        def connect(endpoint: str) -> FakeLink:
            made[endpoint].append(FakeLink())
            return made[endpoint][-1]

        joined.append(Links([A, B], connect, patience=patience))
        return joined[-1], made

    yield make
    for links in joined:
        links.close()


def test_answers_go_back_the_way_the_request_came(join: Any, opening: Any) -> None:
    links, made = join()
    for number, endpoint in enumerate((A, B, B, A), 1):
        silo = f"silo {number}".encode()
        made[endpoint][0].came.put(Parcel.of(opening("s", id=number), peer=silo))
        assert links.receive(5).peer == silo
    for number in (3, 1, 4, 2):
        links.send(Parcel.of(Opened(id=number), peer=f"silo {number}".encode()))
    assert [parcel.header.id for parcel in made[A][0].sent] == [1, 4]
    assert [parcel.header.id for parcel in made[B][0].sent] == [3, 2]


def test_a_drain_is_told_to_all(join: Any) -> None:
    links, made = join()
    links.send(Parcel.of(Drain()))
    assert [made[each][0].sent[0].header for each in (A, B)] == [Drain(), Drain()]


def test_a_broker_that_is_lost_for_long_costs_its_own_silos(join: Any, opening: Any) -> None:
    links, made = join(patience=0.3)
    for number, endpoint in enumerate((A, B), 1):
        made[endpoint][0].came.put(Parcel.of(opening("s", id=number), peer=endpoint.encode()))
        links.receive(5)
    made[A][0].attached = False
    gone = links.receive(5)
    assert (type(gone.header), gone.peer) == (Gone, A.encode())
    assert links.receive(0.5) is None, "and the other's silos stay"


def test_it_ends_when_no_broker_is_left_for_so_long(join: Any) -> None:
    links, made = join(patience=0.4)
    made[A][0].attached = False
    assert links.receive(0.7) is None, "one is enough"
    made[B][0].attached = False
    begun = time.monotonic()
    with pytest.raises(LinkError, match=f"{A}, {B} for 0.4 s"):
        links.receive(5)
    assert 0.2 < time.monotonic() - begun < 3


def test_a_link_that_is_refused_tries_again_while_another_lives(
    join: Any, opening: Any, monkeypatch: pytest.MonkeyPatch, until: Any
) -> None:
    monkeypatch.setattr(broker.links, "_RETRY_S", 0.05)
    links, made = join()
    made[A][0].came.put(RefusedError("this key is not allowed"))
    until(lambda: len(made[A]) == 2)
    assert made[A][0].closed
    made[A][1].came.put(Parcel.of(opening("s", id=1), peer=b"silo"))
    assert links.receive(5).header.id == 1


def test_refused_by_all_is_the_end(join: Any) -> None:
    links, made = join()
    for endpoint in (A, B):
        made[endpoint][0].came.put(RefusedError("this key is not allowed"))
    with pytest.raises(RefusedError):
        links.receive(5)


def test_a_bad_endpoint_leaves_no_thread_behind(introduce: Any) -> None:
    threads = threading.active_count()
    with pytest.raises(UsageError):
        broker.links.attach_everywhere(["tcp://127.0.0.1:1", "nonsense"], introduce("worker"), patience=1.0)
    assert threading.active_count() == threads


def test_one_pool_behind_two_brokers(introduce: Any, opening: Any, extending: Any) -> None:
    """Two real routers: both know the worker, and a silo that moves is served by it as before."""
    hubs = {A: MemoryBroker(), B: MemoryBroker()}
    me = introduce("worker")
    links = Links([A, B], lambda endpoint: hubs[endpoint].link(me), patience=5.0)
    try:
        silo = introduce("silo")
        here, there = hubs[A].link(silo), hubs[B].link(silo)
        here.send(Parcel.of(opening("s", id=1)))
        request = links.receive(5)
        assert request.peer == alias_of(silo.peer)
        links.send(Parcel.of(Opened(id=1), peer=request.peer))
        assert here.receive(5).header == Opened(id=1)
        there.send(Parcel.of(opening("s", id=2)))
        assert isinstance(links.receive(5).header, Gone), "what it had through the other is void"
        request = links.receive(5)
        assert isinstance(request.header, OpenSession)
        links.send(Parcel.of(Opened(id=2), peer=request.peer))
        assert there.receive(5).header == Opened(id=2)
        here.send(Parcel.of(extending("s", 3)))
        assert links.receive(0.3) is None
        assert isinstance(here.receive(5).header, Error), "late for a broker that was left"
        here.close()
        assert links.receive(0.3) is None, "the end of the old way is not the silo's"
        there.send(Parcel.of(extending("s", 4)))
        assert links.receive(5).header.id == 4
        links.send(Parcel.of(Result(id=4), peer=request.peer))
        assert there.receive(5).header.id == 4
    finally:
        links.close()


def test_a_silo_goes_on_at_the_next_broker(
    start_broker: Any,
    echo_over: Any,
    connect: Any,
    introduce: Any,
    opened: Any,
    extending: Any,
    answer_to: Any,
    until: Any,
) -> None:
    first, second = start_broker(), start_broker()
    endpoints = [first.endpoint, second.endpoint]
    echo = echo_over(broker.links.attach_everywhere(endpoints, introduce("worker"), patience=10.0))
    silo, numbers = connect(endpoints, introduce("silo")), count(1)
    opened(silo, "s", numbers)
    echo.silent.set()
    silo.send(Parcel.of(extending("s", lost := next(numbers))))
    until(lambda: echo.taken >= 2)
    begun = time.monotonic()
    first.stop()
    answer = answer_to(silo, lost)
    assert answer.header.code == "unavailable"
    assert "broke" in answer.header.what
    echo.silent.clear()
    opened(silo, "s", numbers)
    assert time.monotonic() - begun < 1.5
    silo.send(Parcel.of(extending("s", number := next(numbers)), [b"x"]))
    assert answer_to(silo, number).buffers()[0] == b"x"
    # The first one is there again: the silo stays where it is.
    start_broker(endpoints[0])
    silo.send(Parcel.of(extending("s", number := next(numbers)), [b"y"]))
    assert answer_to(silo, number).buffers()[0] == b"y"


def test_a_broker_without_workers_is_left_for_another(
    start_broker: Any,
    start_echo: Any,
    connect: Any,
    introduce: Any,
    opened: Any,
    opening: Any,
    ask: Any,
    until: Any,
) -> None:
    empty, full = start_broker(), start_broker()
    start_echo(full.endpoint)
    silo, numbers = connect([empty.endpoint, full.endpoint], introduce("silo")), count(1)
    alone = connect(empty.endpoint, introduce("silo"))
    deadline = time.monotonic() + 10
    while isinstance(header := ask(silo, opening("s", id=next(numbers))).header, Error):
        assert (header.code, time.monotonic() < deadline) == ("nobody", True)
        silo.elsewhere()
        time.sleep(0.1)
    for _ in range(2):
        assert ask(alone, opening("s", id=next(numbers))).header.code == "nobody"
        alone.elsewhere()
    until(lambda: len(empty.server.router.peers) == 1)
