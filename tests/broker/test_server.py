"""The broker's socket against peers that misbehave, and addresses that cannot be had."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.parcel import Parcel
from broker.router import Router
from broker.server import Server
from codec.errors import ProtocolError, UsageError
from codec.limits import MAX_HEADER_BYTES, MAX_TENSORS
from codec.messages import Error, Gone, Heartbeat, Leave, Result, Welcome, decode_header, encode_header

HEARTBEAT = encode_header(Heartbeat())


class Raw:
    """A DEALER socket that says what it likes."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(endpoint)

    def say(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def hears(self, within: float = 10.0) -> Any:
        assert self._socket.poll(int(within * 1000)), "no answer came"
        return decode_header(self._socket.recv_multipart()[1])

    def close(self) -> None:
        self._context.destroy()


@pytest.fixture
def raw() -> Iterator[Any]:
    """`raw(endpoint)`: a bare socket, closed after the test."""
    made: list[Raw] = []

    def make(endpoint: str) -> Raw:
        made.append(Raw(endpoint))
        return made[-1]

    yield make
    for dealer in made:
        dealer.close()


def packed(**fields: object) -> bytes:
    return b"\x03" + msgspec.msgpack.encode(fields)


GARBAGE: dict[str, Sequence[bytes]] = {
    "one empty frame": [b""],
    "one frame": [b"x"],
    "empty header": [b"", b""],
    "version alone": [b"", b"\x03"],
    "not msgpack": [b"", b"\x03\xc1\xc1"],
    "truncated": [b"", HEARTBEAT[:-3]],
    "too much": [b"", HEARTBEAT + b"\x00"],
    "a list": [b"", b"\x03" + msgspec.msgpack.encode([1, 2])],
    "unknown kind": [b"", packed(kind="attack")],
    "no kind": [b"", packed(id=1)],
    "unknown field": [b"", packed(kind="heartbeat", text="hello")],
    "bad field": [b"", packed(kind="heartbeat", id=-1)],
    "deep": [b"", b"\x03" + b"\x91" * 5000 + b"\x90"],
    "bad utf-8": [b"", b"\x03\x81\xa4kind\xa2\xff\xfe"],
    "long header": [b"", b"\x03" + b"x" * MAX_HEADER_BYTES],
    "long peer": [b"p" * 65, HEARTBEAT],
    "many frames": [b"", HEARTBEAT, *[b""] * (MAX_TENSORS + 1)],
}


@pytest.fixture
def world(
    start_broker: Any, start_echo: Any, connect: Any, introduce: Any, opened: Any, ask: Any, extending: Any
) -> Any:
    """A broker with a worker and a silo that has a session; `undisturbed()` uses it."""

    class World:
        def __init__(self) -> None:
            self.broker = start_broker()
            self.endpoint = self.broker.endpoint
            start_echo(self.endpoint)
            self.silo, self.numbers = connect(self.endpoint, introduce("silo")), count(1)
            opened(self.silo, "s", self.numbers)

        def undisturbed(self) -> None:
            back = ask(self.silo, extending("s", next(self.numbers)), [b"still here"])
            assert [bytes(buffer) for buffer in back.buffers()] == [b"still here"]

    return World()


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_answered_and_disturbs_nobody(world: Any, raw: Any, name: str) -> None:
    dealer = raw(world.endpoint)
    dealer.say(*GARBAGE[name])
    error = dealer.hears()
    assert (error.id, error.code, error.side) == (0, "protocol", "silo")
    assert len(error.what) < 500
    assert world.broker.server.traffic.refused == 1
    world.undisturbed()


def test_another_protocol_version_is_told_what_to_do(world: Any, raw: Any) -> None:
    dealer = raw(world.endpoint)
    dealer.say(b"", b"\x02" + HEARTBEAT[1:])
    error = dealer.hears()
    assert "protocol 2, this side speaks 3" in error.what
    assert "same Trunkline version" in error.hint
    world.undisturbed()


def test_garbage_of_an_attached_silo_ends_its_link_alone(world: Any, connect: Any, introduce: Any) -> None:
    careless = connect(world.endpoint, introduce("silo", "careless"))
    careless.send(Parcel(b"", Heartbeat(), b"\x03garbage"))
    with pytest.raises(ProtocolError, match="not a header"):
        careless.receive(10)
    world.undisturbed()


def test_any_bytes_are_survived(start_broker: Any, raw: Any) -> None:
    endpoint = start_broker().endpoint
    dealer = raw(endpoint)
    mutated = st.builds(
        lambda at, byte: HEARTBEAT[:at] + bytes([byte]) + HEARTBEAT[at + 1 :],
        st.integers(0, len(HEARTBEAT) - 1),
        st.integers(0, 255),
    )
    frame = st.one_of(st.binary(max_size=40), mutated, st.binary(max_size=40).map(b"\x03".__add__))

    @settings(max_examples=150)
    @given(st.lists(frame, min_size=1, max_size=4))
    def survives(frames: list[bytes]) -> None:
        dealer.say(*frames)
        assert isinstance(dealer.hears(), Error)

    survives()


def test_another_protocol_altogether_disturbs_nobody(world: Any) -> None:
    port = int(world.endpoint.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as browser:
        browser.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(range(256)) * 10)
        world.undisturbed()
    world.undisturbed()


def test_a_stranger_must_attach_first(world: Any, raw: Any, extending: Any) -> None:
    dealer = raw(world.endpoint)
    dealer.say(b"", encode_header(extending("s", 5)))
    link, request = dealer.hears(), dealer.hears()
    assert (link.id, link.code) == (0, "link")
    assert (request.id, request.code) == (5, "unavailable")


def test_a_silo_cannot_name_itself_another(world: Any, raw: Any, introduce: Any, extending: Any) -> None:
    """The peer frame is the broker's to fill in; another silo's session stays unknown."""
    (victim,) = world.broker.server.router.registry.silos
    dealer = raw(world.endpoint)
    dealer.say(victim, encode_header(introduce("silo", "thief")))
    assert isinstance(dealer.hears(), Welcome)
    dealer.say(victim, encode_header(extending("s", 1)), b"x")
    assert dealer.hears().code == "unknown-name"
    world.undisturbed()


def test_a_connection_that_broke_is_noticed_at_the_next_answer(
    start_broker: Any, connect: Any, introduce: Any, raw: Any, opening: Any, extending: Any, until: Any
) -> None:
    """Long before it would count as silent."""
    running = start_broker(silence=60.0)
    worker = connect(running.endpoint, introduce("worker"))
    until(lambda: running.server.router.peers)
    silo = raw(running.endpoint)
    silo.say(b"", encode_header(introduce("silo", "broken")))
    assert isinstance(silo.hears(), Welcome)
    silo.say(b"", encode_header(opening("s", id=1)))
    for number in range(2, 30):
        silo.say(b"", encode_header(extending("s", number)))
    requests = [worker.receive(10) for _ in range(1, 30)]
    silo.close()
    for request in requests:  # The first answers may still reach the dying connection.
        worker.send(Parcel.of(Result(id=request.header.id), peer=request.peer))
        if (gone := worker.receive(0.1)) is not None:
            break
    assert gone is not None
    assert (gone.header, gone.peer) == (Gone(name="broken"), requests[0].peer)


def test_a_silent_peer_is_forgotten(start_broker: Any, connect: Any, introduce: Any, raw: Any) -> None:
    running = start_broker(silence=0.5, heartbeat=0.1)
    worker = connect(running.endpoint, introduce("worker"))
    silo = raw(running.endpoint)
    silo.say(b"", encode_header(introduce("silo", "sleeper")))
    assert isinstance(silo.hears(), Welcome)
    time.sleep(1.2)
    silo.say(b"", HEARTBEAT)
    assert silo.hears().code == "link"
    assert worker.receive(0.01) is None, "and it held nothing that the worker would have to free"
    assert [peer.role for peer in running.server.router.peers.values()] == ["worker"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_every_loopback_address_works(
    host: str, start_broker: Any, start_echo: Any, connect: Any, introduce: Any, opened: Any
) -> None:
    if host == "[::1]" and not ipv6_works():
        pytest.skip("this machine has no IPv6 loopback")
    running = start_broker(f"tcp://{host}:0")
    port = running.endpoint.rpartition(":")[2]
    start_echo(f"tcp://{host}:{port}")
    opened(connect(f"tcp://{host}:{port}", introduce("silo")), "s", count(1))


def ipv6_works() -> bool:
    context: zmq.Context[zmq.Socket[bytes]]
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.IPV6, 1)
        try:
            router.bind("tcp://[::1]:*")
        except zmq.ZMQError:
            return False
        return True


def test_a_taken_port_is_refused(start_broker: Any) -> None:
    endpoint = start_broker().endpoint
    with pytest.raises(UsageError, match=f"cannot listen on {endpoint}: Address already in use") as caught:
        Server(endpoint, Router())
    assert caught.value.at == "broker"
    assert "--listen" in caught.value.hint


def test_beyond_loopback_nothing_is_bound() -> None:
    with pytest.raises(UsageError, match="beyond loopback"):
        Server("tcp://0.0.0.0:0", Router())


def test_a_stopped_broker_frees_its_port(start_broker: Any) -> None:
    first = start_broker()
    first.stop()
    assert start_broker(first.endpoint).endpoint == first.endpoint


def test_links_survive_a_broker_that_was_killed(
    connect: Any, introduce: Any, opened: Any, start_echo: Any, repository: Path
) -> None:
    """A real process and SIGKILL: no goodbye, no lingering."""
    first, endpoint = spawn("tcp://127.0.0.1:0", repository)
    try:
        start_echo(endpoint)
        silo, numbers = connect(endpoint, introduce("silo")), count(1)
        opened(silo, "s", numbers)
    finally:
        end(first, signal.SIGKILL)
    second, again = spawn(endpoint, repository)
    try:
        assert again == endpoint
        opened(silo, "s", numbers)
    finally:
        end(second, signal.SIGKILL)


def test_a_broker_that_was_stopped_itself_forgets_nobody(
    connect: Any, introduce: Any, opened: Any, start_echo: Any, ask: Any, extending: Any, repository: Path
) -> None:
    """What the others said meanwhile waits to be read."""
    process, endpoint = spawn("tcp://127.0.0.1:0", repository, "--silence", "2")
    try:
        echo = start_echo(endpoint)
        silo, numbers = connect(endpoint, introduce("silo")), count(1)
        opened(silo, "s", numbers)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(3.0)
        os.kill(process.pid, signal.SIGCONT)
        assert isinstance(ask(silo, extending("s", next(numbers))).header, Result)
        assert echo.gone == []
    finally:
        end(process, signal.SIGKILL)


def spawn(listen: str, repository: Path, *more: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "trunkline", "broker", "--listen", listen, *more],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().removeprefix("listening on ").strip()


def end(process: subprocess.Popen[str], number: int) -> None:
    with process:
        os.kill(process.pid, number)
        process.wait(5)


def test_traffic_is_counted(world: Any, raw: Any) -> None:
    before = dict(world.broker.server.traffic.messages)
    world.undisturbed()
    traffic = world.broker.server.traffic
    assert traffic.messages["Result"] - before.get("Result", 0) == 1
    assert traffic.bytes["Extend"] == traffic.bytes["Result"] == len(b"still here")
    dealer = raw(world.endpoint)
    dealer.say(b"", encode_header(Leave()))
    dealer.hears()
    assert traffic.messages["Error"] - before.get("Error", 0) == 1
