"""The trunk service: opened-up requests in, the replies they cause out. No sockets, one thread.

What comes is put on the agenda; `next_pass` carries out what the agenda says comes first, together
with everything that may share its pass.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor

from broker.ask import Rank, cost, flow_of
from codec.errors import TrunklineError
from codec.logs import Log
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
from workers.activations import Activations, Gradient, MicroBatch
from workers.agenda import MAX_PASS_TOKENS, Agenda, Job, Pass, Share
from workers.busy import Busy
from workers.holdings import Holdings
from workers.inbound import Trunk, Work
from workers.parts import Part
from workers.replies import Reply, error_header, unexpected
from workers.runs import Runs
from workers.session import Extension
from workers.span import Span
from workers.state import StateStore

T = TypeVar("T")
Outcome = Tensor | TrunklineError | list[Reply] | None
"""What came of a job: its part of a pass, an error, or what to tell whom."""

ACTIVATION_BYTES = 4 << 30
ADAPTER_BYTES = 8 << 30
_STALL_S = 0.1
"""How much longer a decode pass may take because a part of a prompt is in it, or twice its time."""
_LEAST_CHUNK, _FIRST_CHUNK = 16, 64


class TrunkService:
    """Sessions and runs over one hosted span. Names belong to the silo that opened them."""

    def __init__(
        self,
        span: Span,
        card: ModelCard,
        kv_bytes: int,
        activation_bytes: int = ACTIVATION_BYTES,
        store: StateStore | None = None,
        *,
        kv_share: int | None = None,
        activation_share: int | None = None,
        adapter_bytes: int = ADAPTER_BYTES,
    ) -> None:
        """Bounds on the KV caches of all sessions, on what waits between forward and backward, and on
        adapters; and how much of the first two is each silo's own, all of it by default.

        With a `store` runs survive this worker, and silos that vanish.
        """
        self._span, self._card = span, card
        self.busy = Busy(span.device)
        self.holdings = Holdings(span, card, kv_bytes, kv_share or kv_bytes, adapter_bytes, self.busy)
        self.holdings.asked = self._asked
        self.activations = Activations(span, activation_bytes, activation_share or activation_bytes)
        self.runs = Runs(self.holdings, self.activations, store)
        self._agenda = Agenda(joint_tokens=span.filling)
        self._works: dict[Job, Work] = {}
        self.answered_bytes = 0
        """Of the tensors that requests brought, those that are not needed any more."""
        self._extensions: dict[Job, Extension] = {}
        self._chunk, self._forward_s, self._decode_s = _FIRST_CHUNK, 0.0, 0.0
        self._log = Log("worker")

    @property
    def trunk(self) -> Trunk:
        """What passes take."""
        return Trunk(self._span.device, self._span.dtype, self._card.hidden)

    @property
    def idle(self) -> bool:
        """Whether nobody holds anything here, nothing waits, and everything is saved."""
        return not self._agenda.waiting and not self.holdings and not self.runs.saver.pending

    def add(self, work: Work) -> None:
        """A message came; what is neither a request nor about a silo that is gone is nobody's business."""
        if not isinstance(work.header, Request | Gone):
            return
        job = self._job(work)
        self._works[job] = work
        self._agenda.add(job, work.arrived)

    def wait(self, now: float) -> float | None:
        """After `next_pass` found nothing: seconds until it will; None if only a request can tell."""
        due = self._agenda.due()
        return None if due is None else max(0.0, due - now)

    def next_pass(self, now: float) -> list[Reply] | None:
        """Carry out what comes next; None if nothing may run. Never raises: errors are replies."""
        if (saved := self.runs.saver.finished()) is not None:
            return saved
        chosen = self._agenda.next_pass(now, self._chunk, self.activations.members, self._decode_s)
        if chosen is None:
            return None
        tokens = sum(share.tokens for share in chosen.shares)
        begun = time.monotonic()
        with self.busy.counting(chosen.kind, tokens):
            outcomes = self._carry_out(chosen)
        seconds = time.monotonic() - begun
        self._learn(chosen, seconds)
        replies = [reply for job, came in outcomes.items() for reply in self._replies(job, came, seconds)]
        self._agenda.answered((job for job in outcomes if job.kind == "decode"), begun + seconds)
        return replies

    def _job(self, work: Work) -> Job:
        """Where a request belongs on the agenda."""
        silo, header = work.silo, work.header
        if not isinstance(header, Request):
            return Job(silo, "alone")
        flow = flow_of(silo, header)
        if work.trouble is not None or not isinstance(header, Extend | Forward | Backward):
            return Job(silo, "alone", flow)
        rank, tokens = cost(header)
        if isinstance(header, Extend):
            decode = rank is Rank.DECODE
            whole = decode or work.mask is not None
            return Job(silo, "decode" if decode else "prefill", flow, flow, tokens, whole)
        unit = (*flow, header.microbatch)
        if isinstance(header, Forward):
            return Job(silo, "forward", flow, unit, tokens)
        group = self.activations.group((silo, header.run, header.microbatch))
        return Job(silo, "backward", flow, unit, tokens, group=group, due=work.arrived + self._forward_s)

    def _learn(self, chosen: Pass, seconds: float) -> None:
        """How much of a prompt a decode pass can bear, and how long micro-batches wait for each other."""
        if chosen.kind == "forward":
            self._forward_s = seconds
        if chosen.kind not in ("decode", "prefill"):
            return
        prompts = sum(share.tokens for share in chosen.shares if share.job.kind == "prefill")
        steps = self._decode_s if chosen.kind == "decode" else 0.0
        if not prompts:
            self._decode_s = seconds
        elif prompts >= _LEAST_CHUNK:
            stall = max(_STALL_S, self._decode_s)
            bearable = int(stall * prompts / max(seconds - steps, 1e-3))
            self._chunk = max(_LEAST_CHUNK, min(MAX_PASS_TOKENS, bearable))

    def _carry_out(self, chosen: Pass) -> dict[Job, Outcome]:
        match chosen.kind:
            case "alone":
                (job,) = (share.job for share in chosen.shares)
                return {job: self._attempt(job, lambda: self._alone(self._works[job]))}
            case "forward":
                return self._together(chosen, self._micro_batch, self.activations.forward)
            case "backward":
                return self._together(chosen, self._gradient, self.activations.backward)
        return self._together(chosen, self._part, self._extend)

    def _together(
        self,
        chosen: Pass,
        prepare: Callable[[Share], T],
        compute: Callable[[list[T]], Sequence[Tensor | None]],
    ) -> dict[Job, Outcome]:
        """Prepare each share, each with its own errors, and compute all of them in one pass."""
        outcomes: dict[Job, Outcome] = {}
        ready: dict[Job, T] = {}
        for share in chosen.shares:
            prepared = self._attempt(share.job, partial(prepare, share))
            if isinstance(prepared, TrunklineError):
                outcomes[share.job] = prepared
            else:
                ready[share.job] = prepared
        if ready:
            results = self._attempt(next(iter(ready)), lambda: compute(list(ready.values())))
            if isinstance(results, TrunklineError):
                outcomes.update(dict.fromkeys(ready, results))
            else:
                outcomes.update(zip(ready, results, strict=True))
        return outcomes

    def _attempt(self, job: Job, work: Callable[[], T]) -> T | TrunklineError:
        """What `work` returns, or the error that it raised."""
        try:
            return work()
        except TrunklineError as error:
            return error
        except Exception as error:
            self._log.failed("request failed", kind=job.kind)
            return unexpected(error)

    def _replies(self, job: Job, came: Outcome, seconds: float) -> list[Reply]:
        """What a job's outcome is told as, and to whom; nothing yet for a prompt that goes on."""
        work, extension = self._works[job], self._extensions.get(job)
        request = work.header
        if extension is not None:
            extension.seconds += seconds
            seconds = extension.seconds
            if came is None:
                return []
            del self._extensions[job]
            extension.ended()
        self._agenda.drop(job)
        del self._works[job]
        self.answered_bytes += work.bytes
        if isinstance(came, TrunklineError):
            return [Reply(work.silo, error_header(request.id, came))]
        if isinstance(came, list):
            return came
        assert isinstance(request, Extend | Forward | Backward)
        tensors = [] if came is None else [came]
        header = Result(id=request.id, seconds=seconds)
        return [Reply(work.silo, header, tensors, request.wire, isinstance(request, Backward))]

    def _part(self, share: Share) -> tuple[Extension, Part]:
        extension = self._extensions.get(share.job)
        if extension is None:
            work = self._works[share.job]
            request = cast("Extend", work.header)
            session = self.holdings.session(work.silo, request.session)
            extension = self._extensions[share.job] = Extension(session, request, work.tensors[0], work.mask)
        return extension, extension.part(share.tokens)

    @torch.no_grad()
    def _extend(self, parts: list[tuple[Extension, Part]]) -> list[Tensor | None]:
        outputs = self._span.run_parts([part for _, part in parts])
        return [extension.came_out(output) for (extension, _), output in zip(parts, outputs, strict=True)]

    def _micro_batch(self, share: Share) -> MicroBatch:
        work = self._works[share.job]
        request = cast("Forward", work.header)
        run = self.holdings.run(work.silo, request.run)
        run.ledger.check(work.silo)
        key, entry = (work.silo, request.run, request.microbatch), work.tensors[0]
        batch = MicroBatch(key, run, entry, request.lengths, work.mask)
        self.activations.check_room(batch)
        run.ledger.takes_part(work.silo)
        return batch

    def _gradient(self, share: Share) -> Gradient:
        work = self._works[share.job]
        request = cast("Backward", work.header)
        run = self.holdings.run(work.silo, request.run)
        run.ledger.check(work.silo)
        key = (work.silo, request.run, request.microbatch)
        gradient = Gradient(key, work.tensors[0], request.wants_gradient)
        self.activations.check(gradient)
        return gradient

    def _alone(self, work: Work) -> list[Reply]:
        silo, request = work.silo, work.header
        if work.trouble is not None:
            raise work.trouble
        match request:
            case Gone():
                return self._gone(silo, request)
            case OpenSession():
                self.holdings.open_session(silo, request, work.tensors)
                return [Reply(silo, Opened(id=request.id))]
            case CloseSession():
                self.holdings.close_session(silo, request.session)
            case OpenRun():
                return self.runs.open(silo, request, work.tensors)
            case Commit():
                return self.runs.commit(silo, request, work.tensors)
            case GetAdapter():
                adapter = self.holdings.run(silo, request.run).adapter()
                return [Reply(silo, Adapter(id=request.id, names=tuple(adapter)), list(adapter.values()))]
            case CloseRun():
                return self.runs.close(silo, request)
        return [Reply(silo, Done(id=request.id))]

    def _asked(self) -> set[tuple[bytes, str]]:
        """The sessions that requests wait for."""
        works = self._works.values()
        return {(work.silo, work.header.session) for work in works if isinstance(work.header, Extend)}

    def _gone(self, silo: bytes, header: Gone) -> list[Reply]:
        """Free what a silo held, or what all of them held if the peer frame names none."""
        self._log.say("silo gone", silo=header.name)
        sessions, joined = self.holdings.held_by(silo)
        for key in sessions:
            self.holdings.close_session(*key)
        replies = self.runs.forget(silo)
        for member, name in joined:
            replies += self.runs.gone(member, name, header.name)
        return replies
