"""What a silo's or worker's link decides: when to attach, to beat, and to give up. No sockets."""

from collections.abc import Collection
from dataclasses import dataclass

from broker.handshake import Failure
from broker.keys import LinkKeys
from broker.parcel import Parcel, error_parcel
from broker.speed import SpeedMeter
from codec.errors import LinkError, RefusedError, TrunklineError, UnavailableError, from_code
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
    CUT = 1.5
    """Seconds of nothing but handshakes that are cut off, after which it is the broker's key."""

    def __init__(
        self, attach: Attach, endpoint: str, patience: float, now: float, keys: LinkKeys | None = None
    ) -> None:
        self.attached = False
        self.encodings: Encodings = ENCODINGS
        """What the broker said that workers read."""
        self.meter = SpeedMeter()
        self._known = False
        self._attach = attach
        self._endpoint = endpoint
        self._patience = patience
        self._keys = keys
        self._cut = (now, now)
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
            again = self._known and not self.attached
            self.attached = self._known = True
            self._heartbeat = header.heartbeat
            self.encodings = header.encodings
            self.unsent()  # The next tick beats at once: it measures the round trip.
            if not again:
                return []
            return self._interrupted(header.pending) if header.resumed else self._forgotten()
        if isinstance(header, Heartbeat):
            self.meter.echoed(header.id, now)
            return []
        if isinstance(header, Error) and header.id == 0:
            if header.code == LinkError.code:
                return self._lose(now)
            return [Fail(from_code(header.code, header.what, header.hint, header.side))]
        self._waiting.pop(header.id, None)
        return [Deliver(parcel)]

    def unshaken(self, failure: Failure, now: float) -> list[Action]:
        """A handshake with the broker failed."""
        if failure == "refused" and self._keys is not None:
            return [Fail(_not_allowed(self._endpoint, self._keys))]
        if failure == "mechanism":
            return [Fail(_other_mechanism(self._endpoint, self._attach, self._keys))]
        # A broker that ends cuts a handshake off too; one that could be attached to has the right key.
        if failure == "cut" and self._keys is not None and not self._known:
            first, last = self._cut
            self._cut = (first if now - last < self.CUT else now, now)
            if now - self._cut[0] >= self.CUT:
                return [Fail(_wrong_broker_key(self._endpoint, self._attach))]
        return []

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

    def _interrupted(self, pending: Collection[int]) -> list[Action]:
        """The connection broke: of what the broker does not wait for too, nobody will hear again."""
        error = UnavailableError(
            "the connection to the broker broke, and the request or its answer was lost with it",
            side="broker",
            hint="Repeat the command.",
        )
        return [self._lost(number, error) for number in list(self._waiting) if number not in pending]

    def _lost(self, number: int, error: TrunklineError) -> Action:
        del self._waiting[number]
        return Deliver(error_parcel(number, error))

    def _forgotten(self) -> list[Action]:
        """The broker knows nothing of this peer: no answer will come, and no silo's names are left."""
        error = UnavailableError(
            "the broker was restarted, or heard nothing from here for too long: the answer is lost",
            side="broker",
            hint="Repeat the command.",
        )
        lost = [self._lost(number, error) for number in list(self._waiting)]
        everyone = Deliver(Parcel.of(Gone(name="every silo")))
        return [*lost, everyone] if self._attach.role == "worker" else [*lost]

    def _unreachable(self) -> LinkError:
        return LinkError(
            f"no broker answered at {self._endpoint} for {self._patience:g} s",
            hint=f"Start one (trunkline broker --listen {self._endpoint}), or check --broker.",
        )


def _not_allowed(endpoint: str, keys: LinkKeys) -> RefusedError:
    own = keys.own.public
    return RefusedError(
        f"the broker at {endpoint} refused this key, {own.name!r}: it is not allowed there, or was revoked",
        hint=f"Ask its operator to run: trunkline keys allow '{own.key}' --role {own.role} --name {own.name}",
    )


def _other_mechanism(endpoint: str, attach: Attach, keys: LinkKeys | None) -> RefusedError:
    if keys is not None:
        return RefusedError(
            f"the broker at {endpoint} uses no keys",
            hint="Start it with --keys DIR, or leave out --key here.",
        )
    return RefusedError(
        f"the broker at {endpoint} lets in only who has a key",
        side=attach.role,
        hint="Give --key and --broker-key.",
    )


def _wrong_broker_key(endpoint: str, attach: Attach) -> RefusedError:
    return RefusedError(
        f"who listens at {endpoint} cuts every handshake off: it has not the key that --broker-key names",
        side=attach.role,
        hint="Its operator sees the right one with: trunkline keys list. Or it is no broker: check --broker.",
    )
