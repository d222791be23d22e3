"""What the silos hold at a worker: sessions and runs, opened, found and given back by name.

A name belongs to the silo that opened it; a run belongs to the silos that joined it, and only they
reach it by its name.
"""

import secrets
import time
from collections.abc import Callable, Container, Mapping
from functools import partial
from itertools import count

from torch import Tensor

from broker.ask import RunKey, run_key
from codec import partition
from codec.errors import LimitError, MismatchError, ProtocolError, UnknownNameError
from codec.messages import OpenRun, OpenSession
from codec.plan import LoraPlan, ModelCard
from workers.allowance import Allowance
from workers.busy import Busy
from workers.kv import KVMemory
from workers.lora import adapter_bytes
from workers.run import Durable, TrunkRun
from workers.session import TrunkSession
from workers.span import Span
from workers.state import Found, RunState, StateStore

_TRAINED = 5
"""Copies of a run's weights: first values, present ones, gradients, and the optimizer's two moments."""
_IDLE_S = 5.0
"""A session that was used since is not closed for another's sake: both would be sent again in turns."""


class Holdings:
    """Sessions and runs over one hosted span."""

    def __init__(
        self, span: Span, card: ModelCard, kv_bytes: int, kv_share: int, adapter_bytes: int, busy: Busy
    ) -> None:
        """`kv_bytes` bounds the KV caches of all sessions; `kv_share` of them are each silo's own.

        `adapter_bytes` bounds what adapters and their optimizers take; a silo may bring half of it.
        """
        self._span, self._card, self._busy = span, card, busy
        self.memory = KVMemory(kv_bytes)
        self._kv_share = kv_share
        self._shares: dict[bytes, Allowance] = {}
        self._adapter_bytes = adapter_bytes
        self._adapters: dict[str, tuple[bytes, int]] = {}
        self._sessions: dict[tuple[bytes, str], TrunkSession] = {}
        self.runs: dict[RunKey, TrunkRun] = {}
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
        run = self._joined(silo, name)
        if run is None:
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
        share = self._share(silo)
        mine = before.bytes if before else 0
        share.held -= mine  # It will be free; and if the new one is refused, it is as it was.
        if before is not None:
            before.running = True
        try:
            self._check_share(share, request)
            size = self._check_adapter(silo, request.adapter, request, before.key if before else None)
            session = TrunkSession(self._span, self._key(), request, adapter, share, time.monotonic())
        finally:
            share.held += mine
            if before is not None:
                before.running = False
        if before is not None:
            before.close()
            self._adapters.pop(before.key or "", None)
        if session.key is not None:
            self._adapters[session.key] = silo, size
        self._sessions[silo, request.session] = session
        self._shares[silo] = share

    def close_session(self, silo: bytes, name: str) -> None:
        """Free a session. Raises `UnknownNameError`."""
        session = self.session(silo, name)
        session.close()
        self._adapters.pop(session.key or "", None)
        del self._sessions[silo, name]
        if all(owner != silo for owner, _ in self._sessions):
            del self._shares[silo]

    def open_run(
        self, silo: bytes, request: OpenRun, initial: Mapping[str, Tensor], store: StateStore | None
    ) -> TrunkRun:
        """The run of this name and members, which is made if there is none; with a store it will survive.

        That the silo is one of the plan's members is the broker's to check: it knows names. Raises
        `MismatchError` if another run has the name, or the first adapter does not fit.
        """
        key = run_key(request)
        run = self.runs.get(key)
        if (joined := self._joined(silo, request.run)) is not None and joined is not run:
            raise MismatchError(f"you are in a run {request.run!r} of other members")
        if run is None:
            ticket, durable = secrets.token_bytes(16), None
            if store is not None:
                durable = Durable(request.run, ticket, store.tenure(ticket))
            size = self._check_adapter(silo, request.plan.lora, request, copies=_TRAINED)
            blocks = partition.Span(request.start, request.stop)
            run = TrunkRun(self._span, self._key(), request.plan, blocks, initial, self._busy, durable)
            self._adapters[run.key] = silo, size
            self.runs[key] = run
        if request.ticket and (run.durable is None or run.durable.ticket != request.ticket):
            raise MismatchError(
                f"another run {request.run!r} is under way here",
                side="silo",
                hint="Wait for its end, or begin anew: without --resume, or under another --run.",
            )
        return run

    def resume_run(self, silo: bytes, request: OpenRun, found: Found) -> None:
        """Go on with the saved run that a silo asked for.

        Raises `MismatchError` if it is of another model or name, and `LimitError` if it is too large.
        """
        state, key = found.state, run_key(request)
        saved = *(state.plan.members, state.run), state.fingerprint, state.start, state.stop
        if saved != (*key, self._card.fingerprint, request.start, request.stop):
            raise MismatchError(
                f"the saved run is {state.run!r}, of another model, trunk or name than {key[1]!r}"
            )
        size = self._check_adapter(silo, state.plan.lora, request, copies=_TRAINED)
        run = TrunkRun.found(self._span, self._key(), found, request.ticket, self._busy)
        self._adapters[run.key] = silo, size
        self.runs[key] = run

    def state_of(self, run: TrunkRun) -> tuple[RunState, dict[str, Tensor]]:
        """What is to be saved of a run."""
        return run.state(self._card.fingerprint)

    def close_run(self, run: TrunkRun) -> None:
        """Free a run that nobody is in any more."""
        self.runs = {key: other for key, other in self.runs.items() if other is not run}
        self._adapters.pop(run.key, None)
        run.close()

    def held_by(self, silo: bytes) -> tuple[list[tuple[bytes, str]], list[tuple[bytes, str]]]:
        """Its sessions, and its memberships in runs, as (silo, name); everybody's if it is empty."""
        sessions = [key for key in self._sessions if silo in (key[0], b"")]
        joined = [
            (m, name) for (_, name), run in self.runs.items() for m in run.ledger.members if silo in (m, b"")
        ]
        return sessions, joined

    def _key(self) -> str:
        return f"a{next(self._keys)}"

    def _joined(self, silo: bytes, name: str) -> TrunkRun | None:
        """Of all runs of this name the one that the silo is in."""
        found = (run for (_, n), run in self.runs.items() if n == name and silo in run.ledger.members)
        return next(found, None)

    def _share(self, silo: bytes) -> Allowance:
        """What is this silo's own of the memory."""
        share = self._shares.get(silo)
        if share is None:
            share = Allowance(self.memory, self._kv_share)
            share.make_room = partial(self._evict, share)
        return share

    def _check_share(self, share: Allowance, request: OpenSession) -> None:
        """Raises `LimitError` if memory that cannot be taken back would be borrowed."""
        if request.replays:
            return
        shape = self._span.kv_shape(partition.Span(request.start, request.stop))
        needed, free = shape.bytes_for(request.rows * request.capacity), max(0, share.budget - share.held)
        if needed > free:
            raise LimitError(
                f"{needed / (1 << 20):.3g} MiB of KV cache are needed, {free / (1 << 20):.3g} of this "
                "silo's share are free (--kv-per-silo)",
                side="worker",
                hint="Ask for fewer rows or tokens, or start the worker with more --kv-memory.",
            )

    def _check_adapter(
        self,
        silo: bytes,
        plan: LoraPlan | None,
        request: OpenSession | OpenRun,
        instead: str | None = None,
        copies: int = 1,
    ) -> int:
        """What `copies` of an adapter's weights take. The one that it comes `instead` of counts for nothing.

        Raises `LimitError` if that is too much, and `ModelError` for targets that are not there.
        """
        if plan is None:
            return 0
        size = copies * adapter_bytes(self._span, plan, partition.Span(request.start, request.stop))
        others = [held for key, held in self._adapters.items() if key != instead]
        mine, all_ = sum(n for owner, n in others if owner == silo), sum(n for _, n in others)
        if mine + size > self._adapter_bytes // 2 or all_ + size > self._adapter_bytes:
            raise LimitError(
                f"an adapter of {size >> 20} MiB with its optimizer, beside {mine >> 20} MiB of this silo's "
                f"and {all_ >> 20} of all; {self._adapter_bytes >> 20} may be, half of them one silo's "
                "(--adapter-memory)",
                side="worker",
                hint="Use a lower --rank or fewer --lora-targets, or close a run or session.",
            )
        return size

    def _evict(self, asking: Allowance, missing: int) -> None:
        """Close sessions whose silos can send everything again: those that were idle longest, and then,
        if what is asked for is the silo's own, those for which others have borrowed.

        None is closed if all of them together would not do.
        """
        quiet, asked = time.monotonic() - _IDLE_S, self.asked()
        borrowed = {silo: share.borrowed for silo, share in self._shares.items()}
        ready = {k: one for k, one in self._sessions.items() if one.replays and not one.running}
        busy = {key for key, session in ready.items() if session.used >= quiet or key in asked}
        leaving, found = [], 0
        for key in sorted(ready, key=lambda key: (key in busy, ready[key].used)):
            if found >= missing:
                break
            if key not in busy or (asking.held < asking.budget and borrowed[key[0]] > 0):
                leaving.append(key)
                found += ready[key].bytes
                borrowed[key[0]] -= ready[key].bytes
        if found >= missing:
            for key in leaving:
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
