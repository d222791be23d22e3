"""Links and a broker, and a network that loses and delays: every request is answered once, or fails once.

The links' decisions and the router's are real. Between them are connections that keep order and can be
cut, with everything on its way; the broker can be killed and started again; time passes in jumps. What was
on its way when a connection broke fails at both ends; only an answer that the broker had put on a connection
that it alone knew to be gone is the owner's deadline to end.
"""

import secrets
from collections import Counter, deque
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker.failover import Connect
from broker.link_state import Action, Deliver, Fail, LinkState, Transmit
from broker.parcel import Parcel
from broker.router import Router, Send
from codec.messages import (
    Answer,
    AnyHeader,
    Attach,
    Done,
    Error,
    Extend,
    Gone,
    Heartbeat,
    Opened,
    OpenSession,
    Request,
    Welcome,
)
from codec.plan import ModelCard

CARD = ModelCard(name="m", fingerprint="f", blocks=6, hidden=4)


@dataclass(eq=False)
class End:
    """One peer: its link, the connection it has, and what passes there."""

    attach: Attach
    state: LinkState
    route: bytes = b""
    up: deque[Parcel] = field(default_factory=deque)
    down: deque[Parcel] = field(default_factory=deque)
    outbox: deque[Parcel] = field(default_factory=deque)

    def says(self, parcel: Parcel) -> None:
        """Its owner sends something."""
        self.outbox.append(parcel)


class Mending(RuleBasedStateMachine):
    """A silo and a worker at one broker."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.router = Router()
        attaches = (
            Attach(role="silo", name="s", peer=bytes(16)),
            Attach(role="worker", name="w", peer=bytes([1]) * 16, model=CARD, start=0, stop=6, credit=2),
        )
        self.silo, self.worker = (End(a, LinkState(a, ["tcp://x"], 1e9, 0.0)) for a in attaches)
        self.ends = [self.silo, self.worker]
        for end in self.ends:
            self.connect(end)
        self.number = 0
        self.left: set[int] = set()
        """Requests that left the silo."""
        self.lost: set[int] = set()
        """Requests that were on their way, or whose answers were, when a connection was cut."""
        self.answered = Counter[int]()
        self.held: set[str] = set()
        """The worker's sessions."""
        self.open = False
        """Whether the silo takes its session for open."""

    # What happens.

    @rule(really=st.sampled_from([True, True, False]))
    def ask(self, really: bool) -> None:
        self.number += 1
        if self.open and really:
            header: AnyHeader = Extend(id=self.number, session="a", rows=(0,), starts=(0,), lengths=(1,))
        else:
            header = OpenSession(id=self.number, session="a", model=CARD, start=0, stop=6, rows=1, capacity=8)
        self.silo.says(Parcel.of(header))

    @rule(seconds=st.sampled_from([0.1, 0.6, 1.1, 6.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.deliver(self.router.tick(self.now))

    @rule(who=st.integers(0, 1))
    def link_turns(self, who: int) -> None:
        end = self.ends[who]
        self.act(end, end.state.tick(self.now))
        while end.state.attached and end.outbox:
            parcel = end.outbox.popleft()
            end.up.append(parcel)
            if end is self.silo:
                self.left.add(parcel.header.id)
            self.act(end, end.state.sent(parcel.header, parcel.size, self.now))

    @rule(who=st.integers(0, 1), many=st.integers(1, 4))
    def broker_reads(self, who: int, many: int) -> None:
        end = self.ends[who]
        for _ in range(min(many, len(end.up))):
            self.deliver(self.router.handle(end.route, end.up.popleft(), self.now))

    @rule(who=st.integers(0, 1), many=st.integers(1, 4))
    def link_reads(self, who: int, many: int) -> None:
        end = self.ends[who]
        for _ in range(min(many, len(end.down))):
            self.act(end, end.state.arrived(end.down.popleft(), self.now))

    @rule(seconds=st.sampled_from([0.0, 0.6, 1.1]), stage=st.integers(0, 3), rounds=st.integers(1, 4))
    def everything_moves(self, seconds: float, stage: int, rounds: int) -> None:
        """Some rounds of links and broker, the last of which ends somewhere in its middle."""
        steps = (self.link_turns, self.broker_reads, self.link_reads)
        for at in range(3 * rounds - stage):
            if at % 3 == 0:
                self.time_passes(seconds)
            for who in (0, 1):
                step = steps[at % 3]
                step(who) if at % 3 == 0 else step(who, 1000)  # type: ignore[call-arg]

    @rule(who=st.integers(0, 1), really=st.sampled_from([False, False, True]))
    def connection_is_cut(self, who: int, really: bool) -> None:
        if really:
            end = self.ends[who]
            self.connect(end)
            self.act(end, end.state.unshaken("broken", self.now))

    @rule(really=st.sampled_from([False, False, True]))
    def broker_is_killed(self, really: bool) -> None:
        if really:
            self.router = Router()
            for end in self.ends:
                self.connect(end)

    @rule(who=st.integers(0, 1), ask=st.booleans())
    def broker_is_killed_and_its_welcome_is_lost(self, who: int, ask: bool) -> None:
        """The link beats, hears that it is not attached, attaches, and is cut off with the welcome."""
        if ask:
            self.everything_moves(0.6, 0, 3)
            self.ask(True)
            self.everything_moves(0.6, 0, 1)  # The worker has it, and its answer has not left.
        self.broker_is_killed(True)
        self.time_passes(1.1)
        self.link_turns(who)
        self.broker_reads(who, 1000)
        self.link_reads(who, 1000)
        self.broker_reads(who, 1000)
        self.connection_is_cut(who, True)

    def teardown(self) -> None:
        """With the network as it should be, whatever waits is answered within a few seconds."""
        if not hasattr(self, "ends"):
            return
        for _ in range(60):
            self.now += 0.3
            self.deliver(self.router.tick(self.now))
            for who in (0, 1):
                self.link_turns(who)
                self.broker_reads(who, 1000)
                self.link_reads(who, 1000)
        assert all(end.state.attached for end in self.ends)
        assert not self.silo.outbox
        missing = self.left - self.answered.keys()
        assert not missing, "neither answered, nor failed, nor lost with a connection"
        state = next(iter(self.router.registry.silos.values()))
        inbox = next(iter(self.router.registry.workers.values())).inbox
        assert state.pending.keys() <= self.lost
        assert state.account.requests == len(state.pending)
        assert not inbox.waiting
        assert inbox.tokens_under_way <= sum(ask.tokens for ask in inbox)
        if not self.lost:
            assert (state.pending, list(inbox), inbox.tokens_under_way) == ({}, [], 0)

    # What holds.

    @invariant()
    def nothing_is_answered_twice_or_unasked(self) -> None:
        if hasattr(self, "answered"):
            assert self.answered.keys() <= self.left
            assert all(number == 1 for number in self.answered.values())

    @invariant()
    def the_worker_holds_nothing_that_no_broker_knows_of(self) -> None:
        """Once it is attached, and has heard what it was told."""
        if not hasattr(self, "ends") or not self.worker.state.attached or self.worker.down or self.worker.up:
            return
        known = self.router.registry.workers
        if self.worker.route in self.router.peers and not any(
            w.inbox.waiting or list(w.inbox) for w in known.values()
        ):
            sessions = {name for s in self.router.registry.silos.values() for name in s.sessions}
            assert self.held <= sessions or self.lost

    # How it is driven.

    def connect(self, end: End) -> None:
        for parcel in (*end.up, *end.down):
            if isinstance(parcel.header, Request | Answer | Gone):
                self.lost.add(parcel.header.id)
        end.up.clear()
        end.down.clear()
        end.route = secrets.token_bytes(8)

    def deliver(self, sends: list[Send]) -> None:
        for send in sends:
            end = next((end for end in self.ends if end.route == send.route), None)
            if end is not None:
                end.down.append(send.parcel)
            else:
                # As the socket does: it tells that nobody is there any more.
                self.lost.add(send.parcel.header.id)
                self.deliver(self.router.lost(send.route))

    def act(self, end: End, actions: list[Action]) -> None:
        for action in actions:
            assert not isinstance(action, Fail | Connect)
            if isinstance(action, Transmit):
                end.up.append(Parcel.of(action.header))
            elif isinstance(action, Deliver):
                self.owner(end, action.parcel)

    def owner(self, end: End, parcel: Parcel) -> None:
        header = parcel.header
        assert not isinstance(header, Welcome | Heartbeat)
        if end is self.silo:
            self.answered[header.id] += 1
            self.open = isinstance(header, Opened | Done) or (self.open and not isinstance(header, Error))
            return
        if isinstance(header, Gone):
            self.held.clear()
            return
        assert isinstance(header, Request)
        if isinstance(header, OpenSession):
            self.held.add(header.session)
            answer: AnyHeader = Opened(id=header.id)
        elif self.held:
            answer = Done(id=header.id)
        else:
            answer = Error(id=header.id, code="unknown-name", what="no", side="silo")
        self.worker.says(Parcel.of(answer, peer=parcel.peer))


Mending.TestCase.settings = settings(max_examples=200, stateful_step_count=50)
TestMending = Mending.TestCase
