"""What the broker keeps of one silo: the names it opened, and its requests without an answer."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from broker.ask import Ask, Flow, RunKey
from broker.chain import Chain
from broker.parcel import Parcel
from broker.pool import Peer, Worker
from broker.quota import Account
from codec.errors import ProtocolError
from codec.messages import Role


@dataclass(slots=True, eq=False)
class Hold:
    """A session or run that a silo has at `worker`, or a session at the stages of `chain`.

    `sure` once the worker said that it is open; `lost` is the name of a worker that left with it.
    `members` are those of a run's plan.
    """

    flow: Flow
    worker: Worker
    chain: Chain | None = None
    sure: bool = False
    lost: str = ""
    members: tuple[str, ...] = ()

    @property
    def run(self) -> RunKey:
        """Which of all runs it is: one name may stand for several, of different members."""
        return self.members, self.flow[2]

    @property
    def workers(self) -> list[Worker]:
        """Everyone who has a part of it."""
        return [stage.worker for stage in self.chain.stages] if self.chain else [self.worker]


class Pending(Ask, eq=False, kw_only=True):
    """A request of `silo` about `hold`, until its answer; with a chain there is one more for each stage.

    `size` in bytes, `opens` if it opens a name, `parcel` is there until it is sent.
    """

    silo: "Silo"
    hold: Hold
    size: int = 0
    opens: bool = False
    parcel: Parcel | None = None
    charged: bool = False
    """Whether it counts against its silo's quotas."""

    def charge(self) -> None:
        """Count it against its silo's quotas, until it is settled."""
        self.charged = True
        self.silo.account.requests += 1
        self.silo.account.bytes += self.size

    def settle(self) -> None:
        """Nothing of it is on its way any more."""
        if self.charged:
            self.charged = False
            self.silo.account.requests -= 1
            self.silo.account.bytes -= self.size

    def leaves(self) -> Parcel:
        """The message, which is not kept."""
        assert self.parcel is not None
        parcel, self.parcel = self.parcel, None
        return parcel


@dataclass(slots=True, eq=False)
class Silo(Peer):
    """Open sessions, joined runs, unanswered requests; `account` is what its quotas are counted by."""

    role: ClassVar[Role] = "silo"

    sessions: dict[str, Hold] = field(default_factory=dict)
    runs: dict[str, Hold] = field(default_factory=dict)
    pending: dict[int, Pending] = field(default_factory=dict)
    account: Account = field(default_factory=Account)
    owed: set[int] = field(default_factory=set)
    """Numbers that a worker has yet to answer though nobody waits for it any more."""

    def check(self, number: int) -> None:
        """Raises `ProtocolError` for a number that cannot be used now."""
        if number == 0:
            raise ProtocolError("a request needs a number above 0")
        if number in self.pending or number in self.owed:
            raise ProtocolError(f"request {number} is already on its way")

    def names(self, flow: Flow) -> dict[str, Hold]:
        """Where the name of what this is about is kept."""
        return self.sessions if flow[1] == "session" else self.runs

    def holds(self) -> Iterator[Hold]:
        """Everything this silo has at workers that are still there."""
        for names in (self.sessions, self.runs):
            yield from (hold for hold in names.values() if not hold.lost)

    def has(self, hold: Hold) -> bool:
        """Whether this is what its name stands for."""
        return self.names(hold.flow).get(hold.flow[2]) is hold

    def forget(self, hold: Hold) -> None:
        """Its name is free again."""
        del self.names(hold.flow)[hold.flow[2]]

    def take(self, pending: Pending) -> bool:
        """Whether this is a request that still waits; it is answered now."""
        if self.pending.get(pending.number) is not pending:
            return False
        del self.pending[pending.number]
        pending.settle()
        return True

    def opening(self, hold: Hold) -> bool:
        """Whether a request that may still open this name is on its way."""
        return any(pending.opens and pending.hold is hold for pending in self.pending.values())
