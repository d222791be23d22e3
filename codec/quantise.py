"""Quantisation: a tensor as small integers, on the tensor's own device.

Values become `round(x / step)`. The step is one for the whole tensor (`steps`), or one for each block
of 64 elements (`blocks`). Integers from -128 to 127 are zigzagged into one byte each; the few beyond,
outliers, are listed beside them, so that they cost bits only where they stand. After the Gaussian
noise a step near its deviation loses nothing that the noise did not hide already, and as
post-processing of the noisy tensor it costs no protection (docs/codec.md).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from codec.frames import BLOCK, ELEMENTS_PER_OUTLIER
from codec.scratch import scratch

SHARE = 0.03
"""The step of hidden states without noise, as a share of a typical row's root mean square."""

GRADIENT_SHARE = 0.15
"""The same for gradients and their root mean square: stochastic rounding keeps their expectation."""

KAPPA = 1.0
"""The step after noise, in units of the noise's standard deviation."""

_MAGIC = 1.5 * 2.0**23
"""Added to a number below 2**22 it rounds it to an integer, half to even, in the low mantissa bits:
one pass over the tensor scales, rounds and leaves the code as an integer."""

_MAX_CODE = 1 << 30
_INT16 = 32_000
_EXACT_IN_FP32 = 1e-15
_POOL = 1 << 21


@dataclass(frozen=True, slots=True)
class Codes:
    """`body` uint8 `[n]`, zigzagged; at the int64 `positions` `[k]` the int64 `values` `[k]` instead.

    `body` may be scratch memory (`codec.scratch`).
    """

    body: Tensor
    positions: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Size:
    """How large a tensor is: the `norm` of all of it, and the root mean square of a `typical` row.

    A row is the last dimension. The norm is finite just if every value is.
    """

    norm: float
    typical: float

    @classmethod
    def of(cls, tensor: Tensor, dtype: torch.dtype = torch.float32) -> "Size":
        """In one pass, and one wait for the device. `tensor` is not empty."""
        rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else tensor.numel())
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
        norm, middle = torch.stack((torch.linalg.vector_norm(norms), norms.median())).tolist()
        if not _EXACT_IN_FP32 < norm < math.inf and dtype != torch.float64:
            return cls.of(tensor, torch.float64)  # fp32 has no squares of what is very large or small.
        return cls(norm, middle / math.sqrt(rows.shape[1]))

    def step(self, elements: int, *, gradient: bool) -> float:
        """The step for a tensor of so many elements without noise.

        Hidden states are measured by their median row, which a few massive activations do not move.
        Most rows of a gradient may be zero: the whole decides.
        """
        whole = self.norm / math.sqrt(elements)
        return (GRADIENT_SHARE * whole if gradient else SHARE * (self.typical or whole)) or 1.0


_pools: dict[torch.device, Tensor] = {}


def quantise(flat: Tensor, step: float, norm: float, *, stochastic: bool) -> Codes | None:
    """Codes of `flat` fp32 `[n]`, whose norm is `norm`, in units of `step`.

    `stochastic` rounds up with the probability of the fraction, so that the expectation is exact:
    gradients need that. None if the step is so fine that outliers are the rule, or one is over 2**30
    steps: bf16 is cheaper then, and as exact where it counts.
    """
    size, device = len(flat), flat.device
    dither = _dither(flat) if stochastic else None
    scaled = scratch("scaled", size, torch.float32, device)
    if dither is None:
        torch.add(torch.full((), _MAGIC, device=device), flat, alpha=1 / step, out=scaled)
    else:
        torch.add(dither, flat, alpha=1 / step, out=scaled).add_(_MAGIC)
    if norm > _INT16 * step:
        scaled.clamp_(_MAGIC - _INT16, _MAGIC + _INT16)
    wide = scratch("wide", size, torch.int16, device).copy_(scaled.view(torch.int32))
    narrow = scratch("narrow", size, torch.int8, device).copy_(wide)
    positions = _beyond(wide) if norm > 127 * step else torch.empty(0, dtype=torch.int64)
    if not len(positions):
        return Codes(_zigzag(narrow), positions, positions)
    if len(positions) * ELEMENTS_PER_OUTLIER > len(flat):
        return None
    exact = flat[positions].double() / step
    values = exact.round_() if dither is None else exact.add_(dither[positions]).round_()
    if not float(values.abs().max()) < _MAX_CODE:
        return None
    narrow[positions] = 0
    return Codes(_zigzag(narrow), positions, values.long())


def quantise_blocks(flat: Tensor, bits: int, *, stochastic: bool) -> tuple[Tensor, Tensor]:
    """Steps bf16 `[ceil(n / 64)]`, and the body uint8 `[n]` of `flat` fp32 `[n]` in `bits` bits."""
    short = -len(flat) % BLOCK
    blocks = torch.nn.functional.pad(flat, (0, short)).view(-1, BLOCK) if short else flat.view(-1, BLOCK)
    largest = (1 << (bits - 1)) - 1
    # bf16 keeps 8 bits: rounded up by as much, no code exceeds the largest.
    steps = (blocks.abs().amax(1) * ((1 + 2.0**-7) / largest)).to(torch.bfloat16)
    scaled = scratch("scaled", blocks.numel(), torch.float32, flat.device).view(-1, BLOCK)
    torch.div(blocks, steps.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None], out=scaled)
    if stochastic:
        scaled += _dither(scaled.view(-1)).view(-1, BLOCK)
    codes = scratch("narrow", len(flat), torch.int8, flat.device)
    codes.copy_(scaled.add_(_MAGIC).view(-1)[: len(flat)].view(torch.int32))
    return steps, _zigzag(codes)


def dequantise(codes: Codes, step: float) -> Tensor:
    """The values, fp32 `[n]`; `codes.body` is used up."""
    values = _unzigzag(codes.body).to(torch.float32).mul_(step)
    if len(codes.positions):
        values[codes.positions] = codes.values.to(torch.float32).mul_(step)
    return values


def dequantise_blocks(body: Tensor, steps: Tensor) -> Tensor:
    """The values, fp32 `[n]`, of `quantise_blocks`; `body` is used up."""
    codes = _unzigzag(body).to(torch.float32)
    short = -len(codes) % BLOCK
    padded = torch.nn.functional.pad(codes, (0, short)) if short else codes
    return (padded.view(-1, BLOCK).mul_(steps.float()[:, None])).view(-1)[: len(codes)]


def _zigzag(codes: Tensor) -> Tensor:
    """int8 to uint8, small numbers of either sign to small ones. In place."""
    sign = scratch("sign", len(codes), torch.int8, codes.device)
    torch.bitwise_right_shift(codes, 7, out=sign)
    codes += codes  # A shift to the left; what falls out at the top is the sign.
    codes ^= sign
    return codes.view(torch.uint8)


def _unzigzag(body: Tensor) -> Tensor:
    sign = scratch("sign", len(body), torch.int8, body.device)
    torch.bitwise_and(body, 1, out=sign.view(torch.uint8))
    sign.neg_()
    body >>= 1
    codes = body.view(torch.int8)
    codes ^= sign
    return codes


def _beyond(wide: Tensor) -> Tensor:
    """Where int16 codes do not fit a byte, int64, ascending."""
    if wide.device.type != "cpu":
        return ((wide > 127) | (wide < -128)).nonzero().view(-1)
    # Bits first: far fewer bytes to search, and torch's own comparison is seven times as slow.
    shifted = torch.add(wide, 128, out=scratch("shifted", len(wide), torch.int16, wide.device))
    packed = np.packbits(shifted.numpy().view(np.uint16) > 255)
    bytes_hit = np.flatnonzero(packed != 0)
    bits_hit = np.flatnonzero(np.unpackbits(packed[bytes_hit]))
    return torch.from_numpy(bytes_hit[bits_hit >> 3] * 8 + (bits_hit & 7))


def _dither(like: Tensor) -> Tensor:
    """Uniform from -0.5 to 0.5, fp32 `[n]`: a pool drawn once per process and device, from anywhere on.

    Fresh numbers would take longer than all the rest of an encoding. The pool is stratified and read
    as a ring, so over the random start each element's dither is uniform. It is no secret.
    """
    pool = _pools.get(like.device)
    if pool is None:
        order = torch.randperm(_POOL, device=like.device)
        pool = (order + torch.rand(_POOL, device=like.device)).div_(_POOL).sub_(0.5)
        _pools[like.device] = pool
    start, size = int(torch.randint(_POOL, ())), like.numel()
    rounds, rest = divmod(start + size, _POOL)
    return pool[start:rest] if not rounds else torch.cat((pool[start:], *[pool] * (rounds - 1), pool[:rest]))
