"""What a throughput benchmark feeds its trunk with, and that trunk in this process to compare with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.meter import Meter
from benchmarks.pace import PACES
from benchmarks.paced_span import PacedSpan
from benchmarks.parts import Parts
from benchmarks.recording import Recorded, made_up, made_up_lengths, recorded
from benchmarks.texts import tokenized
from codec import partition
from codec.plan import ModelCard
from workers.checkpoint import Checkpoint
from workers.lora import adapter_tensors
from workers.span import Span

_DIFFERENT = 4
"""Micro-batches that differ; silos repeat them in turn."""


@dataclass(frozen=True, slots=True)
class Source:
    """Micro-batches for the trunk `blocks` of a model, and those blocks in this process as `span`.

    `adapter` are the span's trainable weights, none for a paced one.
    """

    card: ModelCard
    blocks: partition.Span
    batches: Sequence[Recorded]
    span: Span
    adapter: Mapping[str, Tensor]

    def prompt(self, tokens: int) -> Tensor:
        """Hidden states `[tokens, hidden]`, those of a micro-batch repeated if need be."""
        sent = self.batches[0].sent
        return sent.repeat(-(-tokens // len(sent)), 1)[:tokens]


def paced_source(pace: str, cut: partition.Partition, *, sequences: int, length: int) -> Source:
    """Made-up tensors of the right size; `sequences` of about `length` tokens in a micro-batch."""
    paced = PACES[pace]
    batches = [
        made_up(made_up_lengths(sequences, length, seed), paced.hidden, seed) for seed in range(_DIFFERENT)
    ]
    return Source(paced.card, cut.spans(paced.blocks)[1], batches, PacedSpan(paced, Meter()), {})


def real_source(model: str, cut: partition.Partition, *, sequences: int, length: int) -> Source:
    """Recorded tensors: the demo's notes, cut to `length` tokens, through head, trunk and tail."""
    checkpoint = Checkpoint(model)
    texts = tokenized(checkpoint.ref, None, tokens=1 << 30, max_length=length)
    chosen = [texts[number % len(texts)] for number in range(sequences)]
    parts = Parts(checkpoint, cut, chosen)
    adapter = adapter_tensors(parts.trunk, parts.KEY)
    return Source(parts.ends.card, parts.ends.trunk, [recorded(parts)], parts.trunk, adapter)
