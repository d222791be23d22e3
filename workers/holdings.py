"""What the silos hold at a worker: sessions and runs, opened, found and given back by name.

A name belongs to the silo that opened it; a run belongs to the silos that joined it.
"""

import secrets
import time
from collections.abc import Callable, Container, Mapping
from itertools import count

from torch import Tensor

from codec import partition
from codec.errors import MismatchError, ProtocolError, UnknownNameError
from codec.messages import OpenRun, OpenSession
from codec.plan import ModelCard
from workers.busy import Busy
from workers.kv import KVMemory
from workers.run import Durable, TrunkRun
from workers.session import TrunkSession
from workers.span import Span
from workers.state import Found, RunState, StateStore

_IDLE_S = 5.0
"""A session that was used since is not closed for another's sake: both would be sent again in turns."""


class Holdings:
    """Sessions and runs over one hosted span."""

    def __init__(self, span: Span, card: ModelCard, kv_bytes: int, busy: Busy) -> None:
        """`kv_bytes` bounds the KV caches of all sessions together."""
        self._span, self._card, self._busy = span, card, busy
        self.memory = KVMemory(kv_bytes)
        self.memory.make_room = self._evict
        self._sessions: dict[tuple[bytes, str], TrunkSession] = {}
        self.runs: dict[str, TrunkRun] = {}
        self._keys = count()
        self.asked: Callable[[], Container[tuple[bytes, str]]] = set
        """Sessions that a request waits for; they are not idle."""
        self.evicted = 0
        """Sessions closed because others needed their memory."""

    def __bool__(self) -> bool:
        return bool(self._sessions or self.runs)

    def session(self, silo: bytes, name: str) -> TrunkSession:
        """Raises `UnknownNameError` for what this silo has not opened."""
        session = self._sessions.get((silo, name))
        if session is None:
            raise UnknownNameError(f"you have no session {name!r} open")
        return session

    def run(self, silo: bytes, name: str) -> TrunkRun:
        """Raises `UnknownNameError` for what this silo has not joined."""
        run = self.runs.get(name)
        if run is None or silo not in run.ledger.members:
            raise UnknownNameError(f"you have no run {name!r} open")
        return run

    def open_session(self, silo: bytes, request: OpenSession, tensors: list[Tensor]) -> None:
        """Open a session, anew if it was open.

        Raises `LimitError` if there is no memory for it, `MismatchError` and `ProtocolError`.
        """
        self.check_model(request)
        if request.names and request.adapter is None:
            raise ProtocolError("tensors came without the adapter they belong to")
        adapter, before = named(request.names, tensors), self._sessions.get((silo, request.session))
        mine = before.bytes if before else 0
        self.memory.held -= mine  # It will be free; and if the new one is refused, it is as it was.
        if before is not None:
            before.running = True
        try:
            session = TrunkSession(self._span, self._key(), request, adapter, self.memory, time.monotonic())
        finally:
            self.memory.held += mine
            if before is not None:
                before.running = False
        if before is not None:
            before.close()
        self._sessions[silo, request.session] = session

    def close_session(self, silo: bytes, name: str) -> None:
        """Free a session. Raises `UnknownNameError`."""
        self.session(silo, name).close()
        del self._sessions[silo, name]

    def open_run(self, request: OpenRun, initial: Mapping[str, Tensor], store: StateStore | None) -> TrunkRun:
        """The run of this name, which is made if there is none; with a store it will survive.

        Raises `MismatchError` if another run has the name, or the first adapter does not fit.
        """
        run = self.runs.get(request.run)
        if run is None:
            ticket, durable = secrets.token_bytes(16), None
            if store is not None:
                durable = Durable(ticket, store.tenure(ticket))
            blocks = partition.Span(request.start, request.stop)
            run = TrunkRun(self._span, self._key(), request.plan, blocks, initial, self._busy, durable)
            self.runs[request.run] = run
        if request.ticket and (run.durable is None or run.durable.ticket != request.ticket):
            raise MismatchError(
                f"another run {request.run!r} is under way here",
                side="silo",
                hint="Wait for its end, or begin anew under another --run.",
            )
        return run

    def resume_run(self, name: str, found: Found, ticket: bytes) -> None:
        """Go on with a saved run. Raises `MismatchError` if it is of another model or name."""
        state = found.state
        if (state.run, state.fingerprint) != (name, self._card.fingerprint):
            raise MismatchError(f"the saved run is {state.run!r}, of another model or name than {name!r}")
        self.runs[name] = TrunkRun.found(self._span, self._key(), found, ticket, self._busy)

    def state_of(self, name: str) -> tuple[RunState, dict[str, Tensor]]:
        """What is to be saved of a run."""
        return self.runs[name].state(name, self._card.fingerprint)

    def close_run(self, name: str) -> None:
        """Free a run that nobody is in any more."""
        self.runs.pop(name).close()

    def held_by(self, silo: bytes) -> tuple[list[tuple[bytes, str]], list[tuple[bytes, str]]]:
        """Its sessions, and its memberships in runs, as (silo, name); everybody's if it is empty."""
        sessions = [key for key in self._sessions if silo in (key[0], b"")]
        joined = [(m, n) for n, run in self.runs.items() for m in run.ledger.members if silo in (m, b"")]
        return sessions, joined

    def _key(self) -> str:
        return f"a{next(self._keys)}"

    def _evict(self, missing: int) -> None:
        """Close sessions that were idle longest and whose silos can send everything again.

        None is closed if all of them together would not do.
        """
        quiet, asked = time.monotonic() - _IDLE_S, self.asked()
        idle = {
            key: session
            for key, session in self._sessions.items()
            if session.replays and not session.running and session.used < quiet and key not in asked
        }
        if sum(session.bytes for session in idle.values()) < missing:
            return
        until = self.memory.held - missing
        for key in sorted(idle, key=lambda key: idle[key].used):
            if self.memory.held <= until:
                return
            self.close_session(*key)
            self.evicted += 1

    def check_model(self, request: OpenSession | OpenRun) -> None:
        """Raises unless this worker can serve the request's blocks of its model."""
        if why := self._card.differs_from(request.model):
            raise MismatchError(
                f"silo and worker hold different models: {why}", hint="Give both the same --model."
            )
        blocks = partition.Span(request.start, request.stop)
        if not self._span.blocks.contains(blocks):
            raise MismatchError(f"this worker hosts blocks {self._span.blocks}", side="worker")
        if not len(blocks):
            raise ProtocolError(f"a trunk {blocks} has no blocks")


def named(names: tuple[str, ...], tensors: list[Tensor]) -> Mapping[str, Tensor]:
    """Tensors by their names. Raises `ProtocolError` unless each has one of its own."""
    if len(set(names)) != len(tensors) or len(names) != len(tensors):
        raise ProtocolError(f"{len(tensors)} tensors came with {len(names)} names")
    return dict(zip(names, tensors, strict=True))
