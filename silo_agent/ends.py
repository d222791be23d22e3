"""A silo's own parts of the model: the head and the tail, with their adapters."""

from collections.abc import Mapping

import torch
from torch import Tensor

from codec.partition import Partition
from codec.plan import LoraPlan, ModelCard
from workers.checkpoint import Checkpoint
from workers.lora import adapter_tensors, add_adapter
from workers.span import Span

_KEY = "silo"


class Ends:
    """Head and tail of one model on one silo. `trunk` is the span that others compute."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        partition: Partition,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Read the embeddings, the first and the last blocks. Raises `UsageError`, `ModelError`."""
        head, self.trunk, tail = partition.spans(checkpoint.blocks)
        self.head = Span(checkpoint, head, embeds=True, dtype=dtype, device=device)
        self.tail = Span(checkpoint, tail, predicts=True, dtype=dtype, device=device, tied=self.head)
        self.card: ModelCard = checkpoint.card(range(self.trunk.start, self.trunk.stop))
        self.config = checkpoint.config
        self.device = torch.device(device)
        self.adapter_key: str | None = None
        """The adapter to run head and tail with; None until they are adapted."""

    def adapt(self, plan: LoraPlan, seed: int, initial: Mapping[str, Tensor] | None = None) -> None:
        """Add LoRA to both ends; `initial` values, by global name, replace the fresh ones."""
        for span in (self.head, self.tail):
            add_adapter(span, _KEY, plan, seed, initial=initial or None)
        self.adapter_key = _KEY

    def head_adapter(self) -> dict[str, Tensor]:
        """The head's adapter weights by global name."""
        return adapter_tensors(self.head, _KEY) if self.adapter_key else {}

    def adapter(self) -> dict[str, Tensor]:
        """Both ends' adapter weights by global name."""
        return {**self.head_adapter(), **(adapter_tensors(self.tail, _KEY) if self.adapter_key else {})}
