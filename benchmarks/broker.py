"""How many messages a second does the broker route, beside `zmq.proxy`, which only passes them on?

Load and echo are plain sockets with headers encoded beforehand, in processes of their own, and the
same for both, so that what differs is what stands in the middle: a real `trunkline broker`, or a
process that runs `zmq.proxy`. Both take turns.
"""

import contextlib
import multiprocessing
import secrets
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import zmq

from benchmarks.echo import echo_card
from benchmarks.progress import Progress
from broker.keys import LinkKeys
from codec.messages import Attach, Extend, Opened, OpenSession, Result, TensorSpec, encode_header
from silo_agent.processes import Processes

Socket = zmq.Socket[bytes]

_TIMEOUT_MS = 60_000
_ATTEMPTS = 1200
_SPAWN = multiprocessing.get_context("spawn")
_HIDDEN = 4


@dataclass(frozen=True, slots=True)
class BenchKeys:
    """A broker's key directory, and the keys of a silo and a worker that it lets in."""

    directory: Path
    silo: LinkKeys
    worker: LinkKeys


@dataclass(frozen=True, slots=True)
class Way:
    """What stands in the middle, `broker` or `proxy`; a broker with `keys` or without."""

    name: str
    middle: str
    keys: BenchKeys | None = None


def measure(
    *, sizes: Sequence[int], count: int, window: int, rounds: int, progress: Progress
) -> dict[str, Any]:
    """Round trips per second with `window` requests under way, and the latency of one at a time.

    Each round sends `count` requests of each of the `sizes` (bytes of payload), fewer of large ones.
    """
    ways = (Way("proxy", "proxy"), Way("broker", "broker"))
    with tempfile.TemporaryDirectory() as logs, Processes(Path(logs)) as processes:
        rates, waits = in_turns(processes, ways, sizes, count, window, rounds, progress)
    rows = []
    for size in sizes:
        broker, proxy = rates[size, "broker"], rates[size, "proxy"]
        percentiles = {
            way.name: statistics.quantiles(chain.from_iterable(waits[size, way.name]), n=100) for way in ways
        }
        rows.append(
            {
                "bytes": size,
                "broker_per_s": statistics.median(broker),
                "proxy_per_s": statistics.median(proxy),
                "ratio": statistics.median(b / p for b, p in zip(broker, proxy, strict=True)),
                "added_us_p50": (percentiles["broker"][49] - percentiles["proxy"][49]) * 1e6,
                "added_us_p99": (percentiles["broker"][98] - percentiles["proxy"][98]) * 1e6,
            }
        )
    return {"window": window, "rows": rows}


def in_turns(
    processes: Processes,
    ways: Sequence[Way],
    sizes: Sequence[int],
    count: int,
    window: int,
    rounds: int,
    progress: Progress,
) -> tuple[dict[tuple[int, str], list[float]], dict[tuple[int, str], list[list[float]]]]:
    """Round trips per second, and the seconds of single ones, of each size and way in each round."""
    rates: dict[tuple[int, str], list[float]] = {}
    waits: dict[tuple[int, str], list[list[float]]] = {}
    for number in range(rounds):
        for size in sizes:
            requests = max(64, min(count, (256 << 20) // size))
            for way in ways:
                progress(f"round {number + 1} of {rounds}, {size} bytes, {way.name}")
                with _line(way.middle, processes, requests, way.keys) as socket:
                    rate, latencies = _load(socket, way.middle, size, requests, window)
                rates.setdefault((size, way.name), []).append(rate)
                waits.setdefault((size, way.name), []).append(latencies)
    return rates, waits


@contextlib.contextmanager
def _line(middle: str, processes: Processes, requests: int, keys: BenchKeys | None) -> Iterator[Socket]:
    """A connected client socket, with the middle and an echo behind it; of a broker, with `keys` or not."""
    context: zmq.Context[Socket] = zmq.Context()
    ours, theirs = _SPAWN.Pipe()
    children = []
    try:
        if middle == "broker":
            front = back = processes.broker(*(["--keys", str(keys.directory)] if keys else []))
        else:
            children.append(_SPAWN.Process(target=_proxy, args=(theirs,), daemon=True))
            children[0].start()
            if not ours.poll(_TIMEOUT_MS / 1000):
                raise TimeoutError("the proxy did not start")
            front, back = ours.recv()
        children.append(
            _SPAWN.Process(
                target=_echo, args=(back, middle, requests, keys.worker if keys else None), daemon=True
            )
        )
        children[-1].start()
        with _dealer(context, front, keys.silo if keys else None) as socket:
            yield socket
    finally:
        for child in children:
            child.kill()
            child.join()
        context.term()


def _dealer(context: "zmq.Context[Socket]", endpoint: str, keys: LinkKeys | None) -> Socket:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVTIMEO, _TIMEOUT_MS)
    socket.setsockopt(zmq.SNDTIMEO, _TIMEOUT_MS)
    if keys:
        keys.guard(socket)
    socket.connect(endpoint)
    return socket


def _proxy(pipe: Any) -> None:
    context: zmq.Context[Socket] = zmq.Context()
    front, back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in (front, back)]
    pipe.send([f"tcp://127.0.0.1:{port}" for port in ports])
    zmq.proxy(front, back)


def _attach(socket: Socket, role: Any) -> None:
    peer = secrets.token_bytes(16)
    attach = Attach(id=1, role=role, name="bench", peer=peer)
    if role == "worker":
        attach = msgspec.structs.replace(attach, model=echo_card(_HIDDEN), start=0, stop=3)
    socket.send_multipart([b"", encode_header(attach)])
    socket.recv_multipart()


def _echo(endpoint: str, middle: str, requests: int, keys: LinkKeys | None) -> None:
    """Answer every request with as many bytes, in the order in which they come."""
    answers = [encode_header(Result(id=number)) for number in range(2, 3 * requests + 100)]
    with zmq.Context() as context, _dealer(context, endpoint, keys) as socket:
        socket.setsockopt(zmq.RCVTIMEO, -1)  # The parent ends this process.
        if middle == "broker":
            _attach(socket, "worker")
            peer, _ = socket.recv_multipart()
            socket.send_multipart([peer, encode_header(Opened(id=1))])
        for answer in answers:
            *peers, _, payload = socket.recv_multipart(copy=False)
            socket.send_multipart([*peers, answer, payload], copy=False)


def _load(socket: Socket, middle: str, size: int, requests: int, window: int) -> tuple[float, list[float]]:
    """Requests per second with `window` under way, and the seconds of each one sent alone."""
    specs = (TensorSpec("f32", (size // 4,), "raw", (size,)),)
    fields: dict[str, Any] = {"session": "s", "rows": (0,), "starts": (0,), "lengths": (1,)}
    numbers = range(2, 3 * requests + 100)
    headers = iter([encode_header(Extend(id=number, tensors=specs, **fields)) for number in numbers])
    payload = bytes(size)
    if middle == "broker":
        _attach(socket, "silo")
        opening = OpenSession(
            id=1, session="s", model=echo_card(_HIDDEN), start=0, stop=3, rows=1, capacity=8
        )
        for _ in range(_ATTEMPTS):  # Until the echo is attached too.
            socket.send_multipart([b"", encode_header(opening)])
            if b"opened" in socket.recv_multipart()[1]:
                break
            time.sleep(0.05)
        else:  # Only errors would be counted.
            raise TimeoutError("the echo did not attach")

    def send() -> None:
        socket.send_multipart([b"", next(headers), payload], copy=False)

    alone = []
    for _ in range(min(requests, 500) + 20):
        begun = time.perf_counter()
        send()
        socket.recv_multipart(copy=False)
        alone.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    for _ in range(window):
        send()
    for _ in range(requests - window):
        socket.recv_multipart(copy=False)
        send()
    for _ in range(window):
        socket.recv_multipart(copy=False)
    return requests / (time.perf_counter() - begun), alone[20:]
