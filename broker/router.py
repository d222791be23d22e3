"""What the broker decides: who a message goes to. Pure decisions over state, no sockets.

`Router.handle` takes one arrived message and the time and returns the messages to send.
A session and a run stay with the worker that opened them, or a session with the several that share it;
every request of a silo is remembered until its answer passes, so that a worker's death is told to
everyone who waits for it. When a request goes on, its worker's inbox decides (`broker.inbox`).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import cast, get_args

from msgspec import Struct

from broker.ask import cost
from broker.chain import Errand
from broker.parcel import Parcel, error_parcel
from broker.pool import Peer, Worker, alias_of, check_attach, common_encodings
from broker.pulse import is_gone
from broker.quota import Attaches, Limits
from broker.registry import START_AGAIN, Registry
from broker.silo import Hold, Pending, Silo
from broker.status import pool_status
from codec.errors import LinkError, ProtocolError, TrunklineError, UnavailableError
from codec.messages import (
    Answer,
    AnyHeader,
    Attach,
    CloseRun,
    CloseSession,
    Drain,
    Error,
    Gone,
    Heartbeat,
    Leave,
    OpenRun,
    OpenSession,
    Request,
    Status,
    Welcome,
)

_REQUESTS = frozenset(get_args(Request))
_ANSWERS = frozenset(get_args(Answer))
_OPENS = frozenset((OpenSession, OpenRun))
_CLOSES = frozenset((CloseSession, CloseRun))


class Send(Struct, frozen=True):
    """Put `parcel` on the connection `route`."""

    route: bytes
    parcel: Parcel


class Router:
    """The broker's state machine."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.peers: dict[bytes, Silo | Worker] = {}
        self.registry = Registry(self.limits)
        self._attaches = Attaches()

    def handle(self, route: bytes, parcel: Parcel, now: float) -> list[Send]:
        """Decide on one message that arrived on `route`. Never raises; errors become answers."""
        peer, header = self.peers.get(route), parcel.header
        kind = type(header)
        try:
            if isinstance(header, Attach):
                return self._attach(route, header, now)
            if isinstance(header, Status):
                return [Send(route, Parcel.of(pool_status(self.registry, header.id, now)))]
            if peer is None:
                return list(_stranger(route, header))
            peer.last_heard, peer.spoke = now, True
            if kind in _REQUESTS and isinstance(peer, Silo):
                return self._request(peer, cast("Request", header), parcel)
            if kind in _ANSWERS and isinstance(peer, Worker):
                return self._answer(peer, header.id, parcel)
            return self._control(peer, header)
        except TrunklineError as error:
            return [Send(route, error_parcel(header.id, error))]

    def tick(self, now: float, quiet_for: Callable[[bytes], float | None] = lambda _: None) -> list[Send]:
        """Forget peers that fell silent.

        `quiet_for` tells how many seconds ago the last byte came on a route, where that can be told.
        """
        self._attaches.forget_full(now)
        silent = [peer for peer in self.peers.values() if self._silent(peer, now, quiet_for)]
        return [send for peer in silent for send in self._forget(peer)]

    def _silent(self, peer: Peer, now: float, quiet_for: Callable[[bytes], float | None]) -> bool:
        unheard, heartbeat = now - peer.last_heard, self.limits.heartbeat
        if unheard <= heartbeat:
            return False
        return is_gone(unheard, quiet_for(peer.route) or 0.0, heartbeat, self.limits.silence)

    def farewell(self) -> list[Send]:
        """The broker is about to end: every peer looks for one now, and not after a silence."""
        error = LinkError("the broker was told to end", side="broker")
        return [Send(route, error_parcel(0, error)) for route in self.peers]

    def lost(self, route: bytes) -> list[Send]:
        """The connection `route` cannot be written to any more."""
        peer = self.peers.get(route)
        return self._forget(peer) if peer else []

    # --- peers -------------------------------------------------------------------------------------

    def _attach(self, route: bytes, attach: Attach, now: float) -> list[Send]:
        check_attach(attach)
        alias = alias_of(attach.peer)
        before = self.registry.silos.get(alias) or self.registry.workers.get(alias)
        if before is not None and before.role != attach.role:
            raise ProtocolError(f"this identity is attached as a {before.role}", side=attach.role)
        if before is None or before.route != route:  # Who knocks while the broker is busy attaches once.
            self._attaches.check(attach.name if self.registry.keyed else route, self.limits, now)
        # One connection is one peer: under another identity it was somebody else, who is gone.
        other = self.peers.get(route)
        sends = self._forget(other) if other and other is not before else []
        if before is not None and before.route != route and not before.spoke:
            # The welcome that said that nothing of it is left may be lost: it must hear so again.
            sends += self._forget(before)
            before = None
        # The same secret identity on a new connection: what it has comes along.
        peer = before or self.registry.admit(alias, attach.role, attach.name)
        moved = before is not None and before.route != route
        self.peers.pop(peer.route, None)
        self.peers[route] = peer
        peer.route, peer.name, peer.last_heard = route, attach.name, now
        if isinstance(peer, Worker):
            peer.says(attach)
        welcome = Welcome(
            id=attach.id,
            heartbeat=self.limits.heartbeat,
            resumed=before is not None,
            encodings=common_encodings(worker.encodings for worker in self.registry.workers.values()),
        )
        sends.append(Send(route, Parcel.of(welcome)))
        if isinstance(peer, Worker):
            if moved:
                sends += self._interrupted(peer)
            sends += self._released(peer)
        return sends

    def _control(self, peer: Silo | Worker, header: AnyHeader) -> list[Send]:
        if isinstance(header, Heartbeat):
            return [Send(peer.route, Parcel.of(Heartbeat(id=header.id)))]
        if isinstance(header, Leave):
            # The answer says that everything before the goodbye was read.
            return [*self._forget(peer), Send(peer.route, Parcel.of(Leave()))]
        if isinstance(header, Drain) and isinstance(peer, Worker):
            peer.draining = True
            return [Send(peer.route, Parcel.of(Drain(id=header.id)))]
        raise ProtocolError(f"a {peer.role} may not send this kind of message", side=peer.role)

    def _forget(self, peer: Silo | Worker) -> list[Send]:
        del self.peers[peer.route]
        return list(self._silo_gone(peer) if isinstance(peer, Silo) else self._worker_gone(peer))

    def _silo_gone(self, silo: Silo) -> Iterator[Send]:
        del self.registry.silos[silo.alias]
        silo.account.silos.remove(silo)
        asked = list(silo.pending.values())
        silo.pending.clear()
        holds = list(silo.holds())
        for hold in silo.sessions.values():
            if not hold.lost:
                self.registry.unload(hold)
        self.registry.drop_empty_runs()
        told = {worker for hold in holds for worker in hold.workers}
        for worker in self.registry.workers.values():
            # What it asked for last may have been to close something: that must not stay open.
            asked_last = worker.inbox.withdraw(silo.alias) or worker.inbox.owes(silo.alias)
            if asked_last or worker in told:
                yield Send(worker.route, Parcel.of(Gone(name=silo.name), peer=silo.alias))
                yield from self._released(worker)
        for pending in asked:
            # What a worker has is still in the way of others: who comes back has not got rid of it.
            owed = self.registry.owed(silo.alias, pending.number)
            if pending.hold.chain is not None or not owed:
                pending.settle()

    def _worker_gone(self, worker: Worker) -> Iterator[Send]:
        del self.registry.workers[worker.alias]
        self.registry.runs = {run: home for run, home in self.registry.runs.items() if home is not worker}
        error = UnavailableError(f"worker {worker.name!r} left before it answered", hint=START_AGAIN)
        for pending in list(worker.inbox):
            pending.settle()
            if pending.silo.take(pending):
                yield Send(pending.silo.route, error_parcel(pending.number, error))
        for silo in self.registry.silos.values():
            for hold in [hold for hold in silo.holds() if worker in hold.workers]:
                hold.lost = worker.name
                if hold.chain is not None:
                    yield from self._break(silo, hold, error)
            silo.owed = {number for number in silo.owed if self.registry.owed(silo.alias, number)}

    def _interrupted(self, worker: Worker) -> Iterator[Send]:
        """The worker is on a new connection: what was on its way on the old one may be lost.

        What it holds is still there. Its silos ask anew, and a late answer is nobody's.
        """
        error = UnavailableError(
            f"the connection to worker {worker.name!r} broke", side="broker", hint="Repeat the command."
        )
        for pending in worker.inbox.renew():
            silo, hold = pending.silo, pending.hold
            pending.settle()
            if silo.take(pending):
                silo.owed.add(pending.number)
                yield Send(silo.route, error_parcel(pending.number, error))
            elif (
                self.registry.silos.get(silo.alias) is silo
                and hold.chain
                and not hold.lost
                and silo.has(hold)
            ):
                hold.lost = worker.name
                yield from self._break(silo, hold, error)

    def _break(self, silo: Silo, hold: Hold, error: TrunklineError) -> Iterator[Send]:
        """A session has lost one of its stages: the others free what they have of it."""
        assert hold.chain is not None
        for pending in [pending for pending in silo.pending.values() if pending.hold is hold]:
            silo.take(pending)
            if self.registry.owed(silo.alias, pending.number):
                silo.owed.add(pending.number)
            yield Send(silo.route, error_parcel(pending.number, error))
        staying = [errand for errand in hold.chain.closing() if errand.worker.alias in self.registry.workers]
        for errand in staying:
            errand.worker.load -= 1
            errand.worker.inbox.withdraw(silo.alias, hold.flow)
        yield from self._ask_stages(silo, hold, staying)
        for errand in staying:
            yield from self._released(errand.worker)

    # --- requests ----------------------------------------------------------------------------------

    def _request(self, silo: Silo, header: Request, parcel: Parcel) -> list[Send]:
        number, size = header.id, parcel.size
        silo.check(number)
        silo.account.check_request(size, self.limits)
        hold = self.registry.hold(silo, header)
        kind = type(header)
        rank, tokens = cost(header)
        pending = Pending(
            hold.flow, number, rank, tokens, silo=silo, hold=hold, size=size, opens=kind in _OPENS
        )
        silo.pending[number] = pending
        pending.charge()
        if hold.chain is not None:
            return self._ask_stages(silo, hold, hold.chain.put(parcel))
        if kind in _CLOSES:
            self.registry.release(silo, hold)
        return self._ask(hold.worker, pending, parcel)

    def _ask(self, worker: Worker, pending: Pending, parcel: Parcel) -> list[Send]:
        if worker.inbox.passes(pending):
            return [Send(worker.route, parcel.to(pending.silo.alias))]
        pending.parcel = parcel.to(pending.silo.alias)
        return _sends(worker, worker.inbox.queue(pending))

    def _ask_stages(self, silo: Silo, hold: Hold, errands: Iterable[Errand]) -> list[Send]:
        sends = []
        for errand in errands:
            header = cast("Request", errand.parcel.header)
            rank, tokens = cost(header)
            pending = Pending(hold.flow, header.id, rank, tokens, silo=silo, hold=hold)
            sends += self._ask(errand.worker, pending, errand.parcel)
        return sends

    # --- answers -----------------------------------------------------------------------------------

    def _answer(self, worker: Worker, number: int, parcel: Parcel) -> list[Send]:
        pending = worker.inbox.answered(parcel.peer, number)
        if pending is None:
            return []  # Answered already, or not this worker's to answer.
        silo, hold = pending.silo, pending.hold
        if silo.take(pending):
            if pending.opens:
                self._opened(silo, hold, isinstance(parcel.header, Error))
            sends = [Send(silo.route, parcel.to(b""))]
        elif number in silo.pending and hold.chain is not None:
            sends = self._stage_answered(worker, silo, hold, parcel)
        else:
            sends = []  # Nobody waits for it any more.
            if pending.opens and self.registry.silos.get(silo.alias) is silo:
                self._opened(silo, hold, isinstance(parcel.header, Error))
            pending.settle()
            if (now := self.registry.silos.get(silo.alias)) and not self.registry.owed(silo.alias, number):
                now.owed.discard(number)
        if worker.inbox.waiting:
            sends += self._released(worker)
        return sends

    def _stage_answered(self, worker: Worker, silo: Silo, hold: Hold, parcel: Parcel) -> list[Send]:
        assert hold.chain is not None
        progress = hold.chain.answered(worker, parcel)
        sends = []
        if progress.answer is not None:
            silo.take(silo.pending[parcel.header.id])
            sends.append(Send(silo.route, progress.answer.to(b"")))
            if hold.chain.idle and not hold.chain.open:
                self.registry.release(silo, hold)
        return sends + self._ask_stages(silo, hold, progress.errands)

    def _opened(self, silo: Silo, hold: Hold, failed: bool) -> None:
        """An open was answered. A name that never came to be is free again.

        One that stood before, or that another open on its way may still bring, is not touched.
        """
        if not failed:
            hold.sure = True
        elif not hold.sure and silo.has(hold) and not silo.opening(hold):
            self.registry.release(silo, hold)

    def _released(self, worker: Worker) -> list[Send]:
        return _sends(worker, worker.inbox.release())


def _sends(worker: Worker, going: Iterable[Pending]) -> list[Send]:
    return [Send(worker.route, pending.leaves()) for pending in going]


def _stranger(route: bytes, header: AnyHeader) -> Iterator[Send]:
    """To a connection that is not attached: attach (again); and what it asked for is not done."""
    yield Send(route, error_parcel(0, LinkError("this connection is not attached")))
    if isinstance(header, Request) and header.id:
        lost = UnavailableError(
            "the request came before its silo was attached (again)",
            side="broker",
            hint="Was the broker restarted? Repeat the command.",
        )
        yield Send(route, error_parcel(header.id, lost))
