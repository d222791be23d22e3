"""A run on its home worker: the trunk's part of one fine-tuning job."""

import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from broker.parcel import error_parcel
from codec import partition
from codec.errors import LimitError, MismatchError, TrunklineError, UnknownNameError
from codec.messages import AnyHeader, Backward, Commit, Committed, Forward
from codec.plan import RunPlan
from workers.ledger import Ledger
from workers.lora import adapter_tensors, add_adapter, drop_adapter, load_adapter, use_adapter
from workers.optimizer import PartOptimizer, clip_factor
from workers.span import Span

_MAX_KEPT = 256
"""Micro-batches between forward and backward; each holds its activations."""


class TrunkRun:
    """One adapter over the shared frozen trunk, its optimizer, and micro-batches in flight."""

    def __init__(
        self,
        span: Span,
        key: str,
        plan: RunPlan,
        blocks: partition.Span,
        initial: Mapping[str, Tensor],
    ) -> None:
        """Create adapter `key` on `blocks`, from `initial` if it holds tensors.

        Raises `MismatchError` if those do not fit the trunk; nothing is left behind then.
        """
        self._span, self._key, self._blocks = span, key, blocks
        self.ledger = Ledger(plan)
        self._initial = dict(initial)
        add_adapter(span, key, plan.lora, plan.seed, blocks)
        try:
            if initial:
                load_adapter(span, key, initial)
        except Exception:
            drop_adapter(span, key)
            raise
        self._parameters = adapter_tensors(span, key)
        self._optimizer = PartOptimizer(plan, self._parameters)
        self._kept: dict[tuple[bytes, int], tuple[Tensor, Tensor]] = {}
        self._ends: dict[bytes, dict[str, Tensor]] = {}
        self._since = time.monotonic()
        self._busy = 0.0

    def join(self, silo: bytes, plan: RunPlan, blocks: partition.Span, initial: Mapping[str, Tensor]) -> None:
        """Admit a silo with its partition. Raises `MismatchError` for another plan or first adapter."""
        if blocks != self._blocks:
            raise MismatchError(
                f"this run's trunk is {self._blocks}, not {blocks}",
                hint="Give all silos of a run the same --head and --tail.",
            )
        if initial.keys() != self._initial.keys() or any(
            not torch.equal(tensor, self._initial[name]) for name, tensor in initial.items()
        ):
            raise MismatchError(
                "this run was opened with another first adapter", hint="Resume every silo from the same one."
            )
        self.ledger.join(silo, plan)

    def forward(self, silo: bytes, request: Forward, packed: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states `[T, hidden]` through the trunk; activations are kept for `backward`."""
        self.ledger.check(silo)
        if len(self._kept) >= _MAX_KEPT:
            raise LimitError(f"{_MAX_KEPT} micro-batches wait for their backward", side="silo")
        begun = time.monotonic()
        use_adapter(self._span, self._key)
        entry = packed.to(self._span.device, self._span.dtype).requires_grad_()
        result = self._span.run(entry, request.lengths, blocks=self._blocks, mask=mask)
        self._kept[silo, request.microbatch] = entry, result
        self._busy += time.monotonic() - begun
        return result.detach()

    def backward(self, silo: bytes, request: Backward, gradient: Tensor) -> Tensor | None:
        """Accumulate the adapter's gradient; return the one at the trunk's input if it is wanted."""
        self.ledger.check(silo)
        kept = self._kept.get((silo, request.microbatch))
        if kept is None:
            raise UnknownNameError(f"no micro-batch {request.microbatch} of yours waits for its backward")
        entry, result = kept
        if gradient.shape != result.shape:
            raise MismatchError(f"a gradient {tuple(gradient.shape)} for an output {tuple(result.shape)}")
        del self._kept[silo, request.microbatch]
        begun = time.monotonic()
        inputs = [*self._parameters.values(), *([entry] if request.wants_gradient else [])]
        torch.autograd.backward(result, gradient.to(result), inputs=inputs)
        self._busy += time.monotonic() - begun
        return entry.grad if request.wants_gradient else None

    def commit(
        self, silo: bytes, request: Commit, ends: Mapping[str, Tensor]
    ) -> dict[bytes, tuple[AnyHeader, list[Tensor]]]:
        """Record a silo's commit; when it is the last, step, and return every silo's answer.

        If the gradient is not finite no step is taken, and the answer is an error to every silo.

        Raises what `Ledger.commit` raises, and `MismatchError` for ends of another shape than the
        other silos'; the commit is not recorded then.
        """
        self._check_ends(ends)
        complete = self.ledger.commit(silo, request)
        self._ends[silo] = dict(ends)
        if not complete:
            return {}
        begun = time.monotonic()
        tokens, square = self.ledger.totals()
        summed = self._summed_ends()
        square += self._optimizer.square_norm()
        square += sum(float(tensor.double().pow(2).sum()) for tensor in summed)
        divisor = float(max(1, tokens))
        norm = square**0.5 / divisor
        if not math.isfinite(norm):
            return self._no_step()
        clip = clip_factor(self.ledger.plan, norm)
        self._optimizer.step(self.ledger.step, divisor, clip)
        answers: dict[bytes, tuple[AnyHeader, list[Tensor]]] = {
            member: (
                Committed(
                    id=commit.id,
                    step=self.ledger.step,
                    divisor=divisor,
                    clip=clip,
                    grad_norm=norm,
                    busy=self._busy_share(begun),
                ),
                summed,
            )
            for member, commit in self.ledger.commits.items()
        }
        self._since, self._busy = time.monotonic(), 0.0
        self.ledger.stepped()
        self._ends.clear()
        return answers

    def _no_step(self) -> dict[bytes, tuple[AnyHeader, list[Tensor]]]:
        error = TrunklineError(
            f"the gradient of step {self.ledger.step} is not finite, and the step was not taken",
            side="worker",
            hint="Lower the learning rate, or use --wire bf16 if fp16 overflows.",
        )
        commits = dict(self.ledger.commits)
        self.ledger.commits.clear()
        self._ends.clear()
        for parameter in self._parameters.values():
            parameter.grad = None
        return {member: (error_parcel(commit.id, error).header, []) for member, commit in commits.items()}

    def _check_ends(self, ends: Mapping[str, Tensor]) -> None:
        first = next(iter(self._ends.values()), ends)
        for name, tensor in ends.items():
            if name in first and tensor.shape != first[name].shape:
                raise MismatchError(
                    f"{name} is {tuple(tensor.shape)} here and {tuple(first[name].shape)} at another silo"
                )

    def _summed_ends(self) -> list[Tensor]:
        sums: dict[str, Tensor] = {}
        for ends in self._ends.values():
            for name, tensor in ends.items():
                sums[name] = sums[name] + tensor if name in sums else tensor
        return list(sums.values())

    def _busy_share(self, begun: float) -> float:
        now = time.monotonic()
        return min(1.0, (self._busy + now - begun) / max(1e-9, now - self._since))

    def adapter(self) -> dict[str, Tensor]:
        """The trunk adapter's tensors by global name."""
        # Copies: a link sends without copying, and the next step must not change what is on its way.
        return {name: tensor.detach().clone() for name, tensor in self._parameters.items()}

    def leave(self, silo: bytes, name: str | None) -> dict[bytes, Commit]:
        """A silo closed the run (`name` None) or is gone; returns the commits that wait in vain."""
        for kept in [kept for kept in self._kept if kept[0] == silo]:
            del self._kept[kept]
        self._ends.clear()
        return self.ledger.leave(silo, "another silo" if name is None else f"silo {name!r}")

    def close(self) -> None:
        """Free the adapter."""
        self._kept.clear()
        drop_adapter(self._span, self._key)
