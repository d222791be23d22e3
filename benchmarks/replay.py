"""Replay silos: what they send and when, as decisions without sockets or tensors.

A replay silo sends boundary tensors that were encoded beforehand and only checks that answers have the
right shape, so that the load costs no model compute and next to no codec compute. Nothing here needs
torch: a process full of replay silos starts at once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, cycle
from typing import Protocol

import msgspec

from broker.parcel import Parcel
from codec.errors import ProtocolError
from codec.messages import (
    Answer,
    Backward,
    Commit,
    Committed,
    Extend,
    Forward,
    Opened,
    OpenRun,
    OpenSession,
    Request,
    Result,
    TensorSpec,
    Wire,
)
from codec.partition import Span
from codec.plan import LoraPlan, ModelCard, RunPlan

_SESSION = "replay"


@dataclass(frozen=True, slots=True)
class Crossing:
    """A tensor `[tokens, hidden]`, encoded."""

    spec: TensorSpec
    frame: bytes

    @property
    def tokens(self) -> int:
        """Its rows."""
        return self.spec.shape[0]


@dataclass(frozen=True, slots=True)
class Replayed:
    """A micro-batch: its lengths, what goes up and the gradient that follows.

    `useful` are the tokens that count; the others are padding.
    """

    lengths: tuple[int, ...]
    sent: Crossing
    gradient: Crossing
    useful: int


@dataclass(frozen=True, slots=True)
class Trunk:
    """What a silo asks for: blocks of a model, and the wire of the answers."""

    card: ModelCard
    blocks: Span
    wire: Wire


class Replay(Protocol):
    """One silo. `tokens` have been served so far; each answer causes the next messages."""

    tokens: int

    def opening(self) -> Parcel:
        """The first message; it may be sent again."""

    def answered(self, header: Answer) -> list[Parcel]:
        """An answer came, and it is no error: what to send now. Raises `ProtocolError` for a wrong one."""


class Training:
    """Forward, then backward for each answer, `window` micro-batches in flight; a commit ends a step.

    Tokens count once their step is committed.
    """

    def __init__(
        self, trunk: Trunk, run: str, silos: int, batches: Iterable[Replayed], *, window: int, accumulate: int
    ) -> None:
        """`silos` take part in the run; a step has `accumulate` of the `batches`, which are repeated."""
        self.tokens = 0
        self._trunk, self._run = trunk, run
        # A rate at which random gradients change nothing, and steps without end.
        self._plan = RunPlan(silos=silos, steps=1 << 40, learning_rate=1e-9, schedule="constant")
        self._batches = cycle(batches)
        self._window, self._accumulate = window, accumulate
        self._ids, self._numbers = count(1), count()
        self._flights: dict[int, tuple[int, Replayed, bool]] = {}
        self._step = self._begun = self._useful = 0

    def opening(self) -> Parcel:
        """See `Replay.opening`."""
        card, blocks = self._trunk.card, self._trunk.blocks
        opening = OpenRun(run=self._run, model=card, start=blocks.start, stop=blocks.stop, plan=self._plan)
        return self._parcel(opening)

    def answered(self, header: Answer) -> list[Parcel]:
        """See `Replay.answered`."""
        if isinstance(header, Opened):
            return self._fill()
        if isinstance(header, Committed):
            self.tokens += self._useful
            self._step += 1
            self._begun = self._useful = 0
            return self._fill()
        number, batch, returning = self._flights.pop(header.id)
        check_result(header, batch.sent.tokens, self._trunk.card.hidden)
        if not returning:
            return [self._backward(number, batch)]
        self._useful += batch.useful
        if self._begun == self._accumulate and not self._flights:
            commit = Commit(run=self._run, step=self._step, loss_tokens=self._useful, square_norm=1.0)
            return [self._parcel(commit)]
        return self._fill()

    def _fill(self) -> list[Parcel]:
        parcels: list[Parcel] = []
        while self._begun < self._accumulate and len(self._flights) < self._window:
            self._begun += 1
            parcels += self._forward(next(self._numbers), next(self._batches))
        return parcels

    def _forward(self, number: int, batch: Replayed) -> list[Parcel]:
        wire = self._trunk.wire
        request = Forward(run=self._run, microbatch=number, lengths=batch.lengths, wire=wire)
        return [self._flying(request, batch.sent, (number, batch, False))]

    def _backward(self, number: int, batch: Replayed) -> Parcel:
        request = Backward(run=self._run, microbatch=number, wire=self._trunk.wire)
        return self._flying(request, batch.gradient, (number, batch, True))

    def _flying(self, request: Request, crossing: Crossing, flight: tuple[int, Replayed, bool]) -> Parcel:
        parcel = self._parcel(request, crossing)
        self._flights[parcel.header.id] = flight
        return parcel

    def _parcel(self, request: Request, *crossings: Crossing) -> Parcel:
        return numbered(request, next(self._ids), crossings)


class Generation:
    """One session: a prompt, then `new` tokens one by one; then the same again from the start.

    Tokens count once their answer is complete.
    """

    def __init__(self, trunk: Trunk, prompt: Crossing, token: Crossing, new: int) -> None:
        """`prompt` is sent whole, `token` is what each decode step sends."""
        self.tokens = 0
        self._trunk, self._prompt, self._token, self._new = trunk, prompt, token, new
        self._ids = count(1)
        self._made = 0
        """Passes of the present answer that are done, the prompt's first."""

    def opening(self) -> Parcel:
        """See `Replay.opening`."""
        opening = open_session(self._trunk, _SESSION, self._prompt.tokens + self._new)
        return self._parcel(opening)

    def answered(self, header: Answer) -> list[Parcel]:
        """See `Replay.answered`."""
        if not isinstance(header, Opened):
            check_result(header, self._sent.tokens, self._trunk.card.hidden)
            self._advance()
        return self._step()

    @property
    def _sent(self) -> Crossing:
        """What the present pass sends."""
        return self._token if self._made else self._prompt

    def _advance(self) -> None:
        self._made += 1
        if self._made > self._new:
            self.tokens += self._new
            self._made = 0

    def _step(self) -> list[Parcel]:
        start = self._prompt.tokens + self._made - 1 if self._made else 0
        lengths, wire = (self._sent.tokens,), self._trunk.wire
        request = Extend(session=_SESSION, rows=(0,), starts=(start,), lengths=lengths, wire=wire)
        return [self._parcel(request, self._sent)]

    def _parcel(self, request: Request, *crossings: Crossing) -> Parcel:
        return numbered(request, next(self._ids), crossings)


class Decoding(Generation):
    """One session: a prompt, then decode steps without end, each of which counts when it comes back.

    After `new` of them it rolls back to the prompt's end, so that its context stays about as long.
    """

    def _advance(self) -> None:
        self.tokens += bool(self._made)
        self._made = 1 + self.tokens % self._new


def open_session(
    trunk: Trunk, session: str, capacity: int, adapter: LoraPlan | None = None, names: tuple[str, ...] = ()
) -> OpenSession:
    """A session of one row over the trunk's blocks."""
    return OpenSession(
        session=session,
        model=trunk.card,
        start=trunk.blocks.start,
        stop=trunk.blocks.stop,
        rows=1,
        capacity=capacity,
        adapter=adapter,
        names=names,
    )


def numbered(request: Request, number: int, crossings: Sequence[Crossing] = ()) -> Parcel:
    """The request as a message with the tensors that follow it."""
    specs = tuple(crossing.spec for crossing in crossings)
    header = msgspec.structs.replace(request, id=number, tensors=specs)
    return Parcel.of(header, [crossing.frame for crossing in crossings])


def check_result(header: Answer, tokens: int, hidden: int) -> None:
    """Raises `ProtocolError` unless the answer is one tensor of this shape."""
    shapes = [spec.shape for spec in header.tensors]
    if not isinstance(header, Result) or shapes != [(tokens, hidden)]:
        raise ProtocolError(f"an answer of {shapes}, one of {tokens} by {hidden} was due", side="worker")
