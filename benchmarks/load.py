"""Replay silos in processes of their own, and what they measured together."""

import contextlib
import multiprocessing
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import msgspec

from benchmarks.driver import Driver, Measured
from benchmarks.replay import Replay
from codec.errors import TrunklineError

_SPAWN = multiprocessing.get_context("spawn")
_SILOS_A_PROCESS = 128
_START_S = 120.0
_SLACK_S = 120.0


@dataclass(frozen=True, slots=True)
class Served:
    """What all silos of a load measured: `rates` are tokens per second of each, `size` all bytes.

    `cpu` is in cores, of the busiest of their processes.
    """

    begun: float
    ended: float
    tokens: int
    rates: list[float]
    waits: dict[str, list[float]]
    size: int
    cpu: float
    errors: list[str]


class Load:
    """A context in which replay silos are at work. Leaving it ends their processes."""

    def __init__(self, endpoint: str, replays: Sequence[Replay]) -> None:
        parts = -(-len(replays) // _SILOS_A_PROCESS)
        self._pipes: list[Connection] = []
        self._children: list[BaseProcess] = []
        for part in range(parts):
            ours, theirs = _SPAWN.Pipe()
            arguments = theirs, endpoint, list(replays[part::parts])
            child = _SPAWN.Process(target=_drive, args=arguments, daemon=True, name=f"replay-{part}")
            self._pipes.append(ours)
            self._children.append(child)

    def __enter__(self) -> "Load":
        for child in self._children:
            child.start()
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(b"stop")
        for child in self._children:
            child.join(5.0)
            if child.is_alive():
                child.kill()
                child.join()
        for pipe in self._pipes:
            pipe.close()

    def warm_up(self) -> None:
        """Wait until every silo was served once. Raises `TrunklineError` if that does not happen."""
        for pipe in self._pipes:
            _receive(pipe, _START_S)

    def measure(self, seconds: float) -> Served:
        """Count for about `seconds`. Raises `TrunklineError` if a process fails."""
        for pipe in self._pipes:
            pipe.send_bytes(str(seconds).encode())
        parts = [
            msgspec.msgpack.decode(_receive(pipe, seconds + _SLACK_S), type=Measured) for pipe in self._pipes
        ]
        waits: dict[str, list[float]] = {}
        for part in parts:
            for kind, seconds_each in part.waits.items():
                waits.setdefault(kind, []).extend(seconds_each)
        return Served(
            begun=min(part.begun for part in parts),
            ended=max(part.ended for part in parts),
            tokens=sum(sum(part.tokens) for part in parts),
            rates=[tokens / (part.ended - part.begun) for part in parts for tokens in part.tokens],
            waits=waits,
            size=sum(part.size for part in parts),
            cpu=max(part.cpu / (part.ended - part.begun) for part in parts),
            errors=[error for part in parts for error in part.errors],
        )


def _receive(pipe: Connection, timeout: float) -> bytes:
    try:
        if not pipe.poll(timeout):
            raise TrunklineError(f"the replay silos said nothing for {timeout:g} s", side="silo")
        said = pipe.recv_bytes()
    except EOFError:
        raise TrunklineError("the replay silos' process ended early", side="silo") from None
    if said.startswith(b"!"):
        raise TrunklineError(said[1:].decode(), side="silo")
    return said


def _drive(pipe: Connection, endpoint: str, replays: list[Replay]) -> None:
    """The child's life: warm up, say so, then measure whenever it is told for how long."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then says stop.
    driver = None
    try:
        driver = Driver(endpoint, replays)
        driver.warm_up()
        pipe.send_bytes(b"warm")
        while True:
            driver.keep_on(pipe.poll)
            told = pipe.recv_bytes()
            if told == b"stop":
                return
            pipe.send_bytes(msgspec.msgpack.encode(driver.measure(float(told))))
    except EOFError:
        return  # The parent is gone.
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send_bytes(f"!{error}".encode())
    finally:
        if driver is not None:
            driver.close()
