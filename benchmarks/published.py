"""The published way of working, as replay silos on our own stack: real frames, real broker.

R1, as published: one client at a time and in lockstep, frames padded to a fixed length, three round
trips a training step, two a generated token, KV caches. R0, the older way: no KV cache, and the whole
sequence and a dense mask cross for every token. Written for this comparison.
"""

from collections.abc import Iterable

from benchmarks.replay import (
    Crossing,
    Generation,
    Replayed,
    Training,
    Trunk,
    check_result,
    numbered,
    open_session,
)
from broker.parcel import Parcel
from codec.messages import Answer, Result
from codec.plan import LoraPlan

_ASIDE = "aside"
_TRIP = "trip"
"""Opened anew, and with that emptied, for every round trip that carries nothing."""


class _Asides:
    """Dense masks that go beside requests, and which answers are theirs alone."""

    def __init__(self, trunk: Trunk) -> None:
        self._trunk = trunk
        self._numbers: set[int] = set()

    def mask(self, mask: Crossing, number: int) -> Parcel:
        """The mask, which our protocol has no place for, as the one tensor of a session nobody uses.

        It is sent ahead of the request it belongs to and not waited for: it costs its bytes, no round trip.
        """
        self._numbers.add(number)
        return numbered(open_session(self._trunk, _ASIDE, 1, LoraPlan(), ("mask",)), number, [mask])

    def answered(self, header: Answer) -> bool:
        """Whether this is the answer to a mask."""
        ours = header.id in self._numbers
        self._numbers.discard(header.id)
        return ours


class MaskedTraining(Training):
    """Training in which a dense mask crosses with every micro-batch."""

    def __init__(
        self,
        trunk: Trunk,
        run: str,
        silos: int,
        batches: Iterable[Replayed],
        *,
        window: int,
        accumulate: int,
        mask: Crossing,
    ) -> None:
        """`mask` is what crosses; the rest is `Training`'s."""
        super().__init__(trunk, run, silos, batches, window=window, accumulate=accumulate)
        self._mask = mask
        self._asides = _Asides(trunk)

    def answered(self, header: Answer) -> list[Parcel]:
        """See `Replay.answered`."""
        if self._asides.answered(header):
            return []
        return super().answered(header)

    def _forward(self, number: int, batch: Replayed) -> list[Parcel]:
        mask = self._asides.mask(self._mask, next(self._ids))
        return [mask, *super()._forward(number, batch)]


class PublishedGeneration(Generation):
    """A session that decodes as was published.

    With `cached`, a prompt and then single tokens; without, the whole sequence for each, and each counts
    at once. `masks` cross with the sequence and with a single token. Each token takes `trips` round
    trips, all but the first of them empty.
    """

    def __init__(
        self,
        trunk: Trunk,
        prompt: Crossing,
        token: Crossing,
        new: int,
        *,
        cached: bool,
        masks: tuple[Crossing, Crossing] | None,
        trips: int,
    ) -> None:
        super().__init__(trunk, prompt, token, new)
        self._cached, self._masks, self._trips = cached, masks, trips
        self._empty_trips = 0
        self._asides = _Asides(trunk)

    def answered(self, header: Answer) -> list[Parcel]:
        """See `Replay.answered`."""
        if self._asides.answered(header):
            return []
        if self._empty_trips:
            self._empty_trips -= 1
        elif isinstance(header, Result):
            check_result(header, self._sent.tokens, self._trunk.card.hidden)
            self._advance()
            self._empty_trips = self._trips - 1
        return [self._parcel(open_session(self._trunk, _TRIP, 1))] if self._empty_trips else self._step()

    def _advance(self) -> None:
        if self._cached:
            super()._advance()
        else:
            self.tokens += 1

    def _step(self) -> list[Parcel]:
        step = super()._step()
        if self._masks is None:
            return step
        return [self._asides.mask(self._masks[bool(self._made)], next(self._ids)), *step]
