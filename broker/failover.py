"""Which of several brokers a link uses: one at a time, in the order given, round and round. No sockets."""

from collections.abc import Sequence
from dataclasses import dataclass

from broker.endpoint import no_answer
from codec.errors import TrunklineError


@dataclass(frozen=True, slots=True)
class Connect:
    """Leave the broker that was used, and use the one at this endpoint."""

    endpoint: str


class Failover:
    """Stays with a broker that serves. One that is lost has `TRY` seconds to be there again before the
    next is tried, one that refuses none. Without any for `patience` seconds it is over."""

    TRY = 2.0
    RETRY = 0.5
    """Seconds before the same broker is tried again."""

    def __init__(self, endpoints: Sequence[str], patience: float, now: float) -> None:
        self._endpoints = tuple(endpoints)
        self._patience = patience
        self._at = 0
        self._tried = {0: now}
        self._lost_since: float | None = now
        self._leave = now + self.TRY
        self._refusals: dict[int, TrunklineError] = {}

    @property
    def endpoint(self) -> str:
        """The broker that is used, or tried, now."""
        return self._endpoints[self._at]

    @property
    def alone(self) -> bool:
        """Whether there is no other broker to go to."""
        return len(self._endpoints) == 1

    def welcomed(self) -> None:
        """The broker serves."""
        self._lost_since = None
        self._refusals.clear()

    def lost(self, now: float) -> None:
        """The broker that served is lost; it may be back at once."""
        if self._lost_since is None:
            self._lost_since, self._leave = now, now + self.TRY

    def useless(self, now: float, refusal: TrunklineError | None = None) -> None:
        """The broker is not to be waited for; with a `refusal` it will not serve later either."""
        self.lost(now)
        self._leave = min(self._leave, now)
        if refusal is not None:
            self._refusals[self._at] = refusal

    def unserved(self, now: float) -> bool:
        """The broker has nobody who could serve. Whether to leave it for another: not if there is none,
        nor if it was only just come to. Workers may be on their way to it."""
        if self.alone or now - self._tried[self._at] < self.TRY:
            return False
        self.useless(now)
        return True

    def tick(self, now: float) -> Connect | TrunklineError | None:
        """What is due: to go on to another broker, or to give up. Call at least every `RETRY` seconds."""
        if self._lost_since is None:
            return None
        if len(self._refusals) == len(self._endpoints):
            return self._refusals[self._at]
        if now - self._lost_since > self._patience:
            return no_answer(self._endpoints, f"for {self._patience:g} s")
        following = (self._at + 1) % len(self._endpoints)
        if self.alone or now < max(self._leave, self._tried.get(following, float("-inf")) + self.RETRY):
            return None
        self._at = following
        self._tried[following] = now
        self._leave = now + self.TRY
        return Connect(self.endpoint)
