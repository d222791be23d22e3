"""The trunk service: waiting requests in, the answers they cause out. No sockets, one thread."""

import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import cast

import torch
from torch import Tensor

from broker.parcel import Parcel, error_parcel
from codec import partition
from codec.errors import (
    FrameError,
    LimitError,
    MismatchError,
    ProtocolError,
    TrunklineError,
    UnknownNameError,
)
from codec.logs import Log
from codec.masks import decode_mask
from codec.messages import (
    Adapter,
    Backward,
    CloseRun,
    CloseSession,
    Commit,
    Done,
    Extend,
    Forward,
    GetAdapter,
    Gone,
    Opened,
    OpenRun,
    OpenSession,
    Request,
    Result,
)
from codec.plan import ModelCard
from codec.tensors import decode_tensors
from workers.passes import Waiting, plan_passes
from workers.replies import Reply, encoded, error_header, kind_of, readdressed
from workers.run import TrunkRun
from workers.session import Extension, TrunkSession, extend_together, session_bytes
from workers.span import Span


class TrunkService:
    """Sessions and runs over one hosted span. Names belong to the silo that opened them."""

    def __init__(self, span: Span, card: ModelCard, kv_bytes: int) -> None:
        """`kv_bytes` bounds the KV caches of all sessions together."""
        self._span, self._card, self._kv_bytes = span, card, kv_bytes
        self._sessions: dict[tuple[bytes, str], TrunkSession] = {}
        self._runs: dict[str, TrunkRun] = {}
        self._keys = count()
        self._log = Log("worker")
        self._begun = 0.0

    def handle(self, parcels: Sequence[Parcel]) -> list[Parcel]:
        """Carry out what waits, together where that can be. Never raises: what went wrong is an answer.

        A silo's own requests keep their order.
        """
        answers: list[Parcel] = []
        for members in plan_passes([self._waiting(parcel) for parcel in parcels]):
            chosen = [parcels[index] for index in members]
            if isinstance(chosen[0].header, Extend):
                answers += self._extend(chosen)
            else:
                answers += self._guarded(chosen[0], self._carry_out)
        return answers

    def _waiting(self, parcel: Parcel) -> Waiting:
        header, silo = parcel.header, parcel.peer
        if not isinstance(header, Extend) or header.mask is not None:
            return Waiting(silo)
        session = self._sessions.get((silo, header.session))
        if session is None:
            return Waiting(silo)
        return Waiting(silo, session.place, (silo, header.session), sum(header.lengths))

    def _guarded(self, parcel: Parcel, work: Callable[[Parcel], list[Parcel]]) -> list[Parcel]:
        """What `work` answers, or the error it raised as an answer."""
        header = parcel.header
        try:
            return work(parcel)
        except TrunklineError as error:
            return [error_parcel(header.id, error).to(parcel.peer)]
        except Exception as error:
            self._log.failed("request failed", kind=type(header).__name__)
            trouble = TrunklineError(
                f"the worker failed: {type(error).__name__}: {error}", side="worker", hint="See its log."
            )
            return [error_parcel(header.id, trouble).to(parcel.peer)]

    def _carry_out(self, parcel: Parcel) -> list[Parcel]:
        header = parcel.header
        if isinstance(header, Gone):
            return [encoded(reply) for reply in self._gone(parcel.peer, header)]
        if not isinstance(header, Request):
            return []
        tensors, mask = self._opened_up(header, parcel)
        return [encoded(reply) for reply in self._dispatch(parcel.peer, header, tensors, mask)]

    def _opened_up(self, header: Request, parcel: Parcel) -> tuple[list[Tensor], Tensor | None]:
        """The request's tensors and mask; the clock of its computation starts."""
        frames = parcel.buffers()
        mask = _mask(header, frames)
        tensors = decode_tensors(
            header.tensors, frames, boundary=f"silo's {kind_of(header)}", device=self._span.device
        )
        self._begun = time.monotonic()
        return tensors, mask

    def _extend(self, parcels: Sequence[Parcel]) -> list[Parcel]:
        """Extend several sessions in as few passes as their places allow; each has its own errors."""
        answers: list[Parcel] = []
        ready: dict[object, list[tuple[Parcel, Extension]]] = {}

        def prepare(parcel: Parcel) -> list[Parcel]:
            extension = self._extension(parcel)
            # Asked again: since the passes were planned a session may have been opened anew.
            ready.setdefault(extension.session.place, []).append((parcel, extension))
            return []

        for parcel in parcels:
            answers += self._guarded(parcel, prepare)
        for group in ready.values():
            self._begun = time.monotonic()

            def together(_: Parcel, group: Sequence[tuple[Parcel, Extension]] = group) -> list[Parcel]:
                results = extend_together(self._span, [extension for _, extension in group])
                return [
                    encoded(self._result(parcel.peer, cast("Extend", parcel.header), [result]))
                    for (parcel, _), result in zip(group, results, strict=True)
                ]

            done = self._guarded(group[0][0], together)
            answers += done
            # One error answers for all that ran together.
            answers += [readdressed(done[0], parcel) for parcel, _ in group[len(done) :]]
        return answers

    def _extension(self, parcel: Parcel) -> Extension:
        request, silo = cast("Extend", parcel.header), parcel.peer
        tensors, mask = self._opened_up(request, parcel)
        session = self._session(silo, request.session)
        packed = self._packed(tensors, sum(request.lengths))
        return Extension(session, request.lengths, session.prepare(request), packed, mask)

    def _dispatch(
        self, silo: bytes, request: Request, tensors: list[Tensor], mask: Tensor | None
    ) -> list[Reply]:
        match request:
            case Forward():
                run = self._run(silo, request.run)
                packed = self._packed(tensors, sum(request.lengths))
                result = run.forward(silo, request, packed, mask)
                return [self._result(silo, request, [result])]
            case Backward():
                run = self._run(silo, request.run)
                gradient = run.backward(silo, request, self._packed(tensors, None))
                return [self._result(silo, request, [] if gradient is None else [gradient])]
            case Commit():
                ends = _named(request.names, tensors)
                answers = self._run(silo, request.run).commit(silo, request, ends)
                return [Reply(member, header, summed) for member, (header, summed) in answers.items()]
            case GetAdapter():
                adapter = self._run(silo, request.run).adapter()
                return [Reply(silo, Adapter(id=request.id, names=tuple(adapter)), list(adapter.values()))]
            case OpenSession():
                return [self._open_session(silo, request, tensors)]
            case OpenRun():
                return [self._open_run(silo, request, tensors)]
            case CloseSession():
                self._session(silo, request.session).close()
                del self._sessions[silo, request.session]
            case CloseRun():
                self._run(silo, request.run)
                waiting = self._leave_run(silo, request.run, None)
                return [*waiting, Reply(silo, Done(id=request.id))]
        return [Reply(silo, Done(id=request.id))]

    def _open_session(self, silo: bytes, request: OpenSession, tensors: list[Tensor]) -> Reply:
        self._check_model(request)
        if request.names and request.adapter is None:
            raise ProtocolError("tensors came without the adapter they belong to")
        before = self._sessions.get((silo, request.session))
        held = sum(session.bytes for session in self._sessions.values() if session is not before)
        wanted = session_bytes(self._span, request)
        if held + wanted > self._kv_bytes:
            raise LimitError(
                f"the session needs {wanted >> 20} MiB of KV cache, {(self._kv_bytes - held) >> 20} are free",
                hint="Ask for fewer rows or tokens, wait, or start the worker with more --kv-memory.",
            )
        adapter = _named(request.names, tensors)
        session = TrunkSession(self._span, f"a{next(self._keys)}", request, adapter)
        if before is not None:
            before.close()  # Opened again: from the start.
        self._sessions[silo, request.session] = session
        return Reply(silo, Opened(id=request.id))

    def _open_run(self, silo: bytes, request: OpenRun, tensors: list[Tensor]) -> Reply:
        self._check_model(request)
        blocks = partition.Span(request.start, request.stop)
        initial = _named(request.names, tensors)
        run = self._runs.get(request.run)
        if run is None:
            run = TrunkRun(self._span, f"a{next(self._keys)}", request.plan, blocks, initial)
            self._runs[request.run] = run
        run.join(silo, request.plan, blocks, initial)
        self._log.say("silo joined run", run=request.run, silos=len(run.ledger.members))
        return Reply(silo, Opened(id=request.id, step=run.ledger.step))

    def _check_model(self, request: OpenSession | OpenRun) -> None:
        if why := self._card.differs_from(request.model):
            raise MismatchError(
                f"silo and worker hold different models: {why}", hint="Give both the same --model."
            )
        blocks = partition.Span(request.start, request.stop)
        if not self._span.blocks.contains(blocks):
            raise MismatchError(f"this worker hosts blocks {self._span.blocks}", side="worker")
        if not len(blocks):
            raise ProtocolError(f"a trunk {blocks} has no blocks")

    def _session(self, silo: bytes, name: str) -> TrunkSession:
        session = self._sessions.get((silo, name))
        if session is None:
            raise UnknownNameError(f"you have no session {name!r} open")
        return session

    def _run(self, silo: bytes, name: str) -> TrunkRun:
        run = self._runs.get(name)
        if run is None or silo not in run.ledger.members:
            raise UnknownNameError(f"you have no run {name!r} open")
        return run

    def _packed(self, tensors: list[Tensor], tokens: int | None) -> Tensor:
        hidden = self._card.hidden
        if len(tensors) != 1 or tensors[0].dim() != 2 or tensors[0].shape[1] != hidden:
            raise MismatchError(f"one tensor [tokens, {hidden}] is expected")
        if tokens is not None and tensors[0].shape[0] != tokens:
            raise MismatchError(f"the lengths sum to {tokens}, the tensor holds {tensors[0].shape[0]} tokens")
        return tensors[0]

    def _result(self, silo: bytes, request: Extend | Forward | Backward, tensors: list[Tensor]) -> Reply:
        header = Result(id=request.id, seconds=time.monotonic() - self._begun)
        return Reply(silo, header, tensors, request.wire, isinstance(request, Backward))

    def _leave_run(self, silo: bytes, name: str, gone: str | None) -> list[Reply]:
        run = self._runs[name]
        vain = run.leave(silo, gone)
        replies = []
        for member, commit in vain.items():
            try:
                run.ledger.check(member)
            except TrunklineError as error:
                replies.append(Reply(member, error_header(commit.id, error)))
        if not run.ledger.members:
            self._runs.pop(name).close()
        return replies

    def _gone(self, silo: bytes, header: Gone) -> list[Reply]:
        """Free what a silo held, or what all of them held if the peer frame names none."""
        self._log.say("silo gone", silo=header.name)
        for key in [key for key in self._sessions if silo in (key[0], b"")]:
            self._sessions.pop(key).close()
        joined = [(n, m) for n, run in self._runs.items() for m in run.ledger.members if silo in (m, b"")]
        return [reply for name, member in joined for reply in self._leave_run(member, name, header.name)]


def _mask(request: Request, frames: list[memoryview]) -> Tensor | None:
    """The request's mask, bool `[T, T]`, if it has one; its frame, the last, is taken off `frames`.

    Raises `MismatchError` and `FrameError`.
    """
    if not isinstance(request, Extend | Forward) or request.mask is None:
        return None
    tokens, spec = sum(request.lengths), request.mask
    if (spec.queries, spec.keys) != (tokens, tokens):
        raise MismatchError(f"a mask of {spec.queries} by {spec.keys} for {tokens} tokens")
    if not frames:
        raise FrameError("a mask is declared, and no frame follows")
    mask = torch.from_numpy(decode_mask(spec, frames.pop()))
    if not bool(mask.diagonal().all()):
        raise MismatchError("a mask in which a token does not see itself")
    return mask


def _named(names: tuple[str, ...], tensors: list[Tensor]) -> dict[str, Tensor]:
    if len(set(names)) != len(tensors) or len(names) != len(tensors):
        raise ProtocolError(f"{len(tensors)} tensors came with {len(names)} names")
    return dict(zip(names, tensors, strict=True))
