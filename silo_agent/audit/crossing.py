"""What a worker gets of a text: made by the code that sends it, and decoded as a worker decodes it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from codec.quantise import KAPPA
from codec.tensors import decode_tensors, encode_tensor
from silo_agent.audit.attack import Seen
from silo_agent.ends import Ends
from silo_agent.loss import loss_and_gradient
from silo_agent.microbatch import Example, pack_examples
from silo_agent.noise import Noise
from silo_agent.wires import Boundary, Wires, is_gradient
from workers.span import Span


@dataclass(frozen=True, slots=True)
class Crossing:
    """A silo's ends, noise and wires as it uses them, and the trunk that a worker would run.

    The trunk's adapter, if any, has the ends' key.
    """

    ends: Ends
    trunk: Span
    noise: Noise
    wires: Wires

    def send(self, example: Example, releases: int = 1) -> Seen:
        """One text as a micro-batch of its own, sent `releases` times; its gradient crosses once.

        Raises `DataError` if nothing of it is to be learned, and `FrameError`.
        """
        batch, key = pack_examples([example]), self.ends.adapter_key
        with torch.no_grad():
            hidden = self.ends.head.run(batch.ids, batch.lengths, adapter=key)
            arrived, widths = zip(*(self._released(hidden) for _ in range(releases)), strict=True)
            output = self.trunk.run(arrived[0], batch.lengths, adapter=key)
        returned, _ = self._crossed("trunk → tail", output)
        _, gradient = loss_and_gradient(self.ends, returned, batch)
        received, _ = self._crossed("tail → trunk (gradient)", gradient)
        added = self.noise.step / KAPPA
        return Seen(
            releases=tuple(tensor.float() for tensor in arrived),
            # What is rounded to whole steps is uniform within one.
            sigma=math.hypot(added, max(widths) / math.sqrt(12)),
            output=returned.float(),
            gradient=received.float(),
        )

    def _released(self, hidden: Tensor) -> tuple[Tensor, float]:
        sent = self.noise.add(hidden)
        return self._crossed("head → trunk", sent, step=self.noise.step)

    def _crossed(self, boundary: Boundary, tensor: Tensor, step: float = 0.0) -> tuple[Tensor, float]:
        """What comes out of the frame on the other side, and the step that it was rounded to."""
        wire = self.wires.pick(boundary, *tensor.shape)
        spec, frame = encode_tensor(tensor, wire, boundary, step=step, stochastic=is_gradient(boundary))
        (arrived,) = decode_tensors([spec], [frame], boundary=boundary, device=tensor.device)
        return arrived, spec.step
