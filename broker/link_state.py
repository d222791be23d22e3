"""What a silo's or worker's link decides: when to attach, to beat, and to give up. No sockets."""

from dataclasses import dataclass

from broker.parcel import Parcel
from codec.errors import LinkError, TrunklineError, from_code
from codec.messages import AnyHeader, Attach, Error, Heartbeat, Welcome


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
        self._attach = attach
        self._endpoint = endpoint
        self._patience = patience
        self._lost_since = now
        self._heard = now
        self._sent = float("-inf")
        self._heartbeat = 1.0

    def arrived(self, parcel: Parcel, now: float) -> list[Action]:
        """A message came from the broker."""
        self._heard = now
        header = parcel.header
        if isinstance(header, Welcome):
            self.attached, self._heartbeat = True, header.heartbeat
            return []
        if isinstance(header, Heartbeat):
            return []
        if isinstance(header, Error) and header.id == 0:
            if header.code == LinkError.code:
                self._lose(now)
                return self._knock(now)
            return [Fail(from_code(header.code, header.what, header.hint, header.side))]
        return [Deliver(parcel)]

    def tick(self, now: float) -> list[Action]:
        """Time passed. Call at least every `RETRY` seconds."""
        if self.attached and now - self._heard > self.SILENCE:
            self._lose(now)
        if not self.attached:
            if now - self._lost_since > self._patience:
                return [Fail(self._unreachable())]
            return self._knock(now) if now - self._sent >= self.RETRY else []
        if now - self._sent >= self._heartbeat:
            self._sent = now
            return [Transmit(Heartbeat())]
        return []

    def _lose(self, now: float) -> None:
        if self.attached:
            self.attached, self._lost_since = False, now

    def _knock(self, now: float) -> list[Action]:
        self._sent = now
        return [Transmit(self._attach)]

    def _unreachable(self) -> LinkError:
        return LinkError(
            f"no broker answered at {self._endpoint} for {self._patience:g} s",
            hint=f"Start one (trunkline broker --listen {self._endpoint}), or check --broker.",
        )
