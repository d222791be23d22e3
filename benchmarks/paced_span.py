"""A span that takes a GPU's time instead of computing: what the pipeline does when the trunk is fast.

Everything around it is real: the service, the sockets, the codec, the boundary's size.
"""

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from benchmarks.meter import Meter
from benchmarks.pace import PacedModel, Work
from codec import partition
from workers.kv import KVShape
from workers.parts import Part
from workers.span import Span


class PacedSpan(Span):
    """All blocks of a model that is not there. A pass returns what it was given, in due time.

    The meter counts the model's seconds, not those slept: waking up late is not work. Passes from
    several threads wait for each other, as on one card.
    """

    def __init__(self, paced: PacedModel, meter: Meter) -> None:
        # Not the parent's: there are no weights to read.
        self.blocks = partition.Span(0, paced.blocks)
        self.device, self.dtype = torch.device("cpu"), torch.bfloat16
        self.adapters = set()
        self.model = _NoModel()
        self._paced, self._meter = paced, meter
        self._card = threading.Lock()

    @property
    def filling(self) -> int:
        """As on the GPU whose time it takes."""
        return 2048

    def kv_shape(self, blocks: partition.Span | None = None) -> KVShape:
        """Next to nothing: the caches' lengths count, their contents do not."""
        part = self.blocks if blocks is None else blocks
        return KVShape(layers=len(part), groups=1, dim=1, dtype=self.dtype, device=self.device)

    def layers(self, blocks: partition.Span | None = None) -> nn.ModuleList:  # noqa: ARG002
        """None to adapt: an adapter has no weights here."""
        return nn.ModuleList()

    def run_parts(self, parts: Sequence[Part]) -> list[Tensor]:
        """See `Span.run_parts`: each part's `packed` `[T, hidden]` comes back after the time of a pass."""
        work = []
        for part in parts:
            part.check_room()
            cached = sum(cache.length for cache in part.caches or ()) + (part.tokens if part.caches else 0)
            work.append(Work(part.blocks or self.blocks, len(part.packed), cached))
        apply: Any = _Passage.apply
        outputs = apply(self, work, *(part.packed for part in parts))
        for part in parts:
            part.advance()
        return list(outputs)

    def compute(self, work: Sequence[Work], *, backward: bool) -> None:
        """Take the time of one pass over `work`."""
        seconds = self._paced.backward(work) if backward else self._paced.forward(work)
        with self._card:
            self._meter.begin(seconds)
            time.sleep(seconds)
            self._meter.end(sum(part.tokens for part in work))


class _NoModel(nn.Module):
    """What others ask a span's model for: that its family has the layers an adapter names."""

    config = LlamaConfig()


class _Passage(torch.autograd.Function):
    """The identity of several tensors, as one pass forward and one backward."""

    @staticmethod
    def forward(ctx: Any, span: PacedSpan, work: list[Work], *packed: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.span, ctx.work = span, work
        span.compute(work, backward=False)
        return tuple(part.view_as(part) for part in packed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.work, gradients, strict=True)
        ctx.span.compute([part for part, gradient in pairs if gradient is not None], backward=True)
        return None, None, *gradients
