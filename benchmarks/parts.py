"""A model's three parts in one process, and what crosses between them for given texts."""

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from codec.partition import Partition
from codec.plan import LoraPlan
from silo_agent.ends import Ends
from workers.checkpoint import Checkpoint
from workers.lora import add_adapter
from workers.span import Span


class Parts:
    """Head, trunk and tail in one process, on packed sequences, with fresh adapters."""

    KEY: Final = "bench"
    """The trunk's adapter."""

    def __init__(self, checkpoint: Checkpoint, partition: Partition, texts: Sequence[Sequence[int]]) -> None:
        """Read the model; `texts` are token ids, every token of them but the first bears loss."""
        self.ends = Ends(checkpoint, partition)
        self.trunk = Span(checkpoint, self.ends.trunk)
        self.ends.adapt(LoraPlan(), 0)
        add_adapter(self.trunk, self.KEY, LoraPlan(), 0)
        self.lengths = [len(text) for text in texts]
        self.ids = torch.tensor([token for text in texts for token in text])
        starts = torch.tensor(self.lengths).cumsum(0)
        self.keep = torch.tensor([i for i in range(len(self.ids)) if i + 1 not in set(starts.tolist())])

    def _loss(self, output: Tensor) -> Tensor:
        logits = self.ends.tail.run(output, self.lengths, adapter=self.ends.adapter_key, keep=self.keep)
        return F.cross_entropy(logits.float(), self.ids[self.keep + 1])

    @torch.no_grad()
    def loss_from_head(self, sent: Tensor) -> float:
        """The mean loss if `sent` `[T, hidden]` is what reaches the trunk."""
        return float(self._loss(self.trunk.run(sent, self.lengths, adapter=self.KEY)))

    @torch.no_grad()
    def loss_from_trunk(self, output: Tensor) -> float:
        """The mean loss if `output` `[T, hidden]` is what reaches the tail."""
        return float(self._loss(output))

    def boundaries(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Head to trunk, trunk to tail, and the two gradients back."""
        with torch.no_grad():
            sent = self.ends.head.run(self.ids, self.lengths, adapter=self.ends.adapter_key)
        entry = sent.requires_grad_()
        output = self.trunk.run(entry, self.lengths, adapter=self.KEY)
        leaf = output.detach().requires_grad_()
        self._loss(leaf).backward()
        assert leaf.grad is not None
        output.backward(leaf.grad)
        assert entry.grad is not None
        return sent.detach(), leaf.detach(), leaf.grad, entry.grad
