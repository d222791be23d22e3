"""What the broker decides: who a message goes to. Pure decisions over state, no sockets.

`Router.handle` takes one arrived message and the time and returns the messages to send.
A session and a run stay with the worker that opened them; every request of a silo is remembered
until its answer passes, so that a worker's death is told to everyone who waits for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from broker.parcel import Parcel
from broker.pool import Peer, choose_worker, peer_from
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
    Attach,
    CloseRun,
    CloseSession,
    Error,
    Extend,
    Gone,
    Heartbeat,
    Leave,
    OpenRun,
    OpenSession,
    Request,
    Welcome,
)
from codec.partition import Span

_SESSION = (OpenSession, Extend, CloseSession)


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


@dataclass(slots=True)
class Pending:
    """A request on its way: which worker has it, what it weighs, and its header if it opens a name."""

    worker: bytes
    size: int
    opens: OpenSession | OpenRun | None


@dataclass(slots=True)
class Silo:
    """What the broker keeps of one silo: open sessions, joined runs, unanswered requests."""

    sessions: dict[str, bytes] = field(default_factory=dict)
    runs: set[str] = field(default_factory=set)
    pending: dict[int, Pending] = field(default_factory=dict)
    pending_bytes: int = 0


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
                raise LinkError("this connection is not attached")
            peer.last_heard = now
            if isinstance(header, Heartbeat):
                return [Send(route, Parcel.of(Heartbeat()))]
            if isinstance(header, Leave):
                return self._forget(peer)
            if peer.role == "silo" and isinstance(header, Request):
                return self._request(peer, header, parcel)
            if peer.role == "worker" and isinstance(header, Answer):
                return self._answer(peer, header, parcel)
            raise ProtocolError(f"a {peer.role} may not send this kind of message", side=peer.role)
        except TrunklineError as error:
            request = 0 if isinstance(error, LinkError) else header.id
            return [Send(route, error_parcel(request, error))]

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
        if before is not None:
            # The same secret identity on a new connection: its sessions and runs come along.
            if before.role != peer.role:
                raise ProtocolError(f"this identity is attached as a {before.role}", side=peer.role)
            self.peers.pop(before.route, None)
            peer.load = before.load
        self.peers[route] = self._by_alias[peer.alias] = peer
        if peer.role == "silo":
            self._silos.setdefault(peer.alias, Silo())
        return [Send(route, Parcel.of(Welcome(id=attach.id, heartbeat=self.limits.heartbeat)))]

    def _request(self, peer: Peer, header: Request, parcel: Parcel) -> list[Send]:
        silo, size = self._silos[peer.alias], parcel.size
        if header.id in silo.pending:
            raise ProtocolError(f"request {header.id} is already on its way")
        if len(silo.pending) >= self.limits.requests or silo.pending_bytes + size > self.limits.bytes:
            raise LimitError(
                f"{len(silo.pending)} requests ({silo.pending_bytes} bytes) wait for answers already",
                side="silo",
                hint="Keep fewer micro-batches in flight (--window).",
            )
        worker = self._worker_for(silo, header)
        opens = header if isinstance(header, OpenSession | OpenRun) else None
        silo.pending[header.id] = Pending(worker.alias, size, opens)
        silo.pending_bytes += size
        if isinstance(header, CloseSession | CloseRun):
            self._release(silo, header)
        return [Send(worker.route, parcel.to(peer.alias))]

    def _worker_for(self, silo: Silo, header: Request) -> Peer:
        if isinstance(header, _SESSION):
            home = silo.sessions.get(header.session)
            if isinstance(header, OpenSession) and home is None:
                worker = choose_worker(self._workers(), header.model, Span(header.start, header.stop))
                silo.sessions[header.session] = worker.alias
                worker.load += 1
                return worker
            name = header.session
        else:
            name = header.run
            if isinstance(header, OpenRun):
                if name not in self._runs:
                    worker = choose_worker(self._workers(), header.model, Span(header.start, header.stop))
                    self._runs[name] = worker.alias
                    worker.load += 1
                silo.runs.add(name)
            home = self._runs.get(name) if name in silo.runs else None
        if home is None:
            raise UnknownNameError(f"you have no session or run {name!r} open")
        return self._by_alias[home]

    def _answer(self, worker: Peer, header: Answer, parcel: Parcel) -> list[Send]:
        silo, peer = self._silos.get(parcel.peer), self._by_alias.get(parcel.peer)
        if silo is None or peer is None:
            return []  # The silo left meanwhile.
        pending = silo.pending.get(header.id)
        if pending is None or pending.worker != worker.alias:
            return []  # Answered already, or not this worker's to answer.
        del silo.pending[header.id]
        silo.pending_bytes -= pending.size
        if pending.opens is not None and isinstance(header, Error):
            self._release(silo, pending.opens)
        return [Send(peer.route, parcel.to(b""))]

    def _release(self, silo: Silo, header: OpenSession | OpenRun | CloseSession | CloseRun) -> None:
        """A name was closed, or never came to be: it is free again."""
        if isinstance(header, OpenSession | CloseSession):
            self._unload(silo.sessions.pop(header.session, None))
        else:
            silo.runs.discard(header.run)
            self._drop_empty_runs()

    def _forget(self, peer: Peer) -> list[Send]:
        self.peers.pop(peer.route, None)
        if self._by_alias.get(peer.alias) is peer:
            del self._by_alias[peer.alias]
        return list(self._silo_gone(peer) if peer.role == "silo" else self._worker_gone(peer))

    def _silo_gone(self, peer: Peer) -> Iterator[Send]:
        silo = self._silos.pop(peer.alias)
        homes = {self._runs[run] for run in silo.runs if run in self._runs} | set(silo.sessions.values())
        for home in silo.sessions.values():
            self._unload(home)
        self._drop_empty_runs()
        for worker in (self._by_alias.get(home) for home in homes):
            if worker is not None:
                yield Send(worker.route, Parcel.of(Gone(name=peer.name), peer=peer.alias))

    def _worker_gone(self, worker: Peer) -> Iterator[Send]:
        self._runs = {run: home for run, home in self._runs.items() if home != worker.alias}
        error = UnavailableError(
            f"worker {worker.name!r} left before it answered", hint="Start it again and repeat the command."
        )
        for alias, silo in self._silos.items():
            silo.sessions = {s: home for s, home in silo.sessions.items() if home != worker.alias}
            for request in [i for i, p in silo.pending.items() if p.worker == worker.alias]:
                silo.pending_bytes -= silo.pending.pop(request).size
                yield Send(self._by_alias[alias].route, error_parcel(request, error))

    def _drop_empty_runs(self) -> None:
        joined = {run for silo in self._silos.values() for run in silo.runs}
        for run in [run for run in self._runs if run not in joined]:
            self._unload(self._runs.pop(run))

    def _unload(self, home: bytes | None) -> None:
        worker = self._by_alias.get(home) if home else None
        if worker is not None:
            worker.load -= 1

    def _workers(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if peer.role == "worker"]


def error_parcel(request: int, error: TrunklineError) -> Parcel:
    """An error as the answer to `request`; 0 for one that concerns the connection."""
    return Parcel.of(Error(id=request, code=error.code, what=error.what, side=error.at, hint=error.hint))
