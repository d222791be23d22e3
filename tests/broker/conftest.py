"""Fixtures of the broker's tests: a desk around the bare router, and real brokers on loopback."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

import broker.door
import broker.server
from broker.keyring import KeyRing
from broker.link import Link, ZmqLink
from broker.parcel import Parcel
from broker.pool import alias_of
from broker.quota import Limits
from broker.router import Router, Send
from broker.server import Server
from codec.messages import (
    AnyHeader,
    Attach,
    Drain,
    Error,
    Extend,
    Gone,
    Leave,
    Opened,
    OpenRun,
    OpenSession,
    Result,
)
from codec.plan import ModelCard, RunPlan

CARD = ModelCard(name="m", fingerprint="f", blocks=6, hidden=4)


@dataclass
class Party:
    """A silo or worker of a `Desk`: its secret, its connection, what it was sent."""

    desk: "Desk"
    attach: Attach
    route: bytes
    inbox: list[Parcel] = field(default_factory=list)

    @property
    def alias(self) -> bytes:
        return alias_of(self.attach.peer)

    def says(self, header: AnyHeader, tensors: Sequence[bytes] = (), *, peer: bytes = b"") -> None:
        self.desk.take(self.route, Parcel.of(header, tensors, peer))

    def reattaches(self) -> None:
        """The same identity on a new connection."""
        del self.desk.parties[self.route]
        self.route = secrets.token_bytes(5)
        self.desk.parties[self.route] = self
        self.says(self.attach)

    def leaves(self) -> None:
        """Says goodbye and hears the same."""
        self.says(Leave())
        assert self.inbox.pop().header == Leave()

    def read(self) -> list[AnyHeader]:
        """The headers that came since the last read."""
        headers = [parcel.header for parcel in self.inbox]
        self.inbox.clear()
        return headers

    def reads_error(self) -> Error:
        """The one message that came, an error."""
        (header,) = self.read()
        assert isinstance(header, Error), header
        return header

    def opens(self, name: str, number: int, **fields: Any) -> None:
        self.says(OpenSession(**session(name, id=number, **fields)))

    def joins(self, name: str, number: int, **fields: Any) -> None:
        self.says(OpenRun(**run(name, id=number, **fields)))

    def extends(self, name: str, number: int, tensors: Sequence[bytes] = ()) -> None:
        self.says(extend(name, number), tensors)


class Desk:
    """A router whose clock stands until it is moved, and whose sends land in the parties' inboxes."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.router = Router(limits)
        self.now = 0.0
        self.parties: dict[bytes, Party] = {}

    def party(self, attach: Attach) -> Party:
        party = Party(self, attach, secrets.token_bytes(5))
        self.parties[party.route] = party
        party.says(attach)
        return party

    def silo(self, name: str = "north") -> Party:
        """An attached silo that has read its welcome."""
        party = self.party(silo_attach(name))
        party.read()
        return party

    def worker(self, name: str = "w", **fields: Any) -> Party:
        """An attached worker that has read its welcome."""
        party = self.party(worker_attach(name, **fields))
        party.read()
        return party

    def load(self, worker: Party) -> int:
        return self.router.peers[worker.route].load

    def take(self, route: bytes, parcel: Parcel) -> None:
        self.deliver(self.router.handle(route, parcel, self.now))

    def deliver(self, sends: list[Send]) -> None:
        for send in sends:
            self.parties[send.route].inbox.append(send.parcel)

    def passes(self, seconds: float) -> None:
        self.now += seconds
        self.deliver(self.router.tick(self.now))


def silo_attach(name: str = "north", **fields: Any) -> Attach:
    return Attach(role="silo", name=name, peer=secrets.token_bytes(16), **fields)


def worker_attach(name: str = "w", **fields: Any) -> Attach:
    defaults: dict[str, Any] = {"model": CARD, "start": 0, "stop": 6}
    return Attach(role="worker", name=name, peer=secrets.token_bytes(16), **{**defaults, **fields})


def session(name: str, **fields: Any) -> dict[str, Any]:
    return {"session": name, "model": CARD, "start": 2, "stop": 4, "rows": 1, "capacity": 8, **fields}


def run(name: str, **fields: Any) -> dict[str, Any]:
    return {"run": name, "model": CARD, "start": 2, "stop": 4, "plan": RunPlan(silos=2), **fields}


def extend(name: str, number: int) -> Extend:
    return Extend(id=number, session=name, rows=(0,), starts=(0,), lengths=(1,))


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def new_desk() -> Callable[..., Desk]:
    """`new_desk(requests=2)`: a desk with other limits."""
    return lambda **limits: Desk(Limits(**limits))


@pytest.fixture
def introduce() -> Callable[..., Attach]:
    """`introduce("silo", name)` or `introduce("worker", name, start=0, stop=3)`."""
    return lambda role, *given, **fields: {"silo": silo_attach, "worker": worker_attach}[role](
        *given, **fields
    )


@pytest.fixture
def opening() -> Callable[..., OpenSession]:
    """`opening(name, id=1)`: a request to open a session."""
    return lambda name, **fields: OpenSession(**session(name, **fields))


@pytest.fixture
def extending() -> Callable[[str, int], Extend]:
    """`extending(name, number)`: a request to extend a session."""
    return extend


class Running:
    """A real broker on a thread."""

    def __init__(self, listen: str, limits: Limits | None, keys: KeyRing | None) -> None:
        self.server = Server(listen, Router(limits), keys)
        self.endpoint = self.server.endpoint
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.server.serve, args=(self._stop,), name="broker")
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(5)
        assert not self._thread.is_alive()


@pytest.fixture
def start_broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Running]]:
    """`start_broker(listen, keys=ring, silence=2.0)`: a broker, stopped after the test."""
    monkeypatch.setattr(broker.server, "_TICK_MS", 20)  # It stops as soon.
    monkeypatch.setattr(broker.door, "_LOOK_MS", 20)
    started: list[Running] = []

    def start(listen: str = "tcp://127.0.0.1:0", keys: KeyRing | None = None, **limits: Any) -> Running:
        started.append(Running(listen, Limits(**limits), keys))
        return started[-1]

    yield start
    for running in started:
        running.stop()


@pytest.fixture
def connect() -> Iterator[Callable[..., ZmqLink]]:
    """`connect(endpoint, attach, patience=5.0)`: a link, closed after the test."""
    links: list[ZmqLink] = []

    def make(endpoint: str, attach: Attach, **options: Any) -> ZmqLink:
        links.append(ZmqLink(endpoint, attach, **options))
        return links[-1]

    yield make
    for link in links:
        link.close()


class Echo:
    """A worker on a thread: opens what is asked for and sends tensors back as they came."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.gone: list[str] = []
        self.silent = threading.Event()
        """While set, requests are taken and not answered."""
        self.taken = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="echo")
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            parcel = self.link.receive(0.05)
            if parcel is None:
                continue
            header = parcel.header
            if isinstance(header, Drain):
                continue
            if isinstance(header, Gone):
                self.gone.append(header.name)
                continue
            self.taken += 1
            if self.silent.is_set():
                continue
            if isinstance(header, OpenSession | OpenRun):
                self.link.send(Parcel.of(Opened(id=header.id), peer=parcel.peer))
            else:
                answer = Result(id=header.id, tensors=header.tensors)
                self.link.send(Parcel.of(answer, parcel.tensors, parcel.peer))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(5)


@pytest.fixture
def echo_over() -> Iterator[Callable[[Link], Echo]]:
    """`echo_over(link)`: a worker that echoes, stopped after the test, and its link closed."""
    started: list[Echo] = []

    def start(link: Link) -> Echo:
        started.append(Echo(link))
        return started[-1]

    yield start
    for echo in started:
        echo.stop()
        echo.link.close()


@pytest.fixture
def start_echo(connect: Callable[..., ZmqLink], echo_over: Callable[[Link], Echo]) -> Callable[..., Echo]:
    """`start_echo(endpoint, credit=2)`: an attached worker that echoes, stopped after the test."""
    return lambda endpoint, **fields: echo_over(connect(endpoint, worker_attach("echo", **fields)))


@pytest.fixture
def ask() -> Callable[..., Parcel]:
    """`ask(link, header, tensors)`: send it and wait for its answer."""

    def call(link: Any, header: Any, tensors: Sequence[Any] = (), within: float = 10.0) -> Parcel:
        link.send(Parcel.of(header, tensors))
        return await_answer(link, header.id, within)

    return call


@pytest.fixture
def answer_to() -> Callable[..., Parcel]:
    """`answer_to(link, number)`: wait for the answer to that request."""
    return await_answer


def await_answer(link: Any, number: int, within: float = 10.0) -> Parcel:
    deadline = time.monotonic() + within
    while (left := deadline - time.monotonic()) > 0:
        parcel = link.receive(left)
        if parcel is not None and parcel.header.id == number:
            assert isinstance(parcel, Parcel)
            return parcel
    raise AssertionError(f"no answer to {number} within {within} s")


@pytest.fixture
def until() -> Callable[..., None]:
    """`until(condition)`: wait until it holds; fail after `within` seconds."""

    def wait(condition: Callable[[], object], within: float = 10.0) -> None:
        deadline = time.monotonic() + within
        while not condition():
            assert time.monotonic() < deadline, "it did not come about"
            time.sleep(0.005)

    return wait


@pytest.fixture
def opened(ask: Callable[..., Parcel], opening: Callable[..., OpenSession]) -> Callable[..., None]:
    """`opened(link, "s", ids)`: a session over `link`, asked for until a worker is there."""

    def open_session(link: Any, name: str, numbers: Iterator[int]) -> None:
        deadline = time.monotonic() + 10
        while True:
            header = ask(link, opening(name, id=next(numbers))).header
            if isinstance(header, Opened):
                return
            assert isinstance(header, Error)
            assert header.code == "nobody", header
            assert time.monotonic() < deadline, header
            time.sleep(0.02)

    return open_session
