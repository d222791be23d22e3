"""The loss of a micro-batch: what the tail makes of the trunk's output."""

import torch.nn.functional as F
from torch import Tensor

from silo_agent.ends import Ends
from silo_agent.microbatch import MicroBatch


def loss_and_gradient(ends: Ends, output: Tensor, batch: MicroBatch) -> tuple[float, Tensor]:
    """The summed loss in nats, and its gradient `[T, hidden]` at the trunk's `output` `[T, hidden]`.

    The gradients of the tail's adapter are accumulated.
    """
    leaf = output.to(ends.tail.device, ends.tail.dtype).requires_grad_()
    logits = ends.tail.run(
        leaf, batch.lengths, adapter=ends.adapter_key, keep=batch.keep, mask=batch.mask
    ).float()
    loss = F.cross_entropy(logits, batch.targets.to(ends.tail.device), reduction="sum")
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad
