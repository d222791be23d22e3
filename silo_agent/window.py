"""How many micro-batches a silo keeps in flight. Decisions over times that it is told; no clock.

As with BBR (Cardwell et al., ACM Queue 14(5), 2016) it is the product of two measurements: micro-batches
that come back per second, and seconds that one is away when nothing is in its way. The latter is put
together of parts, each at its best, so that waiting for others in the trunk is no part of it: that wait
grows with the window, and the window would grow with it.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

LEAST = 2
MOST = 64
"""The worker, which would take more, keeps each one's activations, and the head keeps its own."""

FIRST = 4
"""Before anything was measured."""

_ROOM = 1.4
"""So much more than the product, since micro-batches differ and come back in bursts. Because it is above
1, a window that was too small to fill the line grows with each measurement until it does."""

_STEPS = 4
"""Recent steps that are looked at. Between two of them all queues run empty, which shows a line's best."""

_TICK_S = 1e-6
"""Less than a clock tells apart."""

_BYTES = 1 << 29
"""Half of what a broker lets one silo have on the way."""


@dataclass(slots=True)
class _Turn:
    """One micro-batch, from the start of its head's forward to the end of its head's backward."""

    began: float
    done_before: int
    since: float
    compute: float = 0.0
    ways: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Step:
    """One step's micro-batches: how many, what silo and trunk computed for them, and the least time that
    forward and backward took on their ways. Of those that began with the line full: how many micro-batches
    came back while each was away, and for how long it was."""

    turns: int = 0
    compute: float = 0.0
    ways: list[float] = field(default_factory=lambda: [math.inf, math.inf])
    passed: int = 0
    away: float = 0.0


class Window:
    """`size` micro-batches may be in flight: tuned from their times, or `fixed`."""

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self._turns: dict[int, _Turn] = {}
        self._steps: deque[_Step] = deque([_Step()], maxlen=_STEPS)
        self._done = self._done_before_step = 0
        self._largest = 1
        self.size = fixed or FIRST
        """How many may be in flight now."""

    def began(self, number: int, now: float) -> None:
        """The head's forward of micro-batch `number` begins."""
        self._turns[number] = _Turn(now, self._done, now)

    def sent(self, number: int, now: float, size: int = 0) -> None:
        """Its forward, or later its backward, left for the trunk, in `size` bytes."""
        turn = self._turns[number]
        turn.compute += now - turn.since
        turn.since = now
        self._largest = max(self._largest, size)

    def answered(self, number: int, now: float, seconds: float) -> None:
        """The answer is in hand; the trunk computed for `seconds`."""
        turn = self._turns[number]
        turn.compute += seconds
        turn.ways.append(max(0.0, now - turn.since - seconds))
        turn.since = now

    def ended(self, number: int, now: float) -> None:
        """The head's backward is done, and with it the micro-batch."""
        turn, step = self._turns.pop(number), self._steps[-1]
        self._done += 1
        step.turns += 1
        step.compute += turn.compute + now - turn.since
        step.ways = [min(pair) for pair in zip(step.ways, turn.ways, strict=True)]
        if turn.done_before > self._done_before_step:
            step.passed += self._done - turn.done_before
            step.away += max(_TICK_S, now - turn.began)
            self._tune()

    def dropped(self) -> None:
        """Nothing that is in flight is awaited any more."""
        self._turns.clear()

    def committed(self) -> None:
        """A step is over."""
        self._done_before_step = self._done
        if self._steps[-1].turns:
            self._steps.append(_Step())

    def _tune(self) -> None:
        if self._fixed is None:
            most = max(1, min(MOST, _BYTES // self._largest))
            self.size = min(most, max(LEAST, math.ceil(_ROOM * _product(self._steps))))


def _product(steps: Sequence[_Step]) -> float:
    """Micro-batches per second times the seconds of one."""
    turns = sum(step.turns for step in steps)
    seconds = sum(step.compute for step in steps) / turns
    seconds += sum(min(step.ways[leg] for step in steps) for leg in (0, 1))
    rate = max(step.passed / step.away for step in steps if step.passed)
    return rate * seconds
