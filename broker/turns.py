"""Whose turn it is within one class: fair among silos by tokens. Decisions only.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): a silo stands at the number of tokens it
was given, the one that stands lowest is next, and who comes new stands where that one does.
"""

from collections import deque
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic

from broker.ask import A


@dataclass(slots=True, eq=False)
class _Line(Generic[A]):
    """One silo's requests, first come first, and where the silo stands once the last one given is done."""

    asks: deque[A] = field(default_factory=deque)
    stands: int = 0


class Turns(Generic[A]):
    """Requests of one class that may go as soon as there is credit. O(log silos) for each."""

    def __init__(self) -> None:
        self.passed = 0
        """Tokens that went to other classes since this one waits, or had its last turn."""
        self._now = 0
        self._lines: dict[bytes, _Line[A]] = {}
        self._heap: list[tuple[int, int, _Line[A]]] = []
        self._ties = count()

    def __bool__(self) -> bool:
        return bool(self._heap)

    def add(self, ask: A) -> None:
        """`ask` may go from now on."""
        silo = ask.flow[0]
        line = self._lines.get(silo)
        if line is None:
            line = self._lines[silo] = _Line()
        line.asks.append(ask)
        if len(line.asks) == 1:
            heappush(self._heap, (max(self._now, line.stands), next(self._ties), line))

    def first(self) -> A:
        """Who is next. There must be one."""
        return self._heap[0][2].asks[0]

    def take(self) -> None:
        """The first goes."""
        self._now, _, line = heappop(self._heap)
        line.stands = self._now + line.asks.popleft().tokens
        if line.asks:
            heappush(self._heap, (line.stands, next(self._ties), line))
        self.passed = 0
        self._rest()

    def withdraw(self, ask: A) -> None:
        """`ask` will not go: it is wanted no more. Slow, and rare."""
        line = self._lines[ask.flow[0]]
        line.asks.remove(ask)
        if not line.asks:
            self._heap = [entry for entry in self._heap if entry[2] is not line]
            heapify(self._heap)
        self._rest()

    def _rest(self) -> None:
        """Where nobody waits any more, nobody is owed anything."""
        if not self._heap:
            self._lines.clear()
            self._now = self.passed = 0
