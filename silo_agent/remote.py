"""The trunk, seen from a silo: requests out, answers in, each with a deadline.

Requests are numbered; answers may come in any order. Used from one thread.
"""

import contextlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import msgspec
from torch import Tensor

from broker.link import Link
from broker.parcel import Parcel
from codec.errors import (
    DeadlineError,
    FrameError,
    ProtocolError,
    TrunklineError,
    UnavailableError,
    from_code,
)
from codec.frames import check_specs
from codec.masks import encode_mask
from codec.messages import Answer, Attach, Error, OpenRun, OpenSession, Request, Wire
from codec.tensors import decode_tensors, encode_tensors

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
        self._early: dict[int, Arrival] = {}
        self.traffic = Traffic()

    def submit(
        self,
        request: Request,
        tensors: Sequence[Tensor] = (),
        *,
        wire: Wire = "exact",
        step: float = 0.0,
        stochastic: bool = False,
        mask: Tensor | None = None,
        deadline: float | None = None,
    ) -> int:
        """Send a request and return its number; nothing is awaited. A `mask` never crosses dense.

        Raises `FrameError` if a tensor cannot cross or is too large, and the link's error if that
        has failed.
        """
        number = next(self._ids)
        kind = str(type(request).__struct_config__.tag)
        specs, frames = (
            encode_tensors(tensors, wire, kind, step=step, stochastic=stochastic) if tensors else ((), [])
        )
        fields: dict[str, object] = {"id": number, "tensors": specs}
        try:
            # A broker drops the connection of who sends more than this.
            check_specs(specs, [memoryview(frame).nbytes for frame in frames])
        except FrameError as error:
            hint = "Send fewer tokens at once: lower --batch or --max-length."
            raise FrameError(f"{kind}: {error.what}", hint=hint) from None
        if mask is not None:
            fields["mask"], packed = encode_mask(mask.cpu().numpy())
            frames = [*frames, packed]
        parcel = Parcel.of(msgspec.structs.replace(request, **fields), frames)
        self.traffic.count(f"{kind} up", parcel.size, _tokens(tensors))
        self._waiting[number] = _Waiting(kind, time.monotonic() + (deadline or self._deadline))
        self._link.send(parcel)
        return number

    def take(self, *, block: bool = True) -> Arrival | None:
        """The next answer to any request; None if `block` is false and none is there.

        Raises the error a worker or broker answered with, `DeadlineError` for a request whose time
        is up, and the link's error.
        """
        if self._early:
            return self._early.pop(next(iter(self._early)))
        return self._next(block)

    def _next(self, block: bool) -> Arrival | None:
        while True:
            due = min((w.due for w in self._waiting.values()), default=time.monotonic())
            parcel = self._link.receive(max(0.0, due - time.monotonic()) if block else 0.0)
            if parcel is None:
                if block:
                    self._check_deadlines()
                    continue
                return None
            if (arrival := self._arrived(parcel)) is not None:
                return arrival

    def call(
        self,
        request: Request,
        tensors: Sequence[Tensor] = (),
        *,
        wire: Wire = "exact",
        step: float = 0.0,
        mask: Tensor | None = None,
        deadline: float | None = None,
    ) -> Arrival:
        """Send a request and wait for its answer; others that come first are kept for `take`.

        Raises as `take` does.
        """
        number = self.submit(request, tensors, wire=wire, step=step, mask=mask, deadline=deadline)
        while True:
            arrival = self._next(block=True)
            assert arrival is not None
            if arrival.header.id == number:
                return arrival
            self._early[arrival.header.id] = arrival

    def tell(self, request: Request) -> None:
        """Send a request whose answer nobody awaits: not even that it failed is heard of."""
        with contextlib.suppress(TrunklineError):
            del self._waiting[self.submit(request)]

    def open(self, request: OpenSession | OpenRun, tensors: Sequence[Tensor], *, wait: float) -> Arrival:
        """Open a session or run, asking again for `wait` seconds while no worker is attached."""
        until = time.monotonic() + wait
        while True:
            try:
                return self.call(request, tensors)
            except UnavailableError:
                if time.monotonic() + _RETRY_S > until:
                    raise
                time.sleep(_RETRY_S)

    def close(self) -> None:
        """Close the link."""
        self._link.close()

    def _arrived(self, parcel: Parcel) -> Arrival | None:
        header = parcel.header
        waiting = self._waiting.pop(header.id, None)
        if waiting is None or not isinstance(header, Answer):
            return None  # An answer nobody waits for any more: a repeat, or too late.
        if isinstance(header, Error):
            raise from_code(header.code, header.what, header.hint, header.side)
        tensors = decode_tensors(header.tensors, parcel.buffers(), boundary=f"answer to {waiting.kind}")
        self.traffic.count(f"{waiting.kind} down", parcel.size, _tokens(tensors))
        return Arrival(header, tensors)

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        late = [(n, w) for n, w in self._waiting.items() if w.due <= now]
        if late or not self._waiting:
            number, waiting = late[0] if late else (0, _Waiting("any request", now))
            self._waiting.pop(number, None)
            raise DeadlineError(
                f"no answer to {waiting.kind} (request {number}) in time",
                hint="Is the worker overloaded or stuck? See its log; --deadline allows more time.",
            )


def expect(arrival: Arrival, tensors: int) -> list[Tensor]:
    """The arrival's tensors. Raises `ProtocolError` unless there are exactly `tensors`."""
    if len(arrival.tensors) != tensors:
        raise ProtocolError(f"{len(arrival.tensors)} tensors came, {tensors} were asked for", side="worker")
    return arrival.tensors


def _tokens(tensors: Sequence[Tensor]) -> int:
    return tensors[0].shape[0] if len(tensors) == 1 and tensors[0].dim() == 2 else 0
