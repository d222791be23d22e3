"""What one silo may have and do, and what it has. Decisions only.

With keys an account is a key's: all peers that attach with it share it. Without keys it is one attached
silo's, and who may open connections may open accounts.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from codec.errors import LimitError

if TYPE_CHECKING:
    from broker.silo import Silo

_MINUTE = 60.0
_ASK = "or ask the broker's operator for more"


@dataclass(frozen=True, slots=True)
class Limits:
    """Deadlines, and quotas of one silo.

    When a peer is gone follows from `heartbeat` and `silence` (`broker.pulse.is_gone`). `requests` and
    `bytes` of their tensors may wait for answers; `attaches` are in a minute.
    """

    heartbeat: float = 1.0
    silence: float = 10.0
    requests: int = 1024
    bytes: int = 1 << 30
    sessions: int = 1024
    runs: int = 64
    attaches: int = 600


@dataclass(slots=True, eq=False)
class Account:
    """Requests that workers have yet to answer, whether or not their silo is still there, their `bytes`,
    and the silos that hold sessions and runs."""

    requests: int = 0
    bytes: int = 0
    silos: "list[Silo]" = field(default_factory=list)

    def check_request(self, size: int, limits: Limits) -> None:
        """Raises `LimitError` if a request with `size` bytes of tensors would be too much."""
        if size > limits.bytes:
            raise LimitError(
                f"a request of {size} bytes, {limits.bytes} of a silo may wait for answers (--max-mib)",
                side="silo",
                hint=f"Use smaller micro-batches (--batch), {_ASK}.",
            )
        if self.requests >= limits.requests or self.bytes + size > limits.bytes:
            raise LimitError(
                f"{self.requests} requests ({self.bytes} bytes) of this silo wait for answers already; "
                f"{limits.requests} (--max-requests) and {limits.bytes} bytes (--max-mib) may",
                side="silo",
                hint=f"Keep fewer micro-batches in flight (--window), {_ASK}.",
            )

    def check_session(self, limits: Limits) -> None:
        """Raises `LimitError` if it has all the sessions that it may have."""
        _check("sessions", sum(len(silo.sessions) for silo in self.silos), limits.sessions)

    def check_run(self, limits: Limits) -> None:
        """Raises `LimitError` if it is in as many runs as it may be."""
        _check("runs", sum(len(silo.runs) for silo in self.silos), limits.runs)


def _check(what: str, open_now: int, most: int) -> None:
    if open_now >= most:
        raise LimitError(
            f"{open_now} {what} of this silo are open, {most} may be (--max-{what})",
            side="silo",
            hint=f"Close some first, {_ASK}.",
        )


class Attaches:
    """How often who attached: one token bucket for each key's name, or without keys for each connection."""

    def __init__(self) -> None:
        self._buckets: dict[str | bytes, tuple[float, float]] = {}

    def check(self, who: str | bytes, limits: Limits, now: float) -> None:
        """Count one. Raises `LimitError` if there were more in the last minute than may be."""
        left, since = self._buckets.get(who, (float(limits.attaches), now))
        left = min(limits.attaches, left + (now - since) * limits.attaches / _MINUTE)
        if left < 1:
            raise LimitError(
                f"{limits.attaches} attaches in the last minute, no more may be (--max-attaches)",
                side="silo",
                hint=f"Wait a minute, {_ASK}. Is a process started again and again?",
            )
        self._buckets[who] = left - 1, now

    def forget_full(self, now: float) -> None:
        """Who did not attach for a minute is as one who never did."""
        self._buckets = {who: b for who, b in self._buckets.items() if now - b[1] < _MINUTE}
