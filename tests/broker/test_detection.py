"""How soon a broker misses a peer, and what it does not take for a loss: real sockets."""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

import broker.lines
from broker.lines import Lines
from broker.parcel import Parcel
from broker.pulse import quiet_for
from broker.quota import Limits
from broker.router import Router
from codec.messages import Error, OpenSession, Result


class Relay:
    """A way to the broker that can be slow, freeze or be cut."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._there = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.pause_s, self.chunk = 0.0, 1 << 16
        self.frozen, self._stop = threading.Event(), threading.Event()
        self._ways: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        self._listener.settimeout(0.05)
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                ours, _ = self._listener.accept()
                theirs = socket.create_connection(self._there, timeout=10)
                self._ways += [ours, theirs]
                self._threads.append(threading.Thread(target=self._pass, args=(ours, theirs), daemon=True))
                self._threads[-1].start()

    def _pass(self, ours: socket.socket, theirs: socket.socket) -> None:
        ends = {ours: theirs, theirs: ours}
        with ours, theirs, contextlib.suppress(OSError):
            while not self._stop.is_set():
                for ready in select.select(list(ends), [], [], 0.05)[0] if not self.frozen.is_set() else ():
                    data = ready.recv(self.chunk)
                    if not data:
                        return
                    ends[ready].sendall(data)
                    time.sleep(self.pause_s)

    def cut(self) -> None:
        """End every connection; new ones are let through."""
        while self._ways:
            with contextlib.suppress(OSError):
                self._ways.pop().shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(5)
        self._listener.close()


@pytest.fixture
def relay() -> Iterator[Callable[[str], Relay]]:
    made: list[Relay] = []

    def make(endpoint: str) -> Relay:
        made.append(Relay(endpoint))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def world(start_broker: Any, start_echo: Any, connect: Any, introduce: Any, opened: Any, relay: Any) -> Any:
    """A broker with a worker, and a silo with a session behind a relay."""

    class World:
        def __init__(self, **limits: Any) -> None:
            self.running = start_broker(**{"silence": 60.0, **limits})
            self.echo = start_echo(self.running.endpoint)
            self.relay = relay(self.running.endpoint)
            self.silo, self.numbers = connect(self.relay.endpoint, introduce("silo", "far")), count(1)
            opened(self.silo, "s", self.numbers)

    return World


def test_a_peer_that_hangs_up_is_missed_within_half_a_second(
    start_broker: Any, start_echo: Any, connect: Any, introduce: Any, opened: Any, until: Any
) -> None:
    """The worker hears of it although nobody sends anything to the silo."""
    running = start_broker(silence=60.0, heartbeat=5.0)
    echo = start_echo(running.endpoint)
    silo, numbers = connect(running.endpoint, introduce("silo", "short")), count(1)
    opened(silo, "s", numbers)
    silo._leave = lambda _: None  # As if it were killed: no goodbye.
    begun = time.monotonic()
    silo.close()
    until(lambda: echo.gone)
    assert time.monotonic() - begun < 2.0, "half a second, and time for a slow machine"


def test_a_cut_connection_costs_nothing(
    world: Any, ask: Any, extending: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link is back before the broker misses it: its session is still there."""
    monkeypatch.setattr(broker.lines, "_GRACE_S", 5.0)  # For slow machines.
    world = world()
    for _ in range(3):
        world.relay.cut()
        time.sleep(0.05)
        answer = ask(world.silo, extending("s", next(world.numbers)), [b"x"])
        assert isinstance(answer.header, Result), answer.header
    time.sleep(0.3)
    assert world.echo.gone == []


def test_a_way_on_which_nothing_comes_is_missed_after_two_heartbeats(world: Any, until: Any) -> None:
    world = world(heartbeat=0.3)
    time.sleep(1.2)
    assert world.echo.gone == [], "bytes come all the time"
    world.relay.frozen.set()
    begun = time.monotonic()
    until(lambda: world.echo.gone)
    assert 0.3 < time.monotonic() - begun < 3.0
    until(lambda: not world.silo.attached)


def test_a_message_that_takes_long_is_a_sign_of_life(world: Any, ask: Any, extending: Any) -> None:
    """Its bytes come, and behind them nothing else can: no heartbeat, no answer to a ping."""
    world = world(heartbeat=0.5)
    world.relay.chunk, world.relay.pause_s = 1 << 14, 0.05
    begun = time.monotonic()
    answer = ask(world.silo, extending("s", next(world.numbers)), [bytes(1 << 20)])
    assert isinstance(answer.header, Result)
    assert time.monotonic() - begun > 4.0, "twice as long as two heartbeats, each way"
    assert world.echo.gone == []


def test_a_number_that_another_connection_has_by_now_ends_nobody_else() -> None:
    lines = Lines()
    lines.attached(b"first", 7, 0.0)
    lines.attached(b"second", 7, 1.0)
    assert lines.doubtful([], 1.2) == [], "it may come back"
    assert lines.doubtful([], 1.5) == [b"first"]
    assert lines.doubtful([7], 2.0) == []
    assert lines.doubtful([], 3.0) == [b"second"], "told late: it may be either, and is probed"
    assert lines.doubtful([7], 4.0) == []


def test_who_attaches_again_on_the_same_connection_is_not_doubted() -> None:
    lines = Lines()
    for now in (0.0, 1.0):
        lines.attached(b"same", 7, now)
    assert lines.doubtful([], 5.0) == []


def test_what_cannot_be_told_is_not_told() -> None:
    assert quiet_for(None) is None
    assert quiet_for(1 << 20) is None
    with open("/dev/null") as file:
        assert quiet_for(file.fileno()) is None


def test_the_router_forgets_for_want_of_bytes_and_of_messages(introduce: Any, opening: Any) -> None:
    router = Router(Limits(heartbeat=1.0, silence=10.0))
    router.handle(b"worker", Parcel.of(introduce("worker")), 0.0)
    router.handle(b"silo", Parcel.of(introduce("silo")), 0.0)
    (request,) = router.handle(b"silo", Parcel.of(opening("s", id=1)), 0.0)
    assert isinstance(request.parcel.header, OpenSession)
    quiet = {b"worker": 0.4, b"silo": 0.4}
    assert router.tick(9.9, quiet.get) == []
    quiet[b"worker"] = 2.1
    (told,) = router.tick(9.9, quiet.get)
    assert isinstance(told.parcel.header, Error)
    assert (told.route, told.parcel.header.code) == (b"silo", "unavailable")
    router.tick(10.1, quiet.get)
    assert not router.peers, "ten seconds without a message"


def test_who_was_just_heard_is_not_asked_after(introduce: Any) -> None:
    router = Router(Limits(heartbeat=1.0))
    router.handle(b"silo", Parcel.of(introduce("silo")), 0.0)
    router.tick(0.9, lambda _: 99.0)
    assert router.peers
