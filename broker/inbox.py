"""The queue in front of one worker: what may go to it now, and what goes next. Decisions only.

What is under way is bounded by the worker's credit. What waits is in flows, first in, first out; the
first request of a flow decides its class. Classes go in strict order, and within a class silos take
turns by tokens (`broker.turns`). No class starves: one that was passed over for too long is next.
"""

from collections import deque
from collections.abc import Iterator
from typing import Generic

from broker.ask import A, Flow, Rank
from broker.turns import Turns

_NO_BOUND = 1 << 80
_PATIENCE = 4
"""A class is next once this many times the credit went to others while it waited."""


class Inbox(Generic[A]):
    """What waits for a worker, and what is under way to it."""

    def __init__(self) -> None:
        self.credit = _NO_BOUND
        self.tokens_under_way = 0
        self.waiting = 0
        """Requests that wait."""
        self.tokens_waiting = 0
        self._under_way: dict[tuple[bytes, int], A] = {}
        self._flows: dict[Flow, deque[A]] = {}
        self._classes: tuple[Turns[A], ...] = tuple(Turns() for _ in Rank)

    def grant(self, credit: int) -> None:
        """How many tokens may be under way; 0 is no bound."""
        self.credit = credit or _NO_BOUND

    def passes(self, ask: A) -> bool:
        """Whether a new request goes at once: nothing waits, and there is credit for it."""
        if self.waiting or not self._fits(ask):
            return False
        self._send(ask)
        return True

    def queue(self, ask: A) -> list[A]:
        """Take a new request that did not pass; what goes now, in order."""
        flow = self._flows.get(ask.flow)
        if flow is None and not ask.tokens:
            self._send(ask)
            return [ask]
        self.waiting += 1
        self.tokens_waiting += ask.tokens
        if flow is not None:
            flow.append(ask)
            return []
        self._flows[ask.flow] = deque([ask])
        self._classes[ask.rank].add(ask)
        return self.release()

    def release(self) -> list[A]:
        """What of all that waits goes now, in order."""
        going: list[A] = []
        while self.waiting:
            turns = self._next()
            ask = turns.first()
            if not self._fits(ask):
                break
            turns.take()
            for other in self._classes:
                if other and other is not turns:
                    other.passed += ask.tokens
            for leaving in self._advance(ask.flow):
                self._send(leaving)
                self._waits_no_more(leaving)
                going.append(leaving)
        return going

    def answered(self, silo: bytes, number: int) -> A | None:
        """The request that the worker answers, and its credit is back; None if it has no such."""
        ask = self._under_way.pop((silo, number), None)
        if ask is not None:
            self.tokens_under_way -= ask.tokens
        return ask

    def owes(self, silo: bytes) -> set[int]:
        """The numbers of this silo that the worker has yet to answer."""
        return {number for alias, number in self._under_way if alias == silo}

    def has_sent(self, silo: bytes, number: int) -> bool:
        """Whether the worker has yet to answer this request."""
        return (silo, number) in self._under_way

    def renew(self) -> list[A]:
        """The worker is on a new connection. What was lost with the old one will not be answered.

        So what is under way, which is returned, no longer counts against the credit, whether its answer
        comes or not.
        """
        for ask in self._under_way.values():
            ask.tokens = 0
        self.tokens_under_way = 0
        return list(self._under_way.values())

    def withdraw(self, silo: bytes, flow: Flow | None = None) -> list[A]:
        """Forget what waits of one silo, or of one of its flows."""
        gone: list[A] = []
        for key in [key for key in self._flows if key[0] == silo and flow in (None, key)]:
            asks = self._flows.pop(key)
            self._classes[asks[0].rank].withdraw(asks[0])
            for ask in asks:
                self._waits_no_more(ask)
            gone += asks
        return gone

    def __iter__(self) -> Iterator[A]:
        """Everything that is under way or waits."""
        yield from self._under_way.values()
        for flow in self._flows.values():
            yield from flow

    def _fits(self, ask: A) -> bool:
        """Whether there is credit for it; for one alone there always is."""
        return not self.tokens_under_way or self.tokens_under_way + ask.tokens <= self.credit

    def _next(self) -> Turns[A]:
        waiting = [turns for turns in self._classes if turns]
        longest = max(waiting, key=lambda turns: turns.passed)
        return longest if longest.passed >= _PATIENCE * self.credit else waiting[0]

    def _advance(self, key: Flow) -> Iterator[A]:
        """The first of a flow, and what costs nothing behind it. What comes then enters its class."""
        flow = self._flows[key]
        yield flow.popleft()
        while flow and not flow[0].tokens:
            yield flow.popleft()
        if flow:
            self._classes[flow[0].rank].add(flow[0])
        else:
            del self._flows[key]

    def _waits_no_more(self, ask: A) -> None:
        self.waiting -= 1
        self.tokens_waiting -= ask.tokens

    def _send(self, ask: A) -> None:
        if ask.number:
            self._under_way[ask.flow[0], ask.number] = ask
        self.tokens_under_way += ask.tokens
