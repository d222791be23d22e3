"""What the broker keeps of one silo: the names it opened, and its requests without an answer."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from codec.messages import CloseSession, Extend, OpenRun, OpenSession, Request


@dataclass(slots=True, eq=False)
class Hold:
    """A session or run that a silo has at `worker`.

    `sure` once the worker said that it is open; `lost` is the name of a worker that left with it.
    """

    worker: bytes
    sure: bool = False
    lost: str = ""


@dataclass(frozen=True, slots=True)
class Pending:
    """A request on its way: what it is about, its bytes, and its header if it opens a name."""

    hold: Hold
    size: int
    opens: OpenSession | OpenRun | None


@dataclass(slots=True)
class Silo:
    """Open sessions, joined runs, unanswered requests. `pending_bytes` is the sum of their sizes."""

    sessions: dict[str, Hold] = field(default_factory=dict)
    runs: dict[str, Hold] = field(default_factory=dict)
    pending: dict[int, Pending] = field(default_factory=dict)
    pending_bytes: int = 0

    def names(self, header: Request) -> tuple[dict[str, Hold], str]:
        """Where this request's name is kept, and the name."""
        if isinstance(header, OpenSession | Extend | CloseSession):
            return self.sessions, header.session
        return self.runs, header.run

    def holds(self) -> Iterator[Hold]:
        """Everything this silo has at a worker that is still there."""
        for names in (self.sessions, self.runs):
            yield from (hold for hold in names.values() if not hold.lost)

    def add(self, number: int, pending: Pending) -> None:
        """A request went out."""
        self.pending[number] = pending
        self.pending_bytes += pending.size

    def take(self, number: int, worker: bytes) -> Pending | None:
        """The request that `worker` answers now; None if it has no such request to answer."""
        pending = self.pending.get(number)
        if pending is None or pending.hold.worker != worker:
            return None
        self.pending_bytes -= pending.size
        return self.pending.pop(number)

    def opening(self, hold: Hold) -> bool:
        """Whether a request that may still open this name is on its way."""
        return any(pending.opens and pending.hold is hold for pending in self.pending.values())
