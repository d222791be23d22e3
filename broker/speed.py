"""How fast a link is, from the heartbeats that follow large messages. No sockets, no clock.

A heartbeat sent right behind a message reaches the broker when the message has, and its echo tells
when that was. As in BBR (Cardwell et al., ACM Queue 14(5), 2016) the round trip is the least and the
rate the greatest of the recent samples: waiting makes a link look slower more often than faster.
"""

import math
from collections import deque
from dataclasses import dataclass

_ROUND_TRIPS = 30
_RATES = 8
_SURE_S = 5e-4
"""What lies below is jitter: a message that took less says only that the rate is at least this good,
and only a large one says so at all."""
_TELLING = 65536


@dataclass(frozen=True, slots=True)
class Speed:
    """A link's round trip in seconds, and its rate towards the broker in bytes per second.

    The rate is infinite where nothing was large enough to measure it.
    """

    rtt: float
    rate: float


class SpeedMeter:
    """Times heartbeats against the bytes that went before them."""

    CHASE = 8192
    """Bytes of a message that is worth a heartbeat of its own."""

    def __init__(self) -> None:
        self._round_trips: deque[float] = deque(maxlen=_ROUND_TRIPS)
        self._rates: deque[tuple[float, bool]] = deque(maxlen=_RATES)
        self._number = 0
        self.forget()

    def forget(self) -> None:
        """The connection was lost: nothing that is under way will be echoed."""
        self._bytes, self._since = 0, 0.0
        self._light: dict[int, float] = {}
        self._chase = (0, 0, 0.0)

    @property
    def speed(self) -> Speed | None:
        """What is known; None before a large message was timed."""
        if not self._rates or not self._round_trips:
            return None
        # A delay may make one message look slow; others that took no time at all give it the lie.
        best, measured = max(self._rates)
        return Speed(min(self._round_trips), best if measured else math.inf)

    def sent(self, size: int, now: float) -> bool:
        """A message of `size` bytes was handed to the socket; whether to send a heartbeat behind it."""
        # One at a time. Small ones are not added up: the pauses between them are not the line's.
        if size < self.CHASE or self._chase[0]:
            return False
        self._bytes, self._since = size, now
        return True

    def beat(self, now: float) -> int:
        """The number for a heartbeat that is sent now."""
        self._number += 1
        if self._bytes:
            self._chase = (self._number, self._bytes, self._since)
            self._bytes = 0
        elif not self._chase[0]:
            # Nothing large of ours is in its way: it measures the round trip.
            self._light = {self._number: now}
        return self._number

    def echoed(self, number: int, now: float) -> None:
        """The broker answered heartbeat `number`; one that is not known is passed over."""
        if (begun := self._light.pop(number, None)) is not None:
            self._round_trips.append(now - begun)
        elif number and number == self._chase[0]:
            _, size, since = self._chase
            self._chase = (0, 0, 0.0)
            took = now - since - min(self._round_trips, default=math.inf)
            if took > _SURE_S:
                self._rates.append((size / took, True))
            elif size >= _TELLING and self._round_trips:
                self._rates.append((size / _SURE_S, False))
        elif number > self._chase[0]:
            self._chase = (0, 0, 0.0)  # Echoes keep their order: the chase never left.
