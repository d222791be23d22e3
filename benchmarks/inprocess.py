"""The same batches called directly in one process: no codec, no socket, no broker."""

import time
from collections.abc import Mapping, Sequence
from itertools import cycle, islice

import torch
from torch import Tensor

from benchmarks.parts import Parts
from benchmarks.recording import Recorded
from codec import partition
from codec.plan import RunPlan
from workers.kv import KVMemory, RowCache
from workers.optimizer import PartOptimizer
from workers.span import Span


def train_directly(
    span: Span,
    blocks: partition.Span,
    adapter: Mapping[str, Tensor],
    batches: Sequence[Recorded],
    *,
    step: int,
    seconds: float,
) -> float:
    """Tokens per second of whole steps of `step` micro-batches, forward, backward and optimizer."""
    key = Parts.KEY if adapter else None
    optimizer = PartOptimizer(RunPlan(learning_rate=1e-9, schedule="constant"), adapter)
    tokens, source, begun = 0, cycle(batches), time.perf_counter()
    while time.perf_counter() < begun + seconds:
        for batch in islice(source, step):
            entry = batch.sent.detach().to(span.dtype).requires_grad_()
            output = span.run(entry, batch.lengths, blocks=blocks, adapter=key)
            torch.autograd.backward(output, batch.gradient.to(output), inputs=[*adapter.values(), entry])
            tokens += sum(batch.lengths)
        optimizer.square_norm()
        optimizer.step(0, 1.0, 1.0)
    return tokens / (time.perf_counter() - begun)


@torch.no_grad()
def decode_directly(
    span: Span, blocks: partition.Span, prompts: Sequence[Tensor], *, new: int, seconds: float
) -> float:
    """Decoded tokens per second of all `prompts` together: their prefill, then `new` steps, again and
    again."""
    lengths = [len(prompt) for prompt in prompts]
    shape, memory = span.kv_shape(blocks), KVMemory()
    caches = [RowCache(shape, length + new, memory) for length in lengths]
    packed, last = torch.cat(list(prompts)), torch.stack([prompt[-1] for prompt in prompts])
    tokens, begun = 0, time.perf_counter()
    while time.perf_counter() < begun + seconds:
        for cache in caches:
            cache.rewind(0)
        span.run(packed, lengths, caches=caches, blocks=blocks)
        for _ in range(new):
            span.run(last, [1] * len(prompts), caches=caches, blocks=blocks)
        tokens += new * len(prompts)
    return tokens / (time.perf_counter() - begun)
