"""A run on its home worker: the trunk's part of one fine-tuning job."""

import hashlib
import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from codec import partition
from codec.errors import MismatchError, TrunklineError, UnavailableError
from codec.messages import Commit, Committed, OpenRun
from codec.plan import RunPlan
from workers.busy import Busy
from workers.ledger import Ledger
from workers.lora import adapter_tensors, add_adapter, drop_adapter
from workers.optimizer import PartOptimizer, clip_factor
from workers.replies import Reply, error_header
from workers.span import Span
from workers.state import Found, RunState, Tenure

_SUMMED = "summed:"


@dataclass(slots=True)
class Durable:
    """How the run `name` survives its worker: by whose `ticket`, and what of it is on its way to the disk."""

    name: str
    ticket: bytes
    tenure: Tenure
    unsaved: bool = True
    """Whether there is something to save."""
    saving: int = 0
    failure: TrunklineError | None = None
    """Why a save failed. The run is over at this worker then: nobody may hear of what was not saved."""


class TrunkRun:
    """One adapter over the shared frozen trunk, and its optimizer."""

    def __init__(
        self,
        span: Span,
        key: str,
        plan: RunPlan,
        blocks: partition.Span,
        initial: Mapping[str, Tensor],
        busy: Busy,
        durable: Durable | None = None,
    ) -> None:
        """Create adapter `key` on `blocks`, from `initial` if it holds tensors. `busy` is the worker's.

        Raises `MismatchError` if those do not fit the trunk; nothing is left behind then.
        """
        self._span, self.key, self.blocks, self.durable = span, key, blocks, durable
        self.ledger = Ledger(plan, survives=durable is not None)
        self._first = _digest(initial)
        add_adapter(span, key, plan.lora, plan.seed, blocks, initial or None)
        self.parameters = adapter_tensors(span, key)
        self._optimizer = PartOptimizer(plan, self.parameters)
        self._ends: dict[bytes, dict[str, Tensor]] = {}
        self._last: Committed | None = None
        self._summed: dict[str, Tensor] = {}
        self._worker, self._since, self._busy = busy, time.monotonic(), busy.seconds

    @classmethod
    def found(cls, span: Span, key: str, found: Found, ticket: bytes, busy: Busy) -> "TrunkRun":
        """Go on with a saved run. Raises `MismatchError` if it does not fit the trunk."""
        state, blocks = found.state, partition.Span(found.state.start, found.state.stop)
        durable = Durable(state.run, ticket, found.tenure)
        run = cls(span, key, state.plan, blocks, {}, busy, durable)
        try:
            run._optimizer.restore(found.tensors)
        except Exception:
            run.close()
            raise
        run._first = state.first
        run.ledger.step, run.ledger.seats = state.step, dict.fromkeys(state.seats, b"")
        run._last = state.last
        run._summed = {name: found.tensors[f"{_SUMMED}{name}"].to(span.device) for name in state.summed}
        return run

    def state(self, fingerprint: str) -> tuple[RunState, dict[str, Tensor]]:
        """Copies of all that a durable run needs to go on elsewhere, between two steps or in one."""
        assert self.durable is not None
        state = RunState(
            run=self.durable.name,
            fingerprint=fingerprint,
            start=self.blocks.start,
            stop=self.blocks.stop,
            plan=self.ledger.plan,
            step=self.ledger.step,
            first=self._first,
            seats=tuple(self.ledger.seats),
            last=self._last,
            summed=tuple(self._summed),
        )
        summed = {f"{_SUMMED}{name}": tensor for name, tensor in self._summed.items()}
        return state, self._optimizer.state() | summed

    def join(
        self, silo: bytes, request: OpenRun, initial: Mapping[str, Tensor]
    ) -> tuple[bytes, dict[bytes, Commit] | None]:
        """Admit a silo with its partition: its seat, and what `Ledger.join` returns.

        Raises `MismatchError` for another plan or first adapter, and what `Ledger.join` raises.
        """
        blocks, again = partition.Span(request.start, request.stop), bool(request.ticket)
        if blocks != self.blocks:
            raise MismatchError(
                f"this run's trunk is {self.blocks}, not {blocks}",
                hint="Give all silos of a run the same --head and --tail.",
            )
        if not again and _digest(initial) != self._first:
            raise MismatchError(
                "this run was opened with another first adapter", hint="Resume every silo from the same one."
            )
        if self.durable is None:
            return b"", self.ledger.join(silo, request.plan)
        seat = request.seat or secrets.token_bytes(16)
        before = self.ledger.seats.keys()
        anew = self.ledger.join(silo, request.plan, _hidden(seat), again=again)
        # Who joins again hears where the run stands only once a save has shown that it is this home's still.
        self.durable.unsaved |= again or self.ledger.seats.keys() != before
        return seat, anew

    def commit(self, silo: bytes, request: Commit, ends: Mapping[str, Tensor]) -> tuple[list[Reply], bool]:
        """Record a silo's commit: what to tell whom, and whether the step is over by it.

        With the last one the step is taken, and every silo is told. If the gradient is not finite no step
        is taken, and every silo is told an error. One of the step before gets its answer again.

        Raises what `Ledger.commit` raises, and `MismatchError` for ends of another shape than the
        other silos'; the commit is not recorded then.
        """
        self.ledger.check(silo)
        if self._last is not None and request.step == self._last.step == self.ledger.step - 1:
            return [self._answer(silo, request)], False
        self._check_ends(ends)
        before = self.ledger.commits.get(silo)
        complete = self.ledger.commit(silo, request)
        self._ends[silo] = dict(ends)
        replies = []
        if before is not None and before.id != request.id:
            replies = [
                told(silo, before, UnavailableError(f"asked again as request {request.id}", side="silo"))
            ]
        if complete:
            replies += self._step()
        return replies, complete

    def _step(self) -> list[Reply]:
        """Every silo has committed."""
        tokens, square = self.ledger.totals()
        summed = self._sum_of_ends()
        square += self._optimizer.square_norm()
        square += sum(float(tensor.double().pow(2).sum()) for tensor in summed.values())
        divisor = float(max(1, tokens))
        norm = square**0.5 / divisor
        if not math.isfinite(norm):
            return self._no_step()
        clip = clip_factor(self.ledger.plan, norm)
        self._optimizer.step(self.ledger.step, divisor, clip)
        self._last = Committed(
            step=self.ledger.step, divisor=divisor, clip=clip, grad_norm=norm, busy=self._busy_share()
        )
        self._summed = summed
        replies = [self._answer(member, commit) for member, commit in self.ledger.commits.items()]
        self.ledger.stepped()
        self._ends.clear()
        if self.durable is not None:
            self.durable.unsaved = True
        return replies

    def _answer(self, silo: bytes, commit: Commit) -> Reply:
        assert self._last is not None
        header = msgspec.structs.replace(self._last, id=commit.id)
        return Reply(silo, header, list(self._summed.values()))

    def _no_step(self) -> list[Reply]:
        error = TrunklineError(
            f"the gradient of step {self.ledger.step} is not finite, and the step was not taken",
            side="worker",
            hint="Lower the learning rate, or use --wire bf16 if fp16 overflows.",
        )
        replies = [told(member, commit, error) for member, commit in self.ledger.commits.items()]
        self.ledger.commits.clear()
        self.void()
        return replies

    def void(self) -> None:
        """Nothing counts that silos brought to this step so far."""
        self._ends.clear()
        self._optimizer.drop_gradients()

    def _check_ends(self, ends: Mapping[str, Tensor]) -> None:
        first = next(iter(self._ends.values()), ends)
        for name, tensor in ends.items():
            if name in first and tensor.shape != first[name].shape:
                raise MismatchError(
                    f"{name} is {tuple(tensor.shape)} here and {tuple(first[name].shape)} at another silo"
                )

    def _sum_of_ends(self) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for ends in self._ends.values():
            for name, tensor in ends.items():
                sums[name] = sums[name] + tensor if name in sums else tensor
        return sums

    def _busy_share(self) -> float:
        now, busy = time.monotonic(), self._worker.seconds
        share = min(1.0, (busy - self._busy) / max(1e-9, now - self._since))
        self._since, self._busy = now, busy
        return share

    def adapter(self) -> dict[str, Tensor]:
        """The trunk adapter's tensors by global name."""
        # Copies: a link sends without copying, and the next step must not change what is on its way.
        return {name: tensor.detach().clone() for name, tensor in self.parameters.items()}

    def leave(self, silo: bytes, name: str | None) -> dict[bytes, Commit]:
        """A silo closed the run (`name` None) or is gone for good; returns what `Ledger.leave` returns."""
        self._ends.clear()
        if self.durable is not None:
            self.durable.unsaved = True
        return self.ledger.leave(silo, "another silo" if name is None else f"silo {name!r}")

    def close(self) -> None:
        """Free the adapter."""
        drop_adapter(self._span, self.key)


def told(silo: bytes, commit: Commit, error: TrunklineError) -> Reply:
    """An error as the answer to a silo's commit."""
    return Reply(silo, error_header(commit.id, error))


def _hidden(seat: bytes) -> bytes:
    """A seat as it is kept and saved: who reads it there cannot take it."""
    return hashlib.blake2b(seat, digest_size=16).digest()


def _digest(tensors: Mapping[str, Tensor]) -> bytes:
    """Tells first adapters apart; empty for a fresh one."""
    if not tensors:
        return b""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(plain.shape)}".encode())
        digest.update(plain.numpy().tobytes())
    return digest.digest()
