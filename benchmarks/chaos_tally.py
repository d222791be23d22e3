"""What a chaos benchmark counts, and how long the disturbed took to go on.

All times are of one clock, `time.monotonic`.
"""

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.chaos_plan import Disturbance
from benchmarks.figures import percentile

STALL_S = 0.25
"""A wait that is shorter is not counted as disturbed, whatever happened meanwhile."""


AFTER_S = 3.0
"""How long after its end a disturbance may still be felt: what was started again must be found again."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A silo waited for the trunk from `begun` to `ended`: for a pass of a session, or a step of a run."""

    begun: float
    ended: float


@dataclass(frozen=True, slots=True)
class Deed:
    """A disturbance as it happened: in effect from `begun` to `ended`."""

    disturbance: Disturbance
    begun: float
    ended: float


@dataclass(frozen=True, slots=True)
class Recovery:
    """A wait that was disturbed: `seconds` from the first disturbance within it to its end."""

    at: float
    seconds: float
    label: str


def recoveries(waits: Iterable[Wait], deeds: Sequence[Deed]) -> list[Recovery]:
    """Every wait of `STALL_S` or more that was disturbed, and how long it then still took.

    Counted from the first disturbance that reaches into the wait, or from the wait's beginning if that is
    later; those that hit while it recovered do not begin it anew.
    """
    found = []
    for wait in _stalls(waits):
        if hits := _hits(wait, deeds):
            first = min(hits, key=lambda deed: deed.begun)
            begun = max(wait.begun, first.begun)
            found.append(Recovery(begun, wait.ended - begun, first.disturbance.label))
    return found


def unexplained(waits: Iterable[Wait], deeds: Sequence[Deed]) -> dict[str, Any]:
    """How many waits of `STALL_S` or more nothing disturbed, and the longest: a machine that is busy."""
    seconds = [wait.ended - wait.begun for wait in _stalls(waits) if not _hits(wait, deeds)]
    return {"count": len(seconds), "max_s": max(seconds, default=None)}


def _stalls(waits: Iterable[Wait]) -> Iterator[Wait]:
    return (wait for wait in waits if wait.ended - wait.begun >= STALL_S)


def _hits(wait: Wait, deeds: Sequence[Deed]) -> list[Deed]:
    return [deed for deed in deeds if deed.begun <= wait.ended and deed.ended + AFTER_S >= wait.begun]


def summary(found: Sequence[Recovery]) -> dict[str, Any]:
    """Count, median, 99th percentile and longest, in seconds; None where nothing recovered."""
    seconds = [each.seconds for each in found]
    return {
        "count": len(seconds),
        "p50_s": percentile(seconds, 50) if seconds else None,
        "p99_s": percentile(seconds, 99) if seconds else None,
        "max_s": max(seconds, default=None),
    }


def by_kind(found: Sequence[Recovery]) -> dict[str, dict[str, Any]]:
    """`summary` for what each kind of disturbance began."""
    kinds: dict[str, list[Recovery]] = defaultdict(list)
    for each in found:
        kinds[each.label].append(each)
    return {label: summary(kinds[label]) for label in sorted(kinds)}


@dataclass(slots=True)
class Tally:
    """What happened, told from many threads."""

    generations: int = 0
    tokens: int = 0
    steps: int = 0
    runs: int = 0
    wrong: int = 0
    lost: list[str] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    step_waits: list[Wait] = field(default_factory=list)
    adapter_diffs: list[float] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def passed(self, begun: float, ended: float) -> None:
        """A pass of a session was answered: one token more."""
        with self._lock:
            self.tokens += 1
            self.waits.append(Wait(begun, ended))

    def generated(self, right: bool) -> None:
        """A generation came to its end, with the undisturbed one's tokens or not."""
        with self._lock:
            self.generations += 1
            self.wrong += not right

    def stepped(self, begun: float, ended: float) -> None:
        """A training step was committed."""
        with self._lock:
            self.steps += 1
            self.step_waits.append(Wait(begun, ended))

    def trained(self, difference: float) -> None:
        """A run came to its end; how far its adapter is from the undisturbed one's."""
        with self._lock:
            self.runs += 1
            self.adapter_diffs.append(difference)

    def failed(self, what: str) -> None:
        """A generation or a run ended in an error at its user's end."""
        with self._lock:
            self.lost.append(what)
