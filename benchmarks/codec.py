"""What does each encoding cost in bits, and what in loss? On a model's own boundary tensors.

The text runs through head, trunk and tail in this process; only the encodings vary. Gradients come
from one training pass over the same text. Losses are compared with the exact boundary, or with the
same noise alone where there is noise.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lz4.block
import torch
import torch.nn.functional as F
from torch import Tensor

from codec.messages import Wire
from codec.partition import Partition
from codec.plan import LoraPlan
from codec.quantise import quantise, step_of
from codec.tensors import decode_tensors, encode_tensor
from silo_agent.ends import Ends
from workers.checkpoint import Checkpoint
from workers.lora import add_adapter
from workers.span import Span

WIRES: tuple[Wire, ...] = ("exact", "bf16", "fp16", "steps")
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One encoding of one boundary. `entropy` is that of the quantised integers, bits per element;
    `loss_change` is against the uncompressed boundary; times are medians for 4 MiB of fp32.
    """

    boundary: str
    wire: str
    bits: float
    entropy: float | None
    relative_error: float
    loss_change: float | None
    encode_ms: float
    decode_ms: float


class _Parts:
    """Head, trunk and tail in one process, on packed sequences."""

    def __init__(self, checkpoint: Checkpoint, partition: Partition, texts: Sequence[Sequence[int]]) -> None:
        self.ends = Ends(checkpoint, partition)
        self.trunk = Span(checkpoint, self.ends.trunk)
        self.ends.adapt(LoraPlan(), 0)
        add_adapter(self.trunk, "bench", LoraPlan(), 0)
        self.lengths = [len(text) for text in texts]
        self.ids = torch.tensor([token for text in texts for token in text])
        starts = torch.tensor(self.lengths).cumsum(0)
        self.keep = torch.tensor([i for i in range(len(self.ids)) if i + 1 not in set(starts.tolist())])

    def loss(self, output: Tensor) -> Tensor:
        logits = self.ends.tail.run(output, self.lengths, keep=self.keep)
        return F.cross_entropy(logits.float(), self.ids[self.keep + 1])

    @torch.no_grad()
    def loss_from_head(self, sent: Tensor) -> float:
        return float(self.loss(self.trunk.run(sent, self.lengths)))

    @torch.no_grad()
    def loss_from_trunk(self, output: Tensor) -> float:
        return float(self.loss(output))

    def boundaries(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Head to trunk, trunk to tail, and the two gradients back."""
        with torch.no_grad():
            sent = self.ends.head.run(self.ids, self.lengths)
        entry = sent.requires_grad_()
        output = self.trunk.run(entry, self.lengths)
        leaf = output.detach().requires_grad_()
        self.loss(leaf).backward()
        assert leaf.grad is not None
        output.backward(leaf.grad)
        assert entry.grad is not None
        return sent.detach(), leaf.detach(), leaf.grad, entry.grad


def measure(model: str, partition: Partition, texts: Sequence[Sequence[int]], noise: float) -> dict[str, Any]:
    """The table: every wire on every boundary. `noise` is relative to the boundary's deviation."""
    parts = _Parts(Checkpoint(model), partition, texts)
    up, down, gradient_up, gradient_down = parts.boundaries()
    sigma = noise * float(up.std())
    noisy = up + torch.randn_like(up) * sigma
    alone = parts.loss_from_head(noisy)
    exact = parts.loss_from_trunk(down)
    rows = []
    for wire in WIRES:
        rows += [
            _row("head → trunk, noisy", noisy, wire, sigma, False, parts.loss_from_head, alone),
            _row("trunk → tail", down, wire, 0.0, False, parts.loss_from_trunk, exact),
            _row("tail → trunk (gradient)", gradient_up, wire, 0.0, True, None, 0.0),
            _row("trunk → head (gradient)", gradient_down, wire, 0.0, True, None, 0.0),
        ]
    return {
        "tokens": len(parts.ids),
        "loss_exact": exact,
        "loss_noise_alone": alone,
        "plain_lz4_bits": _plain_lz4_bits(down),
        "rows": [asdict(row) for row in rows],
        "traffic": _traffic(rows, parts.lengths),
    }


def _row(
    boundary: str,
    tensor: Tensor,
    wire: Wire,
    step: float,
    stochastic: bool,
    loss: Callable[[Tensor], float] | None,
    reference: float,
) -> Row:
    def encode() -> Any:
        return encode_tensor(tensor, wire, boundary, step=step, stochastic=stochastic)

    spec, frame = encode()
    data = bytes(frame)
    (back,) = decode_tensors([spec], [data], boundary=boundary)
    scale = (1 << 20) / tensor.numel()
    return Row(
        boundary=boundary,
        wire=wire,
        bits=len(data) * 8 / tensor.numel(),
        entropy=_entropy(tensor, step, stochastic) if wire == "steps" else None,
        relative_error=float((back.float() - tensor).norm() / tensor.norm()),
        loss_change=loss(back.float()) - reference if loss else None,
        encode_ms=_median_ms(encode) * scale,
        decode_ms=_median_ms(lambda: decode_tensors([spec], [data], boundary=boundary)) * scale,
    )


def _entropy(tensor: Tensor, step: float, stochastic: bool) -> float:
    """Bits per element that an ideal coder of independent integers needs."""
    planes = quantise(tensor, step or step_of(tensor, stochastic=stochastic), stochastic=stochastic).to(
        torch.int64
    )
    codes = sum((plane << (8 * k) for k, plane in enumerate(planes)), torch.zeros_like(planes[0]))
    shares = torch.unique(codes, return_counts=True)[1].double() / codes.numel()
    return float(-(shares * shares.log2()).sum())


def _median_ms(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return sorted(times)[_ROUNDS // 2] * 1e3


def _plain_lz4_bits(tensor: Tensor) -> float:
    return len(lz4.block.compress(tensor.contiguous().numpy(), store_size=False)) * 8 / tensor.numel()


def _traffic(rows: Sequence[Row], lengths: Sequence[int]) -> dict[str, float]:
    """Bits per element and training token over all four boundaries, and how many times fewer than
    fp16 padded to the longest sequence, as the published code sends it."""
    steps = sum(row.bits for row in rows if row.wire == "steps")
    padded = 4 * 16.0 * max(lengths) * len(lengths) / sum(lengths)
    return {"steps_bits": steps, "padded_fp16_bits": padded, "times_fewer": padded / steps}
