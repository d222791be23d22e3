"""What does each encoding cost in bits, and what in loss? On a model's own boundary tensors.

The text runs through head, trunk and tail in this process; only the encodings vary. Gradients come
from one training pass over the same text. Losses are compared with the exact boundary, or with the
same noise alone where there is noise.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import lz4.block
import torch
from torch import Tensor

from benchmarks.parts import Parts
from benchmarks.progress import Progress
from benchmarks.timing import codec_times, one_token_us, plain_lz4_ms
from codec.messages import Wire
from codec.partition import Partition
from codec.quantise import Size
from codec.tensors import decode_tensors, encode_tensor
from silo_agent.wires import Boundary, is_gradient
from workers.checkpoint import Checkpoint

_STEP_FACTORS = (0.5, 1.0, 2.0, 4.0)
_LANE_STEP = 0.05


@dataclass(frozen=True, slots=True)
class Row:
    """One encoding of one boundary.

    `factor` is the step in units of the default one, `entropy` that of the quantised integers in bits
    per element, `loss_change` against the uncompressed boundary; times are for 4 MiB of fp32.
    """

    boundary: Boundary
    wire: Wire
    factor: float
    bits: float
    entropy: float | None
    relative_error: float
    loss_change: float | None
    encode_ms: float
    decode_ms: float
    memcpy_ms: float
    copies: float


@dataclass(frozen=True, slots=True)
class _Case:
    """A boundary to encode: tensors that differ in their noise alone, and what each costs exactly."""

    boundary: Boundary
    draws: Sequence[Tensor]
    step: float
    exact: Sequence[float]
    loss: Callable[[Tensor], float] | None

    @property
    def gradient(self) -> bool:
        return is_gradient(self.boundary)


def measure(
    model: str,
    partition: Partition,
    texts: Sequence[Sequence[int]],
    *,
    noise: float,
    draws: int,
    padded_to: int,
    progress: Progress,
) -> dict[str, Any]:
    """The table: every wire on every boundary.

    `noise` is relative to the boundary's deviation and drawn `draws` times; `padded_to` is how long
    the published code would make every sequence.
    """
    parts = Parts(Checkpoint(model), partition, texts)
    progress("running the model")
    up, down, gradient_up, gradient_down = parts.boundaries()
    sigma = noise * float(up.std())
    noisy = [up + torch.randn_like(up) * sigma for _ in range(draws)]
    alone = [parts.loss_from_head(tensor) for tensor in noisy]
    exact = parts.loss_from_trunk(down)
    cases = [
        _Case("head → trunk", noisy, sigma, alone, parts.loss_from_head),
        _Case("trunk → tail", [down], 0.0, [exact], parts.loss_from_trunk),
        _Case("tail → trunk (gradient)", [gradient_up], 0.0, [0.0], None),
        _Case("trunk → head (gradient)", [gradient_down], 0.0, [0.0], None),
    ]
    rows = []
    for case in cases:
        for wire in get_args(Wire):
            for factor in _STEP_FACTORS if wire == "steps" else (1.0,):
                progress(f"{case.boundary}, {wire}")
                rows.append(_row(case, wire, factor))
    lz4_encode, lz4_decode = plain_lz4_ms(down)
    return {
        "tokens": len(parts.ids),
        "sequences": len(parts.lengths),
        "loss_exact": exact,
        "loss_noise_alone": statistics.mean(alone),
        "plain_lz4": {"bits": _plain_lz4_bits(down), "encode_ms": lz4_encode, "decode_ms": lz4_decode},
        "rows": [asdict(row) for row in rows],
        "one_token": {wire: one_token_us(up.shape[1], wire, _LANE_STEP) for wire in get_args(Wire)},
        "traffic": _traffic(rows, parts.lengths, up.shape[1], padded_to),
    }


def _row(case: _Case, wire: Wire, factor: float) -> Row:
    first = case.draws[0]
    step = factor * _step(case, first) if wire == "steps" else 0.0
    sizes, errors, changes, entropies = [], [], [], []
    for tensor, exact in zip(case.draws, case.exact, strict=True):
        spec, frame = encode_tensor(tensor, wire, case.boundary, step=step, stochastic=case.gradient)
        (back,) = decode_tensors([spec], [frame], boundary=case.boundary)
        sizes.append(memoryview(frame).nbytes * 8 / tensor.numel())
        errors.append(float((back.float() - tensor).norm() / tensor.norm()))
        if case.loss:
            changes.append(case.loss(back.float()) - exact)
        if spec.encoding == "steps":
            entropies.append(_entropy((back.double() / spec.step).round()))
    return Row(
        boundary=case.boundary,
        wire=wire,
        factor=factor,
        bits=statistics.mean(sizes),
        entropy=statistics.mean(entropies) if entropies else None,
        relative_error=statistics.mean(errors),
        loss_change=statistics.mean(changes) if changes else None,
        **asdict(codec_times(first, wire, step=step, stochastic=case.gradient)),
    )


def _step(case: _Case, tensor: Tensor) -> float:
    size = Size.of(tensor)
    return case.step or size.step(tensor.numel(), gradient=case.gradient)


def _entropy(codes: Tensor) -> float:
    """Bits per element that an ideal coder of independent integers needs."""
    shares = torch.unique(codes, return_counts=True)[1].double() / codes.numel()
    return float(-(shares * shares.log2()).sum())


def _plain_lz4_bits(tensor: Tensor) -> float:
    return len(lz4.block.compress(tensor.contiguous().numpy(), store_size=False)) * 8 / tensor.numel()


def _traffic(rows: Sequence[Row], lengths: Sequence[int], hidden: int, padded_to: int) -> dict[str, float]:
    """Bytes of one training pass over all four boundaries, here and as fp16 padded to a fixed length."""
    bits = sum(row.bits for row in rows if row.wire == "steps" and row.factor == 1.0)
    ours = bits / 8 * sum(lengths) * hidden
    padded = 4 * 2.0 * padded_to * len(lengths) * hidden
    return {
        "padded_to": padded_to,
        "bits_per_element": bits,
        "bytes": round(ours),
        "padded_fp16_bytes": round(padded),
        "times_fewer": padded / ours,
    }
