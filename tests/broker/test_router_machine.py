"""Any interleaving of silos and workers: nothing lost, nothing twice, nothing left behind.

Workers are simulated as the trunk service behaves: in order, names per silo, a failing open leaves
what stood before, `gone` frees. When all is quiet, router and workers must agree on who has what.
"""

import secrets
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from broker.parcel import Parcel
from broker.pool import alias_of
from broker.router import Limits, Router, Send
from codec.messages import (
    Answer,
    AnyHeader,
    Attach,
    CloseRun,
    CloseSession,
    Done,
    Error,
    Extend,
    Forward,
    Gone,
    Heartbeat,
    Leave,
    Opened,
    OpenRun,
    OpenSession,
    Request,
    Result,
    Welcome,
)
from codec.plan import ModelCard, RunPlan

CARD = ModelCard(name="m", fingerprint="f", blocks=6, hidden=4)
SILENCE = 10.0


@dataclass(eq=False)
class Silo:
    attach: Attach
    route: bytes = b""
    last: int = 0
    waiting: set[int] = field(default_factory=set)
    """Requests of this attachment that were sent to a worker and not answered yet."""

    @property
    def alias(self) -> bytes:
        return alias_of(self.attach.peer)


@dataclass(eq=False)
class Worker:
    attach: Attach
    route: bytes = b""
    inbox: list[Parcel] = field(default_factory=list)
    sessions: set[tuple[bytes, str]] = field(default_factory=set)
    members: set[tuple[bytes, str]] = field(default_factory=set)

    @property
    def alias(self) -> bytes:
        return alias_of(self.attach.peer)

    def carry_out(self, parcel: Parcel, willing: bool) -> AnyHeader | None:
        header, silo = parcel.header, parcel.peer
        number = header.id
        match header:
            case Gone():
                self.sessions = {key for key in self.sessions if silo not in (b"", key[0])}
                self.members = {key for key in self.members if silo not in (b"", key[0])}
                return None
            case OpenSession() if willing:
                self.sessions.add((silo, header.session))
                return Opened(id=number)
            case OpenRun() if willing:
                self.members.add((silo, header.run))
                return Opened(id=number)
            case CloseSession() if (silo, header.session) in self.sessions:
                self.sessions.remove((silo, header.session))
                return Done(id=number)
            case CloseRun() if (silo, header.run) in self.members:
                self.members.remove((silo, header.run))
                return Done(id=number)
            case Extend() if (silo, header.session) in self.sessions and willing:
                return Result(id=number)
            case Forward() if (silo, header.run) in self.members and willing:
                return Result(id=number)
        return Error(id=number, code="limit", what="no", side="worker")


silos = st.sampled_from([0, 0, 1, 2])
workers = st.integers(0, 2)
names = st.sampled_from("aab")
sizes = st.sampled_from([0, 1, 30])


class Routing(RuleBasedStateMachine):
    """Three silos, three workers that host different spans, two names, small quotas."""

    @initialize()
    def begin(self) -> None:
        self.router = Router(Limits(silence=SILENCE, requests=4, bytes=70))
        self.now = 0.0
        self.silos = [Silo(Attach(role="silo", name=f"s{i}", peer=bytes([i]) * 16)) for i in range(3)]
        spans = ((0, 6), (0, 6), (0, 3))
        self.workers = [
            Worker(Attach(role="worker", name=f"w{i}", peer=bytes([9, i]) * 8, model=CARD, start=a, stop=b))
            for i, (a, b) in enumerate(spans)
        ]
        for peer in [*self.workers, *self.silos]:
            self.attach(peer)

    # What peers do.

    @rule(silo=silos)
    def silo_attaches(self, silo: int) -> None:
        """For the first time, after it was forgotten, or on a new connection."""
        self.attach(self.silos[silo])

    @rule(worker=workers)
    def worker_attaches(self, worker: int) -> None:
        self.attach(self.workers[worker])

    @rule(who=st.integers(0, 5))
    def peer_attaches_twice(self, who: int) -> None:
        """Once more on the connection that it has."""
        if (peer := self.everyone()[who]).route in self.router.peers:
            self.say(peer, peer.attach)

    @rule(who=st.integers(0, 5), how=st.sampled_from(["leave", "lost"]))
    def peer_goes(self, who: int, how: str) -> None:
        peer = self.everyone()[who]
        if peer.route in self.router.peers:
            if how == "leave":
                self.say(peer, Leave())
            else:
                self.deliver(self.router.lost(peer.route))
            self.gone({peer.route})

    @rule(beating=st.sets(st.integers(0, 5), min_size=3))
    def time_passes(self, beating: set[int]) -> None:
        """Some peers fall silent, possibly several at once."""
        self.now += 0.6 * SILENCE
        for peer in (self.everyone()[index] for index in beating):
            if peer.route in self.router.peers:
                self.say(peer, Heartbeat())
        late = {r for r, p in self.router.peers.items() if self.now - p.last_heard > SILENCE}
        self.deliver(self.router.tick(self.now))
        self.gone(late)
        assert not late & self.router.peers.keys()

    @rule(silo=silos, name=names, start=st.sampled_from([1, 3]), size=sizes)
    def open_session(self, silo: int, name: str, start: int, size: int) -> None:
        span = {"start": start, "stop": start + 1}
        number = self.number(silo)
        self.ask(silo, OpenSession(id=number, session=name, model=CARD, rows=1, capacity=1, **span), size)

    @rule(silo=silos, name=names, start=st.sampled_from([1, 3]), size=sizes)
    def open_run(self, silo: int, name: str, start: int, size: int) -> None:
        span = {"start": start, "stop": start + 1}
        number = self.number(silo)
        self.ask(silo, OpenRun(id=number, run=name, model=CARD, plan=RunPlan(silos=2), **span), size)

    @rule(silo=silos, name=names, run=st.booleans(), size=sizes)
    def use(self, silo: int, name: str, run: bool, size: int) -> None:
        number = self.number(silo)
        if run:
            self.ask(silo, Forward(id=number, run=name, microbatch=0, lengths=(1,)), size)
        else:
            self.ask(silo, Extend(id=number, session=name, rows=(0,), starts=(0,), lengths=(1,)), size)

    @rule(silo=silos, name=names, run=st.booleans())
    def close(self, silo: int, name: str, run: bool) -> None:
        number = self.number(silo)
        self.ask(silo, CloseRun(id=number, run=name) if run else CloseSession(id=number, session=name), 0)

    @rule(silo=silos, name=names)
    def ask_twice(self, silo: int, name: str) -> None:
        """The same number again while the first is on its way: refused, and the first stands."""
        peer = self.silos[silo]
        if peer.route not in self.router.peers or not peer.waiting:
            return
        header = Extend(id=max(peer.waiting), session=name, rows=(0,), starts=(0,), lengths=(1,))
        (send,) = self.router.handle(peer.route, Parcel.of(header), self.now)
        assert send.route == peer.route
        assert isinstance(send.parcel.header, Error)
        assert send.parcel.header.code == "protocol"

    @rule(worker=workers, willing=st.booleans())
    def answer(self, worker: int, willing: bool) -> None:
        self.serve(self.workers[worker], willing)

    @rule(worker=workers, silo=silos, number=st.integers(0, 20))
    def answer_nobody_asked_for(self, worker: int, silo: int, number: int) -> None:
        peer, target = self.workers[worker], self.silos[silo]
        asked = {(p.peer, p.header.id) for w in self.workers if w is peer for p in w.inbox}
        if peer.route in self.router.peers and (target.alias, number) not in asked:
            sends = self.router.handle(peer.route, Parcel.of(Result(id=number), peer=target.alias), self.now)
            assert sends == []

    @precondition(lambda self: any(worker.inbox for worker in self.workers))
    @rule(willing=st.booleans())
    def settle(self, willing: bool) -> None:
        """Every worker answers everything; then all is quiet."""
        self.quiet(willing)

    def teardown(self) -> None:
        if hasattr(self, "router"):
            self.quiet(True)
            for peer in self.everyone():
                if peer.route in self.router.peers:
                    self.say(peer, Leave())
                    self.gone({peer.route})
            router = self.router
            assert [router.peers, router._by_alias, router._silos, router._runs] == [{}, {}, {}, {}]

    # What holds.

    @invariant()
    def every_request_is_answered_or_on_its_way(self) -> None:
        for silo in self.silos:
            state = self.router._silos.get(silo.alias)
            assert (state is not None) == (silo.route in self.router.peers)
            if state is None:
                continue
            assert state.pending.keys() == silo.waiting
            for pending in state.pending.values():
                assert pending.hold.worker in self.router._by_alias

    @invariant()
    def waiting_bytes_are_those_of_what_waits(self) -> None:
        for state in self.router._silos.values():
            assert state.pending_bytes == sum(pending.size for pending in state.pending.values())
            assert 0 <= state.pending_bytes <= 70
            assert len(state.pending) <= 4
            assert state.pending or state.pending_bytes == 0

    @invariant()
    def load_is_what_a_worker_holds(self) -> None:
        states = self.router._silos.values()
        for peer in self.router.peers.values():
            sessions = [
                h for s in states for h in s.sessions.values() if h.worker == peer.alias and not h.lost
            ]
            runs = [home for home in self.router._runs.values() if home == peer.alias]
            assert peer.load == len(sessions) + len(runs)

    @invariant()
    def a_run_has_members_and_they_one_home(self) -> None:
        joined: dict[str, set[bytes]] = {}
        for state in self.router._silos.values():
            for run, hold in state.runs.items():
                if not hold.lost:
                    joined.setdefault(run, set()).add(hold.worker)
        assert joined == {run: {home} for run, home in self.router._runs.items()}

    # How it is driven.

    def everyone(self) -> list[Silo | Worker]:
        return [*self.silos, *self.workers]

    def number(self, silo: int) -> int:
        self.silos[silo].last += 1
        return self.silos[silo].last

    def attach(self, peer: Silo | Worker) -> None:
        peer.route = secrets.token_bytes(8)
        self.say(peer, peer.attach)
        assert peer.route in self.router.peers

    def ask(self, silo: int, header: Request, size: int) -> None:
        peer = self.silos[silo]
        if peer.route in self.router.peers:
            peer.waiting.add(header.id)
            self.say(peer, header, (b"x" * size,))
        elif peer.route:
            sends = self.router.handle(peer.route, Parcel.of(header), self.now)
            assert [send.parcel.header.id for send in sends] == [0, header.id]

    def serve(self, worker: Worker, willing: bool) -> None:
        if not worker.inbox:
            return
        parcel = worker.inbox.pop(0)
        answer = worker.carry_out(parcel, willing)
        if answer is None:
            return
        known = worker.route in self.router.peers
        sends = self.router.handle(worker.route, Parcel.of(answer, peer=parcel.peer), self.now)
        if known:
            self.deliver(sends)
        else:
            assert [send.parcel.header.id for send in sends] == [0]

    def quiet(self, willing: bool) -> None:
        for worker in self.workers:
            while worker.inbox:
                self.serve(worker, willing)
        assert not any(silo.waiting for silo in self.silos if silo.route in self.router.peers)
        for worker in self.workers:
            if worker.route not in self.router.peers:
                continue
            states = self.router._silos.items()
            sessions, members = (
                {
                    (alias, name)
                    for alias, state in states
                    for name, hold in getattr(state, kind).items()
                    if hold.worker == worker.alias and not hold.lost
                }
                for kind in ("sessions", "runs")
            )
            assert worker.sessions == sessions
            assert worker.members == members

    def gone(self, routes: set[bytes]) -> None:
        """These peers were forgotten: nothing is owed to the silos among them any more."""
        for silo in self.silos:
            if silo.route in routes:
                silo.waiting.clear()

    def say(self, peer: Silo | Worker, header: AnyHeader, tensors: tuple[bytes, ...] = ()) -> None:
        self.deliver(self.router.handle(peer.route, Parcel.of(header, tensors), self.now))

    def deliver(self, sends: list[Send]) -> None:
        for send in sends:
            header = send.parcel.header
            for worker in self.workers:
                if worker.route == send.route:
                    if isinstance(header, Welcome) and not header.resumed:
                        # As the link does: what it held is nobody's any more.
                        worker.inbox.append(Parcel.of(Gone(name="every silo")))
                    elif isinstance(header, Request | Gone):
                        worker.inbox.append(send.parcel)
                    break
            else:
                (silo,) = [silo for silo in self.silos if silo.route == send.route]
                if isinstance(header, Answer):
                    assert header.id in silo.waiting, "answered twice, or never asked"
                    silo.waiting.remove(header.id)
                else:
                    assert isinstance(header, Welcome | Heartbeat | Leave)


Routing.TestCase.settings = settings(max_examples=200, stateful_step_count=50)
TestRouting = Routing.TestCase
