"""The public model, as an attacker holds it: all of its blocks, and no adapter."""

from functools import cached_property, lru_cache

import torch
from torch import Tensor

from codec import partition
from silo_agent.audit.reading import Reading
from silo_agent.ends import Ends
from workers.checkpoint import Checkpoint
from workers.span import Span

_PART = 1024
"""Candidates in one pass: more take no less time each."""


class PublicModel:
    """Head, trunk and tail without adapter. What only some attacks need is read when it is needed."""

    def __init__(self, checkpoint: Checkpoint, ends: Ends) -> None:
        """The frozen weights of `ends` are shared, not copied; its adapter is left out."""
        self.checkpoint = checkpoint
        self.head, self.tail = ends.head, ends.tail
        self._trunk = ends.trunk
        self.device, self.dtype = ends.device, ends.head.dtype
        self.vocabulary = int(ends.config.vocab_size)
        self.states_after = lru_cache(maxsize=2)(self._states_after)

    @cached_property
    def trunk(self) -> Span:
        """The blocks between head and tail."""
        return self.span(self._trunk)

    @cached_property
    def core(self) -> Span:
        """The head's blocks without its embeddings: it takes any vectors for those."""
        return self.span(self.head.blocks)

    @cached_property
    def embeddings(self) -> Tensor:
        """What the first block gets for each token of the vocabulary, `[vocabulary, hidden]`."""
        none = Span(self.checkpoint, partition.Span(0, 0), embeds=True, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            return none.run(torch.arange(self.vocabulary), (1,) * self.vocabulary).float()

    def span(self, blocks: partition.Span) -> Span:
        """Blocks of the public model, read anew."""
        return Span(self.checkpoint, blocks, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def _states_after(self, before: tuple[int, ...]) -> Tensor:
        """The head's output for each token of the vocabulary behind `before`, `[vocabulary, hidden]`."""
        reading = Reading([self.head], rows=1, capacity=len(before) + _PART)
        if before:
            reading.read([0], [before])
        parts = torch.arange(self.vocabulary).split(_PART)
        return torch.cat([reading.next_states([0], part[None])[0] for part in parts])
