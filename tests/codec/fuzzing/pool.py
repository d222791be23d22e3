"""Workers and their rounds: hands rounds out, adds up what comes back, and outlives what kills a worker."""

import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
from fuzzing.report import ROUND, Report, Tally
from fuzzing.slot import Slot

_START = 120.0
"""Seconds in which a worker must come to its first message; importing torch takes most of it."""

_PATIENCE = 12
"""A worker is given up after so many limits at one message, of wall clock: it waits without end, or
loops in C, where a worker's own alarm does not go off."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`cap_mib` and `limit` as in `fuzzing.worker`; `seconds` bounds the whole, 0 for no bound."""

    frames: int
    seed: int
    seconds: float
    jobs: int
    cap_mib: int
    limit: float
    reader: str


@dataclass(frozen=True, slots=True)
class Failure:
    """What happened, and at which message; `message` is empty if a worker never came to one."""

    what: str
    index: int
    message: bytes


class _Worker:
    def __init__(self, settings: Settings, path: Path) -> None:
        self.slot = Slot(path, create=True)
        arguments = (path, settings.seed, settings.cap_mib, settings.limit, settings.reader)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fuzzing.worker", *map(str, arguments)],
            env=os.environ | environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.hears, self.says = self.process.stdin, self.process.stdout
        self.limit = settings.limit
        self.start = 0
        self.seen: int | None = None
        self.moved = time.monotonic()

    def give(self, number: int, frames: int) -> None:
        self.start = number * ROUND
        self.moved = time.monotonic()
        with suppress(BrokenPipeError):  # It is dead then, which the end of its output tells.
            print(number, frames, file=self.hears, flush=True)

    @property
    def done(self) -> int:
        return max(0, self.slot.index - self.start)

    def stalled(self) -> bool:
        now, place = time.monotonic(), self.slot.index if self.slot.begun else None
        if place != self.seen:
            self.seen, self.moved = place, now
        return now - self.moved > (_START if place is None else _PATIENCE * self.limit)

    def failure(self, what: str) -> Failure:
        return Failure(what, self.slot.index, self.slot.message())


def environment() -> dict[str, str]:
    """What a process that reads messages needs set before it starts."""
    places = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(places),
        # The stacks of threads, and large blocks that are kept when they are freed, would count as memory.
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
    }


def run(settings: Settings, tell: Callable[[int], None]) -> tuple[Tally, Failure | None]:
    """All rounds, or those until the first failure; `tell` hears of the messages read so far."""
    total, end = Tally(), time.monotonic() + (settings.seconds or float("inf"))
    rounds = _rounds(settings.frames)
    with tempfile.TemporaryDirectory() as folder, selectors.DefaultSelector() as selector:
        workers: list[_Worker] = []
        try:
            for name, (number, frames) in zip(range(settings.jobs), rounds, strict=False):
                workers.append(worker := _Worker(settings, Path(folder) / str(name)))
                selector.register(worker.says, selectors.EVENT_READ, worker)
                worker.give(number, frames)
            while selector.get_map():
                if failure := _turn(selector, rounds, total):
                    return total, failure
                busy = [key.data for key in selector.get_map().values()]
                if time.monotonic() > end:
                    for worker in busy:
                        worker.slot.stop()
                    rounds = iter(())
                tell(total.frames + sum(worker.done for worker in busy))
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.communicate()
    return total, None


def _rounds(frames: int) -> Iterator[tuple[int, int]]:
    for number in range(-(-frames // ROUND)):
        yield number, min(ROUND, frames - number * ROUND)


def _turn(
    selector: selectors.BaseSelector, rounds: Iterator[tuple[int, int]], total: Tally
) -> Failure | None:
    """Wait a little for reports; give who reports the next round, or let it go."""
    for key, _ in selector.select(0.2):
        worker: _Worker = key.data
        line = worker.says.readline()
        if not line:
            return worker.failure(f"the process ended with {worker.process.wait()}")
        report = msgspec.json.decode(line, type=Report)
        total.add(report.tally)
        if report.error:
            return worker.failure(report.error)
        if following := next(rounds, None):
            worker.give(*following)
        else:
            selector.unregister(key.fileobj)
    for key in selector.get_map().values():
        worker = key.data
        if worker.stalled():
            return worker.failure("the process stopped answering")
    return None
