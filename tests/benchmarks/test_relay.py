"""The relay: real sockets on loopback, then the command as a process before a real broker."""

import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Queue

import pytest

from benchmarks.relay import Relay
from broker.link import ZmqLink
from broker.parcel import Parcel
from codec.errors import UsageError
from codec.messages import Attach, CloseSession, Error
from silo_agent.processes import Processes

DEADLINE = 20.0


class Target:
    """A listening socket; `accept` gives the other end of what the relay opened."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._listener.settimeout(DEADLINE)
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"

    def accept(self) -> socket.socket:
        connection = self._stack.enter_context(self._listener.accept()[0])
        connection.settimeout(DEADLINE)
        return connection

    def connect(self, endpoint: str) -> socket.socket:
        port = int(endpoint.rpartition(":")[2])
        connection = self._stack.enter_context(socket.create_connection(("127.0.0.1", port), DEADLINE))
        connection.settimeout(DEADLINE)
        return connection

    def pair(self, relay: Relay) -> tuple[socket.socket, socket.socket]:
        return self.connect(relay.endpoint), self.accept()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def target() -> Iterator[Target]:
    with ExitStack() as stack:
        yield Target(stack)


def everything(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


def exchange(ours: socket.socket, theirs: socket.socket, there: bytes, back: bytes) -> tuple[bytes, bytes]:
    """Send both at once and close each side when its bytes are out; what arrived at either end."""

    def say(connection: socket.socket, data: bytes) -> None:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)

    senders = [threading.Thread(target=say, args=pair) for pair in ((ours, there), (theirs, back))]
    arrived: Queue[bytes] = Queue()
    senders.append(threading.Thread(target=lambda: arrived.put(everything(theirs))))
    for thread in senders:
        thread.start()
    received = everything(ours)
    for thread in senders:
        thread.join(DEADLINE)
    return arrived.get(timeout=DEADLINE), received


@pytest.mark.parametrize(("rtt_ms", "mbit"), [(0, 0), (10, 0), (0, 200), (10, 200)])
def test_bytes_pass_unchanged_both_ways(target: Target, rtt_ms: float, mbit: float) -> None:
    there, back = random.randbytes(5 << 20), random.randbytes((3 << 20) + 7)
    with Relay("tcp://127.0.0.1:0", target.endpoint, rtt_ms, mbit) as relay:
        assert exchange(*target.pair(relay), there, back) == (there, back)


def test_connections_do_not_mix(target: Target) -> None:
    with Relay("tcp://127.0.0.1:0", target.endpoint, rtt_ms=2) as relay:
        pairs = [target.pair(relay) for _ in range(20)]
        for number, (ours, theirs) in enumerate(pairs):
            ours.sendall(b"there %02d" % number)
            theirs.sendall(b"back %02d" % number)
        for number, (ours, theirs) in enumerate(pairs):
            assert theirs.recv(100) == b"there %02d" % number
            assert ours.recv(100) == b"back %02d" % number


def test_a_half_closed_connection_still_answers(target: Target) -> None:
    with Relay("tcp://127.0.0.1:0", target.endpoint, rtt_ms=10) as relay:
        ours, theirs = target.pair(relay)
        ours.sendall(b"question")
        ours.shutdown(socket.SHUT_WR)
        assert everything(theirs) == b"question"
        theirs.sendall(b"answer")
        assert ours.recv(100) == b"answer"
        theirs.close()
        assert ours.recv(100) == b""
        until(lambda: not relay._lanes)


def test_a_reset_is_passed_on_after_what_was_said_before(target: Target) -> None:
    with Relay("tcp://127.0.0.1:0", target.endpoint, rtt_ms=200) as relay:
        ours, theirs = target.pair(relay)
        ours.sendall(b"last words")
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        until(lambda: any(lane.pipe._busy_until > 0 for lane in list(relay._lanes)))
        ours.close()
        assert theirs.recv(100) == b"last words"
        with pytest.raises(ConnectionResetError):
            theirs.recv(100)
        until(lambda: not relay._lanes)


def test_a_refused_connection_is_reset_and_the_relay_lives_on(target: Target) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        nobody = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
    with Relay("tcp://127.0.0.1:0", nobody) as relay:
        for _ in range(3):
            with pytest.raises(ConnectionResetError):
                target.connect(relay.endpoint).recv(100)
        with socket.create_server(("127.0.0.1", int(nobody.rpartition(":")[2]))) as late:
            ours = target.connect(relay.endpoint)
            late.settimeout(DEADLINE)
            with late.accept()[0] as theirs:
                theirs.sendall(b"at last")
                assert ours.recv(100) == b"at last"


def test_a_reader_that_stalls_holds_the_sender_back(target: Target) -> None:
    with Relay("tcp://127.0.0.1:0", target.endpoint) as relay:
        ours, theirs = target.pair(relay)
        ours.settimeout(0.3)
        sent = 0
        with suppress(TimeoutError):
            while sent < 256 << 20:
                sent += ours.send(bytes(1 << 20))
        assert sent < 256 << 20
        ours.settimeout(DEADLINE)
        ours.shutdown(socket.SHUT_WR)
        assert len(everything(theirs)) == sent


def test_stopping_ends_connections_and_leaves_no_thread(target: Target) -> None:
    before = threading.active_count()
    with Relay("tcp://127.0.0.1:0", target.endpoint, rtt_ms=1000) as relay:
        ours, theirs = target.pair(relay)
        ours.sendall(b"on its way for half a second")
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    for connection in (ours, theirs):
        with suppress(ConnectionResetError):  # What was not read yet makes a reset of the close.
            assert connection.recv(100) == b""
    with pytest.raises(ConnectionRefusedError):
        target.connect(relay.endpoint)


def test_ipv6(target: Target) -> None:
    try:
        relay = Relay("tcp://[::1]:0", target.endpoint)
    except UsageError:
        pytest.skip("no IPv6 here")
    with relay:
        assert re.fullmatch(r"tcp://\[::1\]:\d+", relay.endpoint)
        with socket.create_connection(("::1", int(relay.endpoint.rpartition(":")[2])), DEADLINE) as ours:
            ours.sendall(b"six")
            assert target.accept().recv(100) == b"six"


@pytest.mark.parametrize(
    ("listen", "to", "says"),
    [
        ("tcp://0.0.0.0:0", "tcp://127.0.0.1:7555", "beyond loopback"),
        ("tcp://127.0.0.1:0", "tcp://10.0.0.1:7555", "beyond loopback"),
        ("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", "names no port"),
        ("here", "tcp://127.0.0.1:7555", "is not an endpoint"),
        ("tcp://127.0.0.1:7555", "tcp://localhost:7555", "to itself"),
    ],
)
def test_endpoints_it_cannot_use(listen: str, to: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Relay(listen, to)


def test_a_taken_port(target: Target) -> None:
    with pytest.raises(UsageError, match=r"cannot listen on .*in use"):
        Relay(target.endpoint, "tcp://127.0.0.1:1")


def test_the_command_stands_between_a_silo_and_a_real_broker(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        broker = processes.broker()
        lines: Queue[str] = Queue()
        arguments = ("--listen", "tcp://127.0.0.1:0", "--to", broker, "--rtt-ms", "10", "--mbit", "50")
        process = processes.start("relay", "relay", *arguments, on_line=lines.put)
        said = re.fullmatch(rf"relaying (tcp://127\.0\.0\.1:\d+) to {broker}", lines.get(timeout=DEADLINE))
        assert said
        link = ZmqLink(said[1], Attach(role="silo", name="s", peer=bytes(16)))
        link.send(Parcel.of(CloseSession(id=1, session="s"), [b"x" * 100_000]))
        answer = link.receive(DEADLINE)
        link.close()
        assert answer is not None
        assert isinstance(answer.header, Error)
        assert answer.header.code == "unknown-name"
        process.stop()
        process.wait(DEADLINE)  # Raises for an exit code that is not 0.
        assert (tmp_path / "relay.log").read_text() == ""


def test_the_command_loads_nothing_heavy_and_its_errors_are_one_line(repository: Path) -> None:
    program = """
import sys
from trunkline import main
try:
    main(["relay", "--mbit", "-1"])
finally:
    print([name for name in sys.modules if name.partition(".")[0] in ("torch", "transformers", "numpy")])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env={**os.environ, "COLUMNS": "100"},
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "[]\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("trunkline: --mbit -1 is not between 0 (unlimited) and 10000")


def test_help_has_examples(repository: Path) -> None:
    arguments = [sys.executable, "-m", "trunkline", "relay", "--help"]
    done = subprocess.run(arguments, cwd=repository, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(re.findall(r"^ +trunkline relay", done.stdout.partition("Examples:")[2], re.M)) >= 2


def until(happened: Callable[[], bool]) -> None:
    """Wait for something that has no event, with a deadline."""
    deadline = time.monotonic() + DEADLINE
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_a_cut_breaks_what_is_there_and_takes_nobody_for_a_while(target: Target) -> None:
    with Relay("tcp://127.0.0.1:0", target.endpoint) as relay:
        here, there = target.pair(relay)
        here.sendall(b"before")
        assert there.recv(6) == b"before"
        begun = time.monotonic()
        relay.cut(0.6)
        for end in (here, there):
            with suppress(ConnectionResetError):
                assert end.recv(1) == b""
        # The system accepts for the relay, which takes it up when it hears again.
        later = target.connect(relay.endpoint)
        later.sendall(b"after")
        assert target.accept().recv(5) == b"after"
        assert 0.5 < time.monotonic() - begun < 5
