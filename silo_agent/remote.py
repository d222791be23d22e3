"""The trunk, seen from a silo: requests out, answers in, each with a deadline.

Requests are numbered; answers may come in any order. Used from one thread.
"""

import contextlib
import heapq
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

from torch import Tensor

from broker.link import Link
from broker.parcel import Parcel, error_in
from codec.errors import (
    DeadlineError,
    LimitError,
    MismatchError,
    NobodyError,
    ProtocolError,
    TrunklineError,
    UnavailableError,
    UnknownNameError,
)
from codec.messages import Answer, Attach, Error, OpenRun, OpenSession, Request
from codec.tensors import decode_tensors
from silo_agent.packed import Packed, pack, tokens_of

LOST = (UnavailableError, UnknownNameError, DeadlineError)
"""The worker is gone, has been evicting, or is stuck: elsewhere, or anew, it can go on."""

NOT_YET = (UnavailableError, LimitError, MismatchError)
"""Nobody is there, nobody has room, or only workers of other blocks are left. That can change."""

_RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class Arrival:
    """An answer with its tensors, on the CPU."""

    header: Answer
    tensors: list[Tensor]


@dataclass(slots=True)
class Traffic:
    """Tensor bytes and tokens that crossed, by boundary."""

    bytes: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def count(self, boundary: str, size: int, tokens: int) -> None:
        """One message over `boundary`."""
        self.bytes[boundary] = self.bytes.get(boundary, 0) + size
        self.tokens[boundary] = self.tokens.get(boundary, 0) + tokens


@dataclass(frozen=True, slots=True)
class _Waiting:
    kind: str
    due: float


def silo_attach(name: str) -> Attach:
    """The introduction of a silo called `name`, with a fresh secret identity."""
    return Attach(role="silo", name=name, peer=secrets.token_bytes(16))


class Remote:
    """A silo's way to the pool of workers, through one link."""

    def __init__(self, link: Link, *, deadline: float = 120.0) -> None:
        """`deadline` is how many seconds a request may stay unanswered."""
        self._link = link
        self._deadline = deadline
        self._ids = count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._dues: list[tuple[float, int]] = []
        self._early: dict[int, Arrival | TrunklineError] = {}
        self.traffic = Traffic()

    def submit(
        self, request: Request, tensors: Sequence[Tensor] = (), *, deadline: float | None = None
    ) -> int:
        """`send` a request, every bit of its tensors."""
        return self.send(pack(request, tensors), deadline=deadline)

    def send(self, packed: Packed, *, deadline: float | None = None) -> int:
        """Send a request and return its number; nothing is awaited.

        The same one may be sent again: the frames are the same bytes then. Raises the link's error if
        that has failed.
        """
        number = next(self._ids)
        parcel = packed.parcel(number)
        self.traffic.count(f"{packed.kind} up", parcel.size, packed.tokens)
        due = time.monotonic() + (deadline or self._deadline)
        self._waiting[number] = _Waiting(packed.kind, due)
        self._forget_answered()
        heapq.heappush(self._dues, (due, number))
        self._link.send(parcel)
        return number

    def take(self, *, block: bool = True) -> Arrival | None:
        """The next answer to any request; None if `block` is false and none is there.

        Raises the error a worker or broker answered with, `DeadlineError` for a request whose time
        is up, and the link's error.
        """
        while not self._early:
            due, number = self._first_due() if block else (0.0, 0)
            if self._receive(due):
                continue
            if not block:
                return None
            self._check_deadline(number)
        return _opened(self._early.pop(next(iter(self._early))))

    def wait(self, number: int) -> Arrival:
        """The answer to request `number`; others that come first are kept. Raises as `take` does, but
        only what concerns this request."""
        while number not in self._early:
            if not self._receive(self._waiting[number].due):
                self._check_deadline(number)
        return _opened(self._early.pop(number))

    def call(
        self, request: Request, tensors: Sequence[Tensor] = (), *, deadline: float | None = None
    ) -> Arrival:
        """`submit` a request and `wait` for its answer."""
        return self.wait(self.submit(request, tensors, deadline=deadline))

    def tell(self, request: Request) -> None:
        """Send a request whose answer nobody awaits: not even that it failed is heard of."""
        with contextlib.suppress(TrunklineError):
            self.forget([self.submit(request)])

    def forget(self, numbers: Iterable[int]) -> None:
        """Nobody waits for these requests any more: their answers, and their errors, are dropped."""
        for number in numbers:
            self._waiting.pop(number, None)
            self._early.pop(number, None)

    def open(
        self,
        request: OpenSession | OpenRun,
        tensors: Sequence[Tensor],
        *,
        wait: float,
        despite: tuple[type[TrunklineError], ...] = (UnavailableError,),
    ) -> Arrival:
        """Open a session or run, asking again for `wait` seconds `despite` these errors.

        By default that is while no worker is free. A broker that has none is left for another, if
        there are several.
        """
        until = time.monotonic() + wait
        while True:
            try:
                return self.call(request, tensors)
            except despite as error:
                if isinstance(error, NobodyError):
                    self._link.elsewhere()
                if time.monotonic() + _RETRY_S > until:
                    raise
                time.sleep(_RETRY_S)

    def close(self) -> None:
        """Close the link."""
        self._link.close()

    def _first_due(self) -> tuple[float, int]:
        """When the first deadline is, and whose; now and nobody's if nobody waits."""
        self._forget_answered()
        return self._dues[0] if self._dues else (time.monotonic(), 0)

    def _forget_answered(self) -> None:
        while self._dues and self._dues[0][1] not in self._waiting:
            heapq.heappop(self._dues)

    def _receive(self, until: float) -> bool:
        """Take in one message. False if none comes before `until`."""
        parcel = self._link.receive(max(0.0, until - time.monotonic()))
        if parcel is None:
            return False
        header = parcel.header
        if not isinstance(header, Answer):
            return True  # No broker says this to a silo.
        waiting = self._waiting.pop(header.id, None)
        # An answer nobody waits for any more is a repeat, or came too late.
        if waiting is not None:
            self._early[header.id] = self._arrived(header, parcel, waiting.kind)
        return True

    def _arrived(self, header: Answer, parcel: Parcel, kind: str) -> Arrival | TrunklineError:
        if isinstance(header, Error):
            return error_in(header)
        try:
            tensors = decode_tensors(header.tensors, parcel.buffers(), boundary=f"answer to {kind}")
        except TrunklineError as error:
            return error
        self.traffic.count(f"{kind} down", parcel.size, tokens_of(tensors))
        return Arrival(header, tensors)

    def _check_deadline(self, number: int) -> None:
        """Raises `DeadlineError` if request `number` is late, or if there is none to wait for."""
        waiting = self._waiting.get(number, _Waiting("any request", 0.0))
        if waiting.due <= time.monotonic():
            self._waiting.pop(number, None)
            raise DeadlineError(
                f"no answer to {waiting.kind} (request {number}) in time",
                hint="Is the worker overloaded or stuck? See its log; --deadline allows more time.",
            )


def _opened(came: Arrival | TrunklineError) -> Arrival:
    if isinstance(came, TrunklineError):
        raise came
    return came


def unrecovered(loss: TrunklineError, what: str, failure: TrunklineError) -> TrunklineError:
    """An error of `failure`'s kind that tells of both: the `loss`, and `what` was tried after it in vain."""
    return type(failure)(f"{loss.what}; {what}: {failure.what}", hint=failure.hint, side=failure.at)


def expect(arrival: Arrival, tensors: int) -> list[Tensor]:
    """The arrival's tensors. Raises `ProtocolError` unless there are exactly `tensors`."""
    if len(arrival.tensors) != tensors:
        raise ProtocolError(f"{len(arrival.tensors)} tensors came, {tensors} were asked for", side="worker")
    return arrival.tensors
