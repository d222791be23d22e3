"""A run on its home worker: the trunk's part of one fine-tuning job."""

import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from broker.parcel import error_parcel
from codec import partition
from codec.errors import MismatchError, TrunklineError
from codec.messages import AnyHeader, Commit, Committed
from codec.plan import RunPlan
from workers.busy import Busy
from workers.ledger import Ledger
from workers.lora import adapter_tensors, add_adapter, drop_adapter
from workers.optimizer import PartOptimizer, clip_factor
from workers.span import Span


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
    ) -> None:
        """Create adapter `key` on `blocks`, from `initial` if it holds tensors. `busy` is the worker's.

        Raises `MismatchError` if those do not fit the trunk; nothing is left behind then.
        """
        self._span, self.key, self.blocks = span, key, blocks
        self.ledger = Ledger(plan)
        self._initial = dict(initial)
        add_adapter(span, key, plan.lora, plan.seed, blocks, initial or None)
        self.parameters = adapter_tensors(span, key)
        self._optimizer = PartOptimizer(plan, self.parameters)
        self._ends: dict[bytes, dict[str, Tensor]] = {}
        self._worker, self._since, self._busy = busy, time.monotonic(), busy.seconds

    def join(self, silo: bytes, plan: RunPlan, blocks: partition.Span, initial: Mapping[str, Tensor]) -> None:
        """Admit a silo with its partition. Raises `MismatchError` for another plan or first adapter."""
        if blocks != self.blocks:
            raise MismatchError(
                f"this run's trunk is {self.blocks}, not {blocks}",
                hint="Give all silos of a run the same --head and --tail.",
            )
        if initial.keys() != self._initial.keys() or any(
            not torch.equal(tensor, self._initial[name]) for name, tensor in initial.items()
        ):
            raise MismatchError(
                "this run was opened with another first adapter", hint="Resume every silo from the same one."
            )
        self.ledger.join(silo, plan)

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
        share = self._busy_share()
        answers: dict[bytes, tuple[AnyHeader, list[Tensor]]] = {
            member: (
                Committed(
                    id=commit.id,
                    step=self.ledger.step,
                    divisor=divisor,
                    clip=clip,
                    grad_norm=norm,
                    busy=share,
                ),
                summed,
            )
            for member, commit in self.ledger.commits.items()
        }
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
        for parameter in self.parameters.values():
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
        """A silo closed the run (`name` None) or is gone; returns the commits that wait in vain."""
        self._ends.clear()
        return self.ledger.leave(silo, "another silo" if name is None else f"silo {name!r}")

    def close(self) -> None:
        """Free the adapter."""
        drop_adapter(self._span, self.key)
