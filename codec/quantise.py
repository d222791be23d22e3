"""Uniform quantisation: a tensor as integers, on the tensor's own device.

One step for a whole tensor. Values become `round(x / step)`, zigzagged so that small ones of either
sign are small integers; an outlier costs more bytes only where it stands. After the Gaussian noise
a step near its deviation loses nothing that the noise did not hide already, and as post-processing
of the noisy tensor it costs no protection (docs/codec.md).
"""

import torch
from torch import Tensor

from codec.errors import FrameError

SHARE = 0.02
"""The step of hidden states without noise, as a share of the tensor's root mean square."""

GRADIENT_SHARE = 0.15
"""The same for gradients: stochastic rounding keeps their expectation, so the step may be wide."""

KAPPA = 1.0
"""The step after noise, in units of the noise's standard deviation."""

_MAX_CODE = 1 << 30


def step_of(tensor: Tensor, *, stochastic: bool = False) -> float:
    """The step for a tensor without noise; `stochastic` for a gradient."""
    rms = float(tensor.float().square().mean().sqrt()) if tensor.numel() else 0.0
    return (GRADIENT_SHARE if stochastic else SHARE) * rms or 1.0


def quantise(tensor: Tensor, step: float, *, stochastic: bool) -> Tensor:
    """Codes as byte planes, uint8 `[planes, elements]`, lowest byte first; no plane is needless.

    `stochastic` rounds up with the probability of the fraction, so that the expectation is exact:
    gradients need that. Raises `FrameError` if a value is over 2**30 steps.
    """
    scaled = tensor.detach().reshape(-1).float() / step
    scaled = scaled.add_(torch.rand_like(scaled)).floor_() if stochastic else scaled.round_()
    largest = float(scaled.abs().max()) if scaled.numel() else 0.0
    if not largest < _MAX_CODE:
        raise FrameError(f"a value of {largest * step:.3g} does not fit steps of {step:.3g}")
    count = max(1, (2 * int(largest) + 1).bit_length() + 7 >> 3)
    codes = scaled.to(torch.int32)
    zigzag = (codes << 1) ^ (codes >> 31)
    return torch.stack([((zigzag >> (8 * k)) & 255).to(torch.uint8) for k in range(count)])


def dequantise(planes: Tensor, step: float) -> Tensor:
    """The values, fp32 `[elements]`, from byte planes uint8 `[planes, elements]`."""
    zigzag = planes[0].to(torch.int32)
    for k in range(1, len(planes)):
        zigzag |= planes[k].to(torch.int32) << (8 * k)
    # The shift keeps the sign bit, which belongs to the code: it is masked off.
    codes = ((zigzag >> 1) & 0x7FFFFFFF) ^ -(zigzag & 1)
    return codes.to(torch.float32).mul_(step)
