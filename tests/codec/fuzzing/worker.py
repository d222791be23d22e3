"""The process that reads: whatever a message does to it, it does to nobody else.

Run by `fuzz.py` as `python -m fuzzing.worker SLOT SEED CAP SECONDS READER`. It is told rounds on its
standard input, `NUMBER FRAMES` a line, and answers each with a line of JSON.
"""

import faulthandler
import importlib.util
import itertools
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import msgspec
import torch
from fuzzing.corpus import corpus
from fuzzing.message import Message, Outcome, read
from fuzzing.report import ROUND, Report, Tally
from fuzzing.rounds import Round, play
from fuzzing.slot import Slot

_SLACK = 48 << 20
"""Bytes that any message may take: those kept to breed from, memory that decoders keep for the next
message, and what the allocator has not given back."""

_PER_BYTE = 5 << 10
"""Bytes that a message may take for each of its own. A stored byte becomes 256 at most, and an element
that was one is held in forms of 12 bytes together; a bit of a mask, of 2048 made of a byte, in 2.4."""

Reader = Callable[[Message], Outcome]


class Hang(BaseException):
    """A message took too long. Not an `Exception`, so that no decoder takes it for one of its own."""


def reader(path: str) -> Reader:
    """`read` of a file, or this package's for none."""
    if not path:
        return read
    spec = importlib.util.spec_from_file_location("fuzzed", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Reader = module.read
    return found


class Limits:
    """CPU seconds for each message, memory for each and for all, and no warning of any, from here on.

    CPU time, since a busy machine is no hang; a wait that uses none is left to `fuzz.py`, and so is a
    loop in C. Memory is what the process may write to, so that a claim fails where it is made, though
    nothing of it is touched; and what it touched, which `peak_mib` tells.
    """

    def __init__(self, cap_mib: int, seconds: float) -> None:
        self._cap, self._seconds = cap_mib << 20, seconds
        signal.signal(signal.SIGPROF, _hang)
        warnings.simplefilter("error")
        # From here on the peak is that of messages, and not of what was imported.
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmHWM")
        self._data = _status("VmData") << 10
        self._usual = resource.getrlimit(resource.RLIMIT_DATA)

    def start(self, message: Message) -> None:
        """A message is about to be read."""
        fair = self._cap if message.dear else min(self._cap, _SLACK + message.size * _PER_BYTE)
        resource.setrlimit(resource.RLIMIT_DATA, (self._data + fair, self._usual[1]))
        signal.setitimer(signal.ITIMER_PROF, self._seconds)

    def stop(self) -> None:
        """It was read."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, self._usual)

    @property
    def peak_mib(self) -> float:
        """By how much memory grew, at its peak."""
        return (_status("VmHWM") - self._before) / 1024


def _hang(_number: int, _frame: FrameType | None) -> None:
    raise Hang("the message took too long")


def _status(key: str) -> int:
    """KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise LookupError(key)


def main(path: str, seed: str, cap_mib: str, seconds: str, source: str) -> None:
    """Read rounds until standard input ends."""
    faulthandler.enable()
    slot, reads = Slot(Path(path)), reader(source)
    torch.set_num_threads(1)
    valid = corpus()
    for message in itertools.chain(*valid.groups):
        reads(message)  # What is set up once is no message's cost.
    limits = Limits(int(cap_mib), float(seconds))

    def watch(index: int, message: Message) -> bool:
        return slot.put(index, message.pack())

    def limited(message: Message) -> Outcome:
        limits.start(message)
        try:
            return reads(message)
        finally:
            limits.stop()

    for line in sys.stdin:
        number, frames = map(int, line.split())
        start = number * ROUND
        report = Report(tally := Tally())
        try:
            play(Round(int(seed), number, valid), range(start, start + frames), limited, tally, watch)
        except BaseException:
            report.error = traceback.format_exc()
        tally.peak_mib = limits.peak_mib
        if not report.error and tally.peak_mib > int(cap_mib):
            report.error = f"memory grew by {tally.peak_mib:.0f} MiB, {cap_mib} are allowed"
        print(msgspec.json.encode(report).decode(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
