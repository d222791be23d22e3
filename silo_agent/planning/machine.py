"""What a silo's parts of a model take on this machine: one block of each kind, and the model's ends.

They are loaded as a silo loads them and run on what a typical pass brings. What one block takes
stands for all of its kind, so this reads no more of a checkpoint than the smallest silo would.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from codec.partition import Span as Blocks
from codec.plan import LoraPlan
from silo_agent.planning.proposal import Block, Rest
from silo_agent.planning.work import Work, spread
from workers.checkpoint import Checkpoint
from workers.graph import metered
from workers.kv import RowCache
from workers.lora import add_adapter
from workers.span import Span

_ADAPTER = "measured"
_TURNS = 5
_LONG_S = 1.0
"""A turn that took longer is the only one: warming up is no matter there."""

_LOGITS = 4
"""So many fp32 copies of the logits are alive in the loss's backward: they, their logarithms, and a gradient
of each."""


class Machine:
    """Measures a model's parts on a device, for the work that a silo has to do."""

    def __init__(
        self, checkpoint: Checkpoint, work: Work, lora: LoraPlan, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Load the ends of the model. Raises `ModelError`."""
        self._checkpoint, self._work, self._lora = checkpoint, work, lora
        self._dtype, self._device = dtype, device
        self._head = self._span(Blocks(0, 0), embeds=True)
        end = Blocks(checkpoint.blocks, checkpoint.blocks)
        self._tail = self._span(end, predicts=True, tied=self._head)
        # More than fills a pass takes a token no less time.
        number = len(work.lengths) * self._head.filling // max(1, work.tokens)
        self._lengths = spread(sorted(work.lengths), max(1, min(len(work.lengths), number)))
        self._ids = torch.randint(int(checkpoint.config.vocab_size), (sum(self._lengths),))
        with torch.no_grad():
            self._hidden = self._head.run(self._ids, self._lengths)

    def blocks(self) -> tuple[Block, ...]:
        """Every block's figures. Raises `ModelError`, and `MismatchError` for targets it does not have."""
        kinds = getattr(self._checkpoint.config, "layer_types", None) or ["any"] * self._checkpoint.blocks
        figures = {kind: self._block(kinds.index(kind)) for kind in dict.fromkeys(kinds)}
        return tuple(figures[kind] for kind in kinds)

    def rest(self) -> Rest:
        """What is neither a block nor the trunk's."""
        tokens, training = len(self._ids), self._work.training
        predicted = max(1, round(tokens * self._work.predicted / self._work.tokens))
        keep = torch.arange(predicted) * (tokens // predicted)
        targets = torch.zeros(predicted, dtype=torch.int64, device=self._device)

        def embed() -> tuple[float]:
            begun = self._now()
            self._head.run(self._ids, self._lengths)
            return (self._now() - begun,)

        def predict() -> tuple[float]:
            begun = self._now()
            entry = self._hidden.detach().requires_grad_(training)
            logits = self._tail.run(entry, self._lengths, keep=keep).float()
            if training:
                F.cross_entropy(logits, targets, reduction="sum").backward()
            return (self._now() - begun,)

        with torch.set_grad_enabled(training):
            ((embed_s,), (predict_s,)) = _least(embed), _least(predict)
        return Rest(
            embed_s=embed_s / tokens,
            predict_s=predict_s / predicted,
            weights=_weight_bytes(self._head, self._tail),
            logits=int(self._checkpoint.config.vocab_size) * 4 * (_LOGITS if training else 1),
        )

    def _block(self, index: int) -> Block:
        span, tokens = self._span(Blocks(index, index + 1)), len(self._ids)
        weights = span.weight_bytes
        if self._work.training:
            add_adapter(span, _ADAPTER, self._lora, seed=0)
        with metered(span) as meter:
            self._forward(span)
        forward_s, backward_s = self._trained(span) if self._work.training else self._decoded(span)
        return Block(
            forward_s=forward_s / tokens,
            backward_s=backward_s / tokens,
            weights=weights,
            adapter=span.weight_bytes - weights,
            graph=meter.bytes / tokens,
            cache=span.kv_shape().bytes_for(1),
        )

    def _trained(self, span: Span) -> tuple[float, float]:
        """Seconds of a micro-batch's forward and backward."""

        def turn() -> tuple[float, float]:
            begun = self._now()
            output = self._forward(span)
            between = self._now()
            output.backward(torch.ones_like(output))
            return between - begun, self._now() - between

        forward_s, backward_s = _least(turn)
        return forward_s, backward_s

    def _decoded(self, span: Span) -> tuple[float, float]:
        """Seconds of a pass of new tokens behind cached ones; there is no backward."""
        behind = self._work.behind
        caches = [RowCache(span.kv_shape(), behind + length) for length in self._lengths]

        def turn() -> tuple[float]:
            for cache, length in zip(caches, self._lengths, strict=True):
                cache.rewind(0)
                cache.check_room(behind + length)
                cache.advance(behind)  # What it holds does not matter for the time.
            begun = self._now()
            span.run(self._hidden, self._lengths, caches=caches)
            return (self._now() - begun,)

        with torch.no_grad():
            return _least(turn)[0], 0.0

    def _forward(self, span: Span) -> Tensor:
        entry = self._hidden.detach().requires_grad_()
        return span.run(entry, self._lengths, adapter=_ADAPTER if self._work.training else None)

    def _span(self, blocks: Blocks, *, tied: Span | None = None, **ends: bool) -> Span:
        return Span(self._checkpoint, blocks, dtype=self._dtype, device=self._device, tied=tied, **ends)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _least(turn: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
    """The least of what some turns say, after a first one that warms up; a long one is enough."""
    first = turn()
    if sum(first) > _LONG_S:
        return first
    return tuple(map(min, zip(*(turn() for _ in range(_TURNS)), strict=True)))


def _weight_bytes(*spans: Span) -> int:
    """Bytes of all spans' weights, those that they share once."""
    weights = {p.data_ptr(): p.nbytes for span in spans for p in span.model.parameters()}
    return sum(weights.values())
