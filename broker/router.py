"""What the broker decides: who a message goes to. Pure decisions over state, no sockets.

`Router.handle` takes one arrived message and the time and returns the messages to send.
A session and a run stay with the worker that opened them; every request of a silo is remembered
until its answer passes, so that a worker's death is told to everyone who waits for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from broker.parcel import Parcel, error_parcel
from broker.pool import Peer, choose_worker, common_encodings, peer_from
from broker.silo import Hold, Pending, Silo
from codec.errors import (
    LimitError,
    LinkError,
    ProtocolError,
    TrunklineError,
    UnavailableError,
    UnknownNameError,
)
from codec.messages import (
    Answer,
    AnyHeader,
    Attach,
    CloseRun,
    CloseSession,
    Error,
    Gone,
    Heartbeat,
    Leave,
    OpenRun,
    OpenSession,
    Request,
    Welcome,
)
from codec.partition import Span

_START_AGAIN = "Start it again and repeat the command."


@dataclass(frozen=True, slots=True)
class Send:
    """Put `parcel` on the connection `route`."""

    route: bytes
    parcel: Parcel


@dataclass(frozen=True, slots=True)
class Limits:
    """Quotas and deadlines. `silence` seconds without a sign of life and a peer is gone."""

    heartbeat: float = 1.0
    silence: float = 10.0
    requests: int = 1024
    bytes: int = 1 << 30


class Router:
    """The broker's state machine."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.peers: dict[bytes, Peer] = {}
        self._by_alias: dict[bytes, Peer] = {}
        self._silos: dict[bytes, Silo] = {}
        self._runs: dict[str, bytes] = {}

    def handle(self, route: bytes, parcel: Parcel, now: float) -> list[Send]:
        """Decide on one message that arrived on `route`. Never raises; errors become answers."""
        peer = self.peers.get(route)
        header = parcel.header
        try:
            if isinstance(header, Attach):
                return self._attach(route, header, now)
            if peer is None:
                return list(_stranger(route, header))
            peer.last_heard = now
            if isinstance(header, Heartbeat):
                return [Send(route, Parcel.of(Heartbeat(id=header.id)))]
            if isinstance(header, Leave):
                # The answer says that everything before the goodbye was read.
                return [*self._forget(peer), Send(route, Parcel.of(Leave()))]
            if peer.role == "silo" and isinstance(header, Request):
                return self._request(peer, header, parcel)
            if peer.role == "worker" and isinstance(header, Answer):
                return self._answer(peer, header, parcel)
            raise ProtocolError(f"a {peer.role} may not send this kind of message", side=peer.role)
        except TrunklineError as error:
            return [Send(route, error_parcel(header.id, error))]

    def tick(self, now: float) -> list[Send]:
        """Forget peers that fell silent."""
        silent = [p for p in self.peers.values() if now - p.last_heard > self.limits.silence]
        return [send for peer in silent for send in self._forget(peer)]

    def lost(self, route: bytes) -> list[Send]:
        """The connection `route` cannot be written to any more."""
        peer = self.peers.get(route)
        return self._forget(peer) if peer else []

    def _attach(self, route: bytes, attach: Attach, now: float) -> list[Send]:
        peer = peer_from(route, attach, now)
        before = self._by_alias.get(peer.alias)
        if before is not None and before.role != peer.role:
            raise ProtocolError(f"this identity is attached as a {before.role}", side=peer.role)
        # One connection is one peer: under another identity it was somebody else, who is gone.
        other = self.peers.get(route)
        sends = self._forget(other) if other and other is not before else []
        if before is not None:
            # The same secret identity on a new connection: its sessions and runs come along.
            self.peers.pop(before.route, None)
            peer.load = before.load
        self.peers[route] = self._by_alias[peer.alias] = peer
        if peer.role == "silo":
            self._silos.setdefault(peer.alias, Silo())
        welcome = Welcome(
            id=attach.id,
            heartbeat=self.limits.heartbeat,
            resumed=before is not None,
            encodings=common_encodings(self._workers()),
        )
        return [*sends, Send(route, Parcel.of(welcome))]

    def _request(self, peer: Peer, header: Request, parcel: Parcel) -> list[Send]:
        silo, size = self._silos[peer.alias], parcel.size
        if header.id == 0:
            raise ProtocolError("a request needs a number above 0")
        if header.id in silo.pending:
            raise ProtocolError(f"request {header.id} is already on its way")
        self._check_quota(silo, size)
        hold = self._hold(silo, header)
        opens = header if isinstance(header, OpenSession | OpenRun) else None
        silo.add(header.id, Pending(hold, size, opens))
        if isinstance(header, CloseSession | CloseRun):
            self._release(silo, header)
        return [Send(self._by_alias[hold.worker].route, parcel.to(peer.alias))]

    def _check_quota(self, silo: Silo, size: int) -> None:
        if size > self.limits.bytes:
            raise LimitError(
                f"a request of {size} bytes, {self.limits.bytes} may wait for answers",
                side="silo",
                hint="Use smaller micro-batches (--batch).",
            )
        if len(silo.pending) >= self.limits.requests or silo.pending_bytes + size > self.limits.bytes:
            raise LimitError(
                f"{len(silo.pending)} requests ({silo.pending_bytes} bytes) wait for answers already",
                side="silo",
                hint="Keep fewer micro-batches in flight (--window).",
            )

    def _hold(self, silo: Silo, header: Request) -> Hold:
        """What the request is about, made now if it opens a new name."""
        names, name = silo.names(header)
        hold = names.get(name)
        if isinstance(header, OpenSession | OpenRun) and (hold is None or hold.lost):
            hold = names[name] = Hold(self._home(header))
        if hold is None:
            raise UnknownNameError(f"you have no session or run {name!r} open")
        if hold.lost:
            if isinstance(header, CloseSession | CloseRun):
                del names[name]
            raise UnavailableError(f"worker {hold.lost!r} left, and {name!r} with it", hint=_START_AGAIN)
        return hold

    def _home(self, header: OpenSession | OpenRun) -> bytes:
        if isinstance(header, OpenRun) and header.run in self._runs:
            return self._runs[header.run]
        worker = choose_worker(
            self._workers(), header.model, Span(header.start, header.stop), header.encodings
        )
        worker.load += 1
        if isinstance(header, OpenRun):
            self._runs[header.run] = worker.alias
        return worker.alias

    def _answer(self, worker: Peer, header: Answer, parcel: Parcel) -> list[Send]:
        silo, peer = self._silos.get(parcel.peer), self._by_alias.get(parcel.peer)
        if silo is None or peer is None:
            return []  # The silo left meanwhile.
        pending = silo.take(header.id, worker.alias)
        if pending is None:
            return []  # Answered already, or not this worker's to answer.
        if pending.opens is not None:
            self._opened(silo, pending.opens, pending.hold, isinstance(header, Error))
        return [Send(peer.route, parcel.to(b""))]

    def _opened(self, silo: Silo, header: OpenSession | OpenRun, hold: Hold, failed: bool) -> None:
        """An open was answered. A name that never came to be is free again.

        One that stood before, or that another open on its way may still bring, is not touched.
        """
        names, name = silo.names(header)
        if not failed:
            hold.sure = True
        elif not hold.sure and names.get(name) is hold and not silo.opening(hold):
            self._release(silo, header)

    def _release(self, silo: Silo, header: OpenSession | OpenRun | CloseSession | CloseRun) -> None:
        names, name = silo.names(header)
        hold = names.pop(name)
        if isinstance(header, OpenSession | CloseSession):
            self._unload(hold.worker)
        else:
            self._drop_empty_runs()

    def _forget(self, peer: Peer) -> list[Send]:
        del self.peers[peer.route], self._by_alias[peer.alias]
        return list(self._silo_gone(peer) if peer.role == "silo" else self._worker_gone(peer))

    def _silo_gone(self, peer: Peer) -> Iterator[Send]:
        silo = self._silos.pop(peer.alias)
        for hold in silo.sessions.values():
            if not hold.lost:
                self._unload(hold.worker)
        self._drop_empty_runs()
        for home in {hold.worker: None for hold in silo.holds()}:
            yield Send(self._by_alias[home].route, Parcel.of(Gone(name=peer.name), peer=peer.alias))

    def _worker_gone(self, worker: Peer) -> Iterator[Send]:
        self._runs = {run: home for run, home in self._runs.items() if home != worker.alias}
        error = UnavailableError(f"worker {worker.name!r} left before it answered", hint=_START_AGAIN)
        for alias, silo in self._silos.items():
            for hold in silo.holds():
                if hold.worker == worker.alias:
                    hold.lost = worker.name
            for request in list(silo.pending):
                if silo.take(request, worker.alias):
                    yield Send(self._by_alias[alias].route, error_parcel(request, error))

    def _drop_empty_runs(self) -> None:
        joined = {run for silo in self._silos.values() for run, hold in silo.runs.items() if not hold.lost}
        for run in [run for run in self._runs if run not in joined]:
            self._unload(self._runs.pop(run))

    def _unload(self, home: bytes) -> None:
        self._by_alias[home].load -= 1

    def _workers(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if peer.role == "worker"]


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
