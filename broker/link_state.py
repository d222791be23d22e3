"""What a silo's or worker's link decides: when to attach, to beat, and to give up. No sockets."""

from dataclasses import dataclass

from broker.parcel import Parcel, error_parcel
from broker.speed import SpeedMeter
from codec.errors import LinkError, TrunklineError, UnavailableError, from_code
from codec.messages import (
    ENCODINGS,
    AnyHeader,
    Attach,
    Encodings,
    Error,
    Gone,
    Heartbeat,
    Request,
    Welcome,
)


@dataclass(frozen=True, slots=True)
class Transmit:
    """Send this header to the broker."""

    header: AnyHeader


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand this message to the link's owner."""

    parcel: Parcel


@dataclass(frozen=True, slots=True)
class Fail:
    """The link is over; tell the owner why."""

    error: TrunklineError


Action = Transmit | Deliver | Fail


class LinkState:
    """Attach, and attach again after every loss, until the broker was silent for `patience` seconds."""

    RETRY = 0.5
    SILENCE = 5.0

    def __init__(self, attach: Attach, endpoint: str, patience: float, now: float) -> None:
        self.attached = False
        self.encodings: Encodings = ENCODINGS
        """What the broker said that workers read."""
        self.meter = SpeedMeter()
        self._known = False
        self._attach = attach
        self._endpoint = endpoint
        self._patience = patience
        self._lost_since = now
        self._heard = now
        self._sent = float("-inf")
        self._heartbeat = 1.0
        self._waiting: dict[int, None] = {}

    def arrived(self, parcel: Parcel, now: float) -> list[Action]:
        """A message came from the broker."""
        self._heard = now
        header = parcel.header
        if isinstance(header, Welcome):
            forgotten = self._known and not self.attached and not header.resumed
            self.attached = self._known = True
            self._heartbeat = header.heartbeat
            self.encodings = header.encodings
            self.unsent()  # The next tick beats at once: it measures the round trip.
            return self._forgotten() if forgotten else []
        if isinstance(header, Heartbeat):
            self.meter.echoed(header.id, now)
            return []
        if isinstance(header, Error) and header.id == 0:
            if header.code == LinkError.code:
                return self._lose(now)
            return [Fail(from_code(header.code, header.what, header.hint, header.side))]
        self._waiting.pop(header.id, None)
        return [Deliver(parcel)]

    def sent(self, header: AnyHeader, size: int, now: float) -> list[Action]:
        """A message of the owner left, with `size` bytes of tensors."""
        if isinstance(header, Request):
            self._waiting[header.id] = None
        return [self._beat(now)] if self.meter.sent(size, now) else []

    def unsent(self) -> None:
        """A `Transmit` could not leave: it, or a heartbeat, is sent at the next tick."""
        self._sent = float("-inf")

    def tick(self, now: float) -> list[Action]:
        """Time passed. Call at least every `RETRY` seconds."""
        if self.attached and now - self._heard > max(self.SILENCE, 3 * self._heartbeat):
            return self._lose(now)
        if not self.attached:
            if now - self._lost_since > self._patience:
                return [Fail(self._unreachable())]
            return self._knock(now) if now - self._sent >= self.RETRY else []
        if now - self._sent >= self._heartbeat:
            self._sent = now
            return [self._beat(now)]
        return []

    def _beat(self, now: float) -> Transmit:
        return Transmit(Heartbeat(id=self.meter.beat(now)))

    def _lose(self, now: float) -> list[Action]:
        if not self.attached:
            return []  # The broker says it once per message; one attach is on its way already.
        self.attached, self._lost_since = False, now
        self.meter.forget()
        return self._knock(now)

    def _knock(self, now: float) -> list[Action]:
        self._sent = now
        return [Transmit(self._attach)]

    def _forgotten(self) -> list[Action]:
        """The broker knows nothing of this peer: no answer will come, and no silo's names are left."""
        error = UnavailableError(
            "the broker was restarted, or heard nothing from here for too long: the answer is lost",
            side="broker",
            hint="Repeat the command.",
        )
        lost = [Deliver(error_parcel(number, error)) for number in self._waiting]
        self._waiting.clear()
        everyone = Deliver(Parcel.of(Gone(name="every silo")))
        return [*lost, everyone] if self._attach.role == "worker" else [*lost]

    def _unreachable(self) -> LinkError:
        return LinkError(
            f"no broker answered at {self._endpoint} for {self._patience:g} s",
            hint=f"Start one (trunkline broker --listen {self._endpoint}), or check --broker.",
        )
