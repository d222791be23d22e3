"""How much memory a graph of activations keeps until its backward."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from workers.span import Span


class GraphMeter:
    """Bytes that a graph keeps besides a span's weights, each storage once."""

    def __init__(self, span: Span) -> None:
        self._seen = {p.untyped_storage().data_ptr() for p in span.model.parameters()}
        self.bytes = 0

    def saved(self, tensor: Tensor) -> Tensor:
        """Autograd keeps this."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        # Kept as itself, an operation's own result would hold its graph, which holds it: one that never
        # goes backward would stay for ever, out of the garbage collector's sight.
        return tensor.detach()


@contextmanager
def metered(span: Span) -> Iterator[GraphMeter]:
    """Count what the graphs keep that are made meanwhile."""
    meter = GraphMeter(span)
    with torch.autograd.graph.saved_tensors_hooks(meter.saved, lambda tensor: tensor):
        yield meter
