"""Any interleaving of silos and workers: nothing lost, nothing twice, nothing left behind.

Workers are simulated as the trunk service behaves: in order within a session or run, names per silo, a
failing open leaves what stood before, `gone` frees. They hold the broker to their credit and to the order
of each session and run. When all is quiet, router and workers must agree on who has what.
"""

import re
import secrets
from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from broker.parcel import Parcel
from broker.pool import alias_of
from broker.quota import Account, Limits
from broker.router import Router, Send
from broker.silo import Hold
from codec.messages import (
    Answer,
    AnyHeader,
    Attach,
    Backward,
    CloseRun,
    CloseSession,
    Done,
    Drain,
    Error,
    Extend,
    Forward,
    Gone,
    Heartbeat,
    Leave,
    MaskSpec,
    Opened,
    OpenRun,
    OpenSession,
    Request,
    Result,
    TensorSpec,
    Welcome,
)
from codec.plan import ModelCard, RunPlan

CARD = ModelCard(name="m", fingerprint="f", blocks=6, hidden=4)
SILENCE = 10.0
SPANS, CREDITS = ((0, 4), (2, 6), (0, 3)), (4, 3, 0)
"""Blocks 3:4 have two hosts, 1:2 two others, and 1:5 takes two workers together."""


@dataclass(eq=False)
class Silo:
    attach: Attach
    route: bytes = b""
    life: int = 0
    """Counts how often it began to number its requests anew."""
    last: int = 0
    waiting: set[int] = field(default_factory=set)
    """Requests of this attachment that were sent to a worker and not answered yet."""
    spans: dict[str, set[str]] = field(default_factory=dict)
    """The blocks it ever asked for under a session's name."""

    @property
    def alias(self) -> bytes:
        return alias_of(self.attach.peer)


@dataclass(eq=False)
class Worker:
    attach: Attach
    route: bytes = b""
    inbox: list[tuple[Parcel, int]] = field(default_factory=list)
    """What came, and in which life of its silo."""
    sessions: dict[tuple[bytes, str], str] = field(default_factory=dict)
    """The blocks of each, as text."""
    members: set[tuple[bytes, str]] = field(default_factory=set)
    under_way: dict[tuple[bytes, int], int] = field(default_factory=dict)
    """Tokens that came over this connection and were not answered."""
    latest: dict[tuple[object, ...], int] = field(default_factory=dict)
    """The last number of each flow."""

    @property
    def alias(self) -> bytes:
        return alias_of(self.attach.peer)

    def takes(self, parcel: Parcel, life: int) -> None:
        """A request came."""
        header, silo = parcel.header, parcel.peer
        self.inbox.append((parcel, life))
        if not isinstance(header, Request) or not header.id:
            return
        name = getattr(header, "session", None), getattr(header, "run", None)
        assert self.latest.get((silo, life, name), 0) < header.id, "reordered"
        self.latest[silo, life, name] = header.id
        assert (silo, header.id) not in self.under_way
        self.under_way[silo, header.id] = tokens = tokens_of(header)
        together = sum(self.under_way.values())
        assert (
            not tokens
            or not self.attach.credit
            or together in range(self.attach.credit + 1)
            or (together == tokens)
        ), "more than its credit"

    def next(self, choice: int) -> Parcel:
        """One that it can carry out now: sessions and runs run ahead of one another, in order each."""
        first: dict[tuple[object, ...], int] = {}
        for index, (parcel, _) in enumerate(self.inbox):
            if isinstance(parcel.header, Gone):
                if not first:
                    first[()] = index
                break
            name = getattr(parcel.header, "session", None), getattr(parcel.header, "run", None)
            first.setdefault((parcel.peer, *name), index)
        return self.inbox.pop(list(first.values())[choice % len(first)])[0]

    def carry_out(self, parcel: Parcel, willing: bool) -> Parcel | None:
        header, silo = parcel.header, parcel.peer
        if isinstance(header, Gone):
            self.sessions = {k: v for k, v in self.sessions.items() if silo not in (b"", k[0])}
            self.members = {key for key in self.members if silo not in (b"", key[0])}
            return None
        self.under_way.pop((silo, header.id), None)
        answer = self.answer(header, silo, willing)
        frames = parcel.tensors
        if isinstance(answer, Result) and isinstance(header, Extend):
            frames = [frames[0] + f"[{self.sessions[silo, header.session]}]".encode(), *frames[1:-1]]
            assert parcel.tensors[-1] == b"mask", "the mask is for every stage"
        return Parcel.of(answer, frames if isinstance(answer, Result) else (), silo)

    def answer(self, header: AnyHeader, silo: bytes, willing: bool) -> AnyHeader:
        number = header.id
        match header:
            case OpenSession() if (
                willing and self.attach.start <= header.start < header.stop <= self.attach.stop
            ):
                self.sessions[silo, header.session] = f"{header.start}:{header.stop}"
                return Opened(id=number)
            case OpenRun() if willing:
                self.members.add((silo, header.run))
                return Opened(id=number)
            case CloseSession() if (silo, header.session) in self.sessions:
                del self.sessions[silo, header.session]
                return Done(id=number)
            case CloseRun() if (silo, header.run) in self.members:
                self.members.remove((silo, header.run))
                return Done(id=number)
            case Extend() if (silo, header.session) in self.sessions and willing:
                return Result(id=number, tensors=header.tensors, seconds=1.0)
            case Forward() | Backward() if (silo, header.run) in self.members and willing:
                return Result(id=number)
        return Error(id=number, code="limit", what="no", side="worker")


def spec(rows: int) -> TensorSpec:
    return TensorSpec("f32", (rows, 4), "raw", (16 * rows,))


MASK = MaskSpec(1, 1, 0, 0)


def tokens_of(header: Request) -> int:
    """As the protocol says."""
    if isinstance(header, Extend | Forward):
        return sum(header.lengths)
    return header.tensors[0].shape[0] if isinstance(header, Backward) else 0


silos = st.sampled_from([0, 0, 0, 1, 2])
workers = st.integers(0, 2)
names = st.sampled_from("aab")
sizes = st.sampled_from([0, 1, 30])
spans = st.sampled_from([(1, 2), (3, 4), (1, 5)])
members = st.sampled_from([(), (), ("s0", "s1"), ("s0", "s2")])
tokens = st.sampled_from([1, 1, 2, 5])
willing = st.sampled_from([True, True, True, False])
rarely = st.sampled_from([False, False, False, True])
many = st.integers(1, 3)


class Routing(RuleBasedStateMachine):
    """Three silos, three workers that host different spans, two names, small quotas and credits."""

    @initialize(keyed=st.booleans())
    def begin(self, keyed: bool) -> None:
        """With keys the first two silos have the same one."""
        self.router = Router(Limits(silence=SILENCE, requests=6, bytes=130, sessions=3, attaches=1 << 20))
        self.router.registry.keyed = keyed
        self.now = 0.0
        owners = ["s0", "s0" if keyed else "s1", "s2"]
        self.silos = [Silo(Attach(role="silo", name=n, peer=bytes([i]) * 16)) for i, n in enumerate(owners)]
        self.workers = [
            Worker(Attach(role="worker", name=f"w{i}", peer=bytes([9, i]) * 8, model=CARD, **fields))
            for i, fields in enumerate(
                {"start": a, "stop": b, "credit": credit}
                for (a, b), credit in zip(SPANS, CREDITS, strict=True)
            )
        ]
        for peer in [*self.workers, *self.silos]:
            self.attach(peer)

    # What peers do.

    @rule(silo=silos, moves=rarely, back=st.integers(0, 4))
    def silo_attaches(self, silo: int, moves: bool, back: int) -> None:
        """After it was forgotten, or on a new connection.

        One that was forgotten may have forgotten too, and uses some numbers a second time.
        """
        peer = self.silos[silo]
        attached = peer.route in self.router.peers
        if not attached and not self.stale(peer):
            peer.last, peer.life = max(0, peer.last - back), peer.life + 1
        if moves or not attached:
            self.attach(peer)

    def stale(self, silo: Silo) -> bool:
        """Whether a worker will answer something of this silo's that the broker knows nothing of."""
        known = self.router.registry.owed
        return any(
            p.peer == silo.alias and p.header.id and not known(p.peer, p.header.id)
            for w in self.workers
            for p, _ in w.inbox
        )

    @rule(worker=workers, moves=rarely)
    def worker_attaches(self, worker: int, moves: bool) -> None:
        peer = self.workers[worker]
        if moves or peer.route not in self.router.peers:
            self.attach(peer)

    @rule(who=st.integers(0, 5))
    def peer_attaches_twice(self, who: int) -> None:
        """Once more on the connection that it has."""
        if (peer := self.everyone()[who]).route in self.router.peers:
            self.say(peer, peer.attach)

    @rule(who=st.integers(0, 5), how=st.sampled_from(["leave", "lost"]), really=rarely)
    def peer_goes(self, who: int, how: str, really: bool) -> None:
        peer = self.everyone()[who]
        if really and peer.route in self.router.peers:
            if how == "leave":
                self.say(peer, Leave())
            else:
                self.deliver(self.router.lost(peer.route))
            self.gone({peer.route})

    @rule(silo=silos, pick=names, moves=st.booleans(), really=rarely)
    def silo_goes_and_then_its_worker(self, silo: int, pick: str, moves: bool, really: bool) -> None:
        """The worker has a request of a silo that is gone, and goes too, or comes on a new connection."""
        if not really:
            return
        self.train(silo, pick, 1, 1, False, 1)
        peer = self.silos[silo]
        if peer.route in self.router.peers:
            self.say(peer, Leave())
            self.gone({peer.route})
        for worker in self.workers:
            if worker.route in self.router.peers and any(p.peer == peer.alias for p, _ in worker.inbox):
                if moves:
                    self.attach(worker)
                else:
                    self.deliver(self.router.lost(worker.route))

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

    @rule(worker=workers, really=rarely)
    def worker_drains(self, worker: int, really: bool) -> None:
        if really and (peer := self.workers[worker]).route in self.router.peers:
            self.say(peer, Drain())

    @rule(silo=silos, name=names, span=spans, size=sizes)
    def open_session(self, silo: int, name: str, span: tuple[int, int], size: int) -> None:
        blocks = {"start": span[0], "stop": span[1]}
        self.silos[silo].spans.setdefault(name, set()).add("{}:{}".format(*span))
        number, before = self.number(silo), self.held(silo, "sessions", name)
        self.ask(silo, OpenSession(id=number, session=name, model=CARD, rows=1, capacity=1, **blocks), size)
        self.nothing_new_for_who_leaves(before, self.held(silo, "sessions", name))

    @rule(silo=silos, name=names, span=spans, size=sizes, members=members)
    def open_run(
        self, silo: int, name: str, span: tuple[int, int], size: int, members: tuple[str, ...] = ()
    ) -> None:
        blocks = {"start": span[0], "stop": span[1]}
        number, before = self.number(silo), self.router.registry.runs.get((members, name))
        plan = RunPlan(silos=2, members=members)
        self.ask(silo, OpenRun(id=number, run=name, model=CARD, plan=plan, **blocks), size)
        home = self.router.registry.runs.get((members, name))
        assert home is before or not home.draining

    @rule(
        silo=silos,
        pick=names,
        span=spans,
        size=sizes,
        lengths=st.lists(tokens, min_size=1, max_size=2),
        many=many,
    )
    def extend(
        self, silo: int, pick: str, span: tuple[int, int], size: int, lengths: list[int], many: int
    ) -> None:
        if not self.has(silo, "sessions"):
            self.open_session(silo, pick, span, 0)
        rows = {"rows": tuple(range(len(lengths))), "starts": (0,) * len(lengths), "lengths": tuple(lengths)}
        for _ in range(many):
            fields = {
                "session": self.name(silo, "sessions", pick),
                "tensors": (spec(1),),
                "mask": MASK,
                **rows,
            }
            self.ask(silo, Extend(id=self.number(silo), **fields), size, b"mask")

    @rule(silo=silos, pick=names, size=sizes, rows=tokens, back=st.booleans(), many=many)
    def train(self, silo: int, pick: str, size: int, rows: int, back: bool, many: int) -> None:
        if not self.has(silo, "runs"):
            self.open_run(silo, pick, (1, 2), 0)
        for _ in range(many):
            fields = {"id": self.number(silo), "run": self.name(silo, "runs", pick), "microbatch": 0}
            if back:
                self.ask(silo, Backward(tensors=(spec(rows),), **fields), size)
            else:
                self.ask(silo, Forward(lengths=(rows,), **fields), size)

    @rule(silo=silos, pick=names, run=st.booleans())
    def close(self, silo: int, pick: str, run: bool) -> None:
        number = self.number(silo)
        if run:
            self.ask(silo, CloseRun(id=number, run=self.name(silo, "runs", pick)), 0)
        else:
            self.ask(silo, CloseSession(id=number, session=self.name(silo, "sessions", pick)), 0)

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

    @rule(worker=workers, willing=willing, choice=st.integers(0, 3))
    def answer(self, worker: int, willing: bool, choice: int) -> None:
        self.serve(self.workers[worker], willing, choice)

    @rule(worker=workers, silo=silos, number=st.integers(0, 20))
    def answer_nobody_asked_for(self, worker: int, silo: int, number: int) -> None:
        peer, target = self.workers[worker], self.silos[silo]
        asked = {(p.peer, p.header.id) for p, _ in peer.inbox}
        if peer.route in self.router.peers and (target.alias, number) not in asked:
            sends = self.router.handle(peer.route, Parcel.of(Result(id=number), peer=target.alias), self.now)
            assert sends == []

    @precondition(lambda self: any(worker.inbox for worker in self.workers))
    @rule(willing=willing)
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
            left = self.router.registry
            assert [self.router.peers, left.silos, left.workers, left.runs] == [{}, {}, {}, {}]
            assert [(account.requests, account.bytes, account.silos) for account in self.accounts()] == [
                (0, 0, [])
            ] * len(self.accounts())

    # What holds.

    @invariant()
    def every_request_is_answered_or_on_its_way(self) -> None:
        for silo in self.silos:
            state = self.router.registry.silos.get(silo.alias)
            assert (state is not None) == (silo.route in self.router.peers)
            if state is None:
                continue
            assert state.pending.keys() == silo.waiting
            for pending in state.pending.values():
                assert set(pending.hold.workers) <= set(self.router.registry.workers.values())

    @invariant()
    def quotas_are_kept(self) -> None:
        """What silos that are gone have left at workers counts too, until that is answered."""
        for account in self.accounts():
            pending = [pending for silo in account.silos for pending in silo.pending.values()]
            assert len(pending) <= account.requests <= 6
            assert sum(each.size for each in pending) <= account.bytes <= 130
            assert sum(len(silo.sessions) for silo in account.silos) <= 3
        if not any(worker.inbox for worker in self.workers):
            for account in self.accounts():
                assert account.requests == sum(len(silo.pending) for silo in account.silos)

    @invariant()
    def whoever_is_in_a_run_is_one_of_its_members(self) -> None:
        for state in self.router.registry.silos.values():
            for hold in state.runs.values():
                assert not hold.members or state.name in hold.members

    @invariant()
    def load_is_what_a_worker_holds(self) -> None:
        states = self.router.registry.silos.values()
        for worker in self.router.registry.workers.values():
            sessions = [h for s in states for h in s.sessions.values() if worker in h.workers and not h.lost]
            runs = [home for home in self.router.registry.runs.values() if home is worker]
            assert worker.load == len(sessions) + len(runs)

    @invariant()
    def a_run_has_members_and_they_one_home(self) -> None:
        joined: dict[object, set[object]] = {}
        for state in self.router.registry.silos.values():
            for name, hold in state.runs.items():
                assert hold.run[1] == name
                if not hold.lost:
                    joined.setdefault(hold.run, set()).add(hold.worker)
        assert joined == {run: {home} for run, home in self.router.registry.runs.items()}

    @invariant()
    def credit_is_what_was_not_answered_and_nothing_is_stuck(self) -> None:
        for worker in self.workers:
            if worker.route in self.router.peers:
                inbox = self.router.registry.workers[worker.alias].inbox
                assert inbox.tokens_under_way == sum(worker.under_way.values())
                assert inbox.tokens_under_way or not inbox.waiting

    # How it is driven.

    def accounts(self) -> list[Account]:
        attached = {id(state.account): state.account for state in self.router.registry.silos.values()}
        return [*attached.values(), *self.router.registry._accounts.values()]

    def everyone(self) -> list[Silo | Worker]:
        return [*self.silos, *self.workers]

    def number(self, silo: int) -> int:
        self.silos[silo].last += 1
        return self.silos[silo].last

    def attach(self, peer: Silo | Worker) -> None:
        peer.route = secrets.token_bytes(8)
        if isinstance(peer, Worker):
            peer.under_way.clear()
        self.say(peer, peer.attach)
        assert peer.route in self.router.peers

    def name(self, silo: int, kind: str, pick: str) -> str:
        """One that the silo has, if it has any."""
        has = self.has(silo, kind)
        return has[ord(pick) % len(has)] if has else pick

    def has(self, silo: int, kind: str) -> list[str]:
        state = self.router.registry.silos.get(self.silos[silo].alias)
        return sorted(getattr(state, kind)) if state else []

    def held(self, silo: int, kind: str, name: str) -> Hold | None:
        state = self.router.registry.silos.get(self.silos[silo].alias)
        return getattr(state, kind).get(name) if state else None

    def nothing_new_for_who_leaves(self, before: Hold | None, now: Hold | None) -> None:
        assert now is None or now is before or not any(worker.draining for worker in now.workers)

    def ask(self, silo: int, header: Request, size: int, *more: bytes) -> None:
        peer = self.silos[silo]
        if peer.route in self.router.peers:
            peer.waiting.add(header.id)
            self.say(peer, header, (b"x" * size, *more))
        elif peer.route:
            sends = self.router.handle(peer.route, Parcel.of(header), self.now)
            assert [send.parcel.header.id for send in sends] == [0, header.id]

    def serve(self, worker: Worker, willing: bool, choice: int = 0) -> None:
        """Carry out one request, and answer it twice: the second time nobody listens."""
        if not worker.inbox:
            return
        parcel = worker.next(choice)
        answer = worker.carry_out(parcel, willing)
        if answer is None:
            return
        known = worker.route in self.router.peers
        sends = self.router.handle(worker.route, answer, self.now)
        if known:
            self.deliver(sends)
            assert self.router.handle(worker.route, answer, self.now) == []
        else:
            assert [send.parcel.header.id for send in sends] == [0]

    def quiet(self, willing: bool) -> None:
        while any(worker.inbox for worker in self.workers):
            for worker in self.workers:
                self.serve(worker, willing)
        assert not any(silo.waiting for silo in self.silos if silo.route in self.router.peers)
        for worker in self.workers:
            if worker.route not in self.router.peers:
                continue
            there = self.router.registry.workers[worker.alias]
            assert (there.inbox.tokens_under_way, there.inbox.waiting, list(there.inbox)) == (0, 0, [])
            states = self.router.registry.silos.items()
            sessions, members = (
                {
                    (alias, name)
                    for alias, state in states
                    for name, hold in getattr(state, kind).items()
                    if there in hold.workers and not hold.lost
                }
                for kind in ("sessions", "runs")
            )
            assert worker.sessions.keys() == sessions
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
                    self.reaches_worker(worker, send.parcel)
                    break
            else:
                (silo,) = [silo for silo in self.silos if silo.route == send.route]
                if isinstance(header, Answer):
                    assert header.id in silo.waiting, "answered twice, or never asked"
                    silo.waiting.remove(header.id)
                    if isinstance(header, Result) and header.tensors:
                        self.passed_every_block(silo, header, bytes(send.parcel.tensors[0]).decode())
                else:
                    assert isinstance(header, Welcome | Heartbeat | Leave)

    def reaches_worker(self, worker: Worker, parcel: Parcel) -> None:
        header = parcel.header
        lives = {silo.alias: silo.life for silo in self.silos}
        if isinstance(header, Welcome):
            if not header.resumed:
                # As the link does: what it held is nobody's any more.
                worker.inbox = [(p, life) for p, life in worker.inbox if life == lives.get(p.peer, life)]
                worker.inbox.append((Parcel.of(Gone(name="every silo")), 0))
        elif isinstance(header, Request | Gone):
            worker.takes(parcel, lives[parcel.peer])
        else:
            assert isinstance(header, Drain | Leave | Heartbeat)

    def passed_every_block(self, silo: Silo, result: Result, trace: str) -> None:
        """The stages it went through follow one another and make up what the silo asked for."""
        stages = re.findall(r"\[(\d):(\d)\]", trace)
        assert all(one[1] == other[0] for one, other in pairwise(stages))
        whole = f"{stages[0][0]}:{stages[-1][1]}"
        assert any(whole in spans for spans in silo.spans.values())
        assert result.seconds == len(stages)


Routing.TestCase.settings = settings(max_examples=200, stateful_step_count=60)
TestRouting = Routing.TestCase
