"""What a silo's or worker's link decides: when to attach, to beat, to go elsewhere. No sockets."""

from collections.abc import Sequence
from dataclasses import dataclass

from broker.failover import Connect, Failover
from broker.handshake import Failure
from broker.keys import LinkKeys
from broker.parcel import Parcel, error_in, error_parcel
from broker.pulse import is_gone
from broker.speed import SpeedMeter
from codec.errors import LinkError, RefusedError, TrunklineError, UnavailableError
from codec.messages import (
    ENCODINGS,
    Answer,
    AnyHeader,
    Attach,
    Drain,
    Encodings,
    Error,
    Gone,
    Heartbeat,
    Request,
    Welcome,
)

_RESTARTED = "the broker was restarted, or heard nothing from here for too long"
_BROKEN = "the connection to the broker broke"
_MOVED = "the broker is lost, and another one is tried"


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


Action = Transmit | Deliver | Fail | Connect


class LinkState:
    """Attach, and attach again after every loss, until no broker answered for `patience` seconds.

    Of several brokers one is used at a time (`broker.failover`).
    """

    RETRY = 0.5
    SILENCE = 10.0
    """Seconds without a message after which the broker's program hangs (`broker.pulse.is_gone`)."""
    CUT = 1.5
    """Seconds of nothing but handshakes that are cut off, after which it is the broker's key."""

    def __init__(
        self,
        attach: Attach,
        endpoints: Sequence[str],
        patience: float,
        now: float,
        keys: LinkKeys | None = None,
    ) -> None:
        self.attached = False
        self.encodings: Encodings = ENCODINGS
        """What the broker said that workers read."""
        self.meter = SpeedMeter()
        self._known = False
        self._attach = attach
        self._failover = Failover(endpoints, patience, now)
        self._keys = keys
        self._cut = (now, now)
        self._heard = self._felt = now
        self._sent = float("-inf")
        self._heartbeat = 1.0
        self._waiting: dict[int, None] = {}
        self._draining = False

    def arrived(self, parcel: Parcel, now: float) -> list[Action]:
        """A message came from the broker."""
        self._heard = self._felt = now
        header = parcel.header
        if isinstance(header, Welcome):
            again = self._known and not self.attached
            self.attached = self._known = True
            self._failover.welcomed()
            self._heartbeat = header.heartbeat
            self.encodings = header.encodings
            self.unsent()  # The next tick beats at once: it measures the round trip.
            drain: list[Action] = [Transmit(Drain())] if self._draining and not header.resumed else []
            return drain + (self._forgotten(_RESTARTED) if again and not header.resumed else [])
        if isinstance(header, Heartbeat):
            self.meter.echoed(header.id, now)
            return []
        if isinstance(header, Error) and header.id == 0:
            if header.code == LinkError.code:
                return self._lose(now)
            return self._refused(error_in(header), now)
        if isinstance(header, Answer):
            if header.id not in self._waiting:
                return []  # It came late: its request failed with a connection that broke.
            del self._waiting[header.id]
        return [Deliver(parcel)]

    def unshaken(self, failure: Failure, now: float) -> list[Action]:
        """The connection to the broker, or an attempt at one, failed."""
        endpoint = self._failover.endpoint
        if failure == "broken":
            return [*self._lose(now), *self._unanswered(_BROKEN)]
        if failure == "unreachable" and not self.attached:
            self._failover.useless(now)
            return []
        if failure == "refused" and self._keys is not None:
            return self._refused(_not_allowed(endpoint, self._keys), now)
        if failure == "mechanism":
            return self._refused(_other_mechanism(endpoint, self._attach, self._keys), now)
        # A broker that ends cuts a handshake off too; one that could be attached to has the right key.
        if failure == "cut" and self._keys is not None and not self._known:
            first, last = self._cut
            self._cut = (first if now - last < self.CUT else now, now)
            if now - self._cut[0] >= self.CUT:
                return self._refused(_wrong_broker_key(endpoint, self._attach), now)
        return []

    def felt(self, now: float) -> None:
        """At `now` bytes came from the broker, perhaps no message yet."""
        self._felt = now

    def elsewhere(self, now: float) -> list[Action]:
        """The broker has nobody who could serve; another may. Without another nothing changes."""
        if self.attached and self._failover.unserved(now):
            self.attached = False
            return self.tick(now)
        return []

    def sent(self, header: AnyHeader, size: int, now: float) -> list[Action]:
        """A message of the owner left, with `size` bytes of tensors."""
        if isinstance(header, Request):
            self._waiting[header.id] = None
        self._draining |= isinstance(header, Drain)  # Each broker that does not know it is told.
        return [self._beat(now)] if self.meter.sent(size, now) else []

    def unsent(self) -> None:
        """A `Transmit` could not leave: it, or a heartbeat, is sent at the next tick."""
        self._sent = float("-inf")

    def tick(self, now: float) -> list[Action]:
        """Time passed. Call at least every `RETRY` seconds."""
        if self.attached and is_gone(now - self._heard, now - self._felt, self._heartbeat, self.SILENCE):
            self._failover.useless(now)
            return self._lose(now)
        if not self.attached:
            due = self._failover.tick(now)
            if isinstance(due, Connect):
                return self._moved(due, now)
            if due is not None:
                return [Fail(due)]
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
        self.attached = False
        self._failover.lost(now)
        self.meter.forget()
        return self._knock(now)

    def _refused(self, error: TrunklineError, now: float) -> list[Action]:
        """This broker will not serve, now or later."""
        self.attached = False
        self._failover.useless(now, error)
        return [Fail(error)] if self._failover.alone else []

    def _moved(self, to: Connect, now: float) -> list[Action]:
        """Another broker is tried, which knows nothing of what was asked of the last one."""
        self._known, self._cut = False, (now, now)
        self.meter.forget()
        self.unsent()  # The next tick attaches.
        return [to, *self._forgotten(_MOVED)]

    def _knock(self, now: float) -> list[Action]:
        self._sent = now
        return [Transmit(self._attach)]

    def _forgotten(self, why: str) -> list[Action]:
        """The broker knows nothing of this peer: no answer will come, and no silo's names are left."""
        everyone = [Deliver(Parcel.of(Gone(name="every silo")))] if self._attach.role == "worker" else []
        return [*self._unanswered(why), *everyone]

    def _unanswered(self, why: str) -> list[Action]:
        """What waits for an answer that may have been lost, or its request: nobody else knows of it."""
        error = UnavailableError(f"{why}: the answer is lost", side="broker", hint="Repeat the command.")
        lost: list[Action] = [Deliver(error_parcel(number, error)) for number in self._waiting]
        self._waiting.clear()
        return lost


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
