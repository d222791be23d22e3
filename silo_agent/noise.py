"""Gaussian noise on the hidden states that leave the head, in training and in generation.

The paper's mechanism (arXiv 2505.15683). What it protects against and what not: docs/privacy.md.
"""

import hashlib
import math
import os
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from codec.errors import UsageError
from codec.quantise import KAPPA


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """How strong: exactly one of three ways to say it; all zero is no noise.

    `clip`, if not zero, bounds the L2 norm of each token's vector before the noise. `relative` is the
    standard deviation in units of the boundary's own, `absolute` in the hidden states' own units, and
    `mean_abs` the paper's parameter V, the mean absolute value of the noise.
    """

    relative: float = 0.0
    absolute: float = 0.0
    mean_abs: float = 0.0
    clip: float = 0.0

    def __post_init__(self) -> None:
        values = (self.relative, self.absolute, self.mean_abs)
        if sum(value != 0 for value in values) > 1:
            raise UsageError("give one of --noise, --noise-abs and --noise-mean-abs")
        if any(value < 0 or not math.isfinite(value) for value in (*values, self.clip)):
            raise UsageError("noise and --noise-clip cannot be negative or infinite")

    def sigma(self, boundary_std: float) -> float:
        """Standard deviation of the noise for a boundary of standard deviation `boundary_std`.

        A zero-mean Gaussian has a mean absolute value of sigma * sqrt(2/pi).
        """
        if self.mean_abs:
            return self.mean_abs * math.sqrt(math.pi / 2)
        return self.absolute or self.relative * boundary_std


Random = Callable[[int], bytes]
"""So many random bytes."""
Repeatable = Callable[[bytes], Random]
"""Random bytes for what has this digest."""


class Moments(NamedTuple):
    """Of everything noised so far: how many elements, their mean, and the squares about it."""

    elements: int = 0
    mean: float = 0.0
    square: float = 0.0


def repeatable(secret: bytes, step: int, microbatch: int) -> Repeatable:
    """Random bytes that are the same whenever this micro-batch of this step is noised as it was.

    A step that is done again then sends what it sent before: the same hidden states under new noise
    would average out. Other hidden states, as of a head that a redone step left a little different, or
    noise of another strength, get other bytes: the same would cancel, and bare the difference. They are
    SHAKE256's, a function of the place, of what is noised, and of `secret`, 32 bytes that nobody else
    can guess.
    """
    place = secret + step.to_bytes(8, "little") + microbatch.to_bytes(8, "little")
    return lambda about: lambda size: hashlib.shake_256(place + about).digest(size)


class Noise:
    """The noise source of one silo process.

    The boundary's standard deviation is measured over everything noised so far, so that a single
    decoded token gets the same noise as the prompt before it. The noise is made of the operating
    system's random bytes; `seed` is for tests, repeats the noise, and warns.
    """

    def __init__(self, scale: NoiseScale, *, seed: int | None = None, device: str = "cpu") -> None:
        """`device` is where a seeded generator lives. Raises `UsageError` for a seed over 64 bits."""
        self._scale = scale
        self._generator: torch.Generator | None = None
        if seed is not None:
            if scale != NoiseScale():
                warnings.warn("a fixed noise seed: whoever knows it can remove the noise", stacklevel=2)
            if not -(2**63) <= seed < 2**63:
                raise UsageError(f"{seed} is not a 64-bit seed")
            self._generator = torch.Generator(device).manual_seed(seed)
        self._seed = seed
        self.moments = Moments()
        """Set back where something is to be noised again as it was."""
        self._sigma = 0.0
        self.vectors = 0
        """How many were noised so far."""

    @property
    def scale(self) -> NoiseScale:
        """How strong it is."""
        return self._scale

    def secret(self) -> bytes:
        """A fresh secret for `repeatable`; with a fixed seed, one that follows from it."""
        if self._seed is None:
            return os.urandom(32)
        return hashlib.sha256(f"noise seed {self._seed}".encode()).digest()

    @property
    def step(self) -> float:
        """The quantisation step that goes with the noise added last; 0 without noise."""
        return KAPPA * self._sigma

    @property
    def off(self) -> bool:
        """Whether nothing is ever added."""
        return self._scale == NoiseScale()

    def add(self, hidden: Tensor, again: Repeatable | None = None) -> Tensor:
        """`hidden` `[tokens, hidden]`, clipped, plus noise; gradients pass through the noise unchanged.

        The noise is fresh, or with `again` the same for the same hidden states and strength.
        """
        self.vectors += len(hidden)
        if self.off:
            return hidden
        bounded = clipped(hidden, self._scale.clip) if self._scale.clip else hidden
        self._sigma = self._scale.sigma(self._observe(bounded.detach()) if self._scale.relative else 0.0)
        if not self._scale.sigma(1.0):
            return bounded.to(hidden.dtype)
        # A fixed noise is the same in two runs that differ by how sums are rounded.
        about = _digest(bounded.detach(), self._sigma) if again and self._seed is None else b""
        random = again(about) if again else None
        # In fp32: what rounding to fewer bits does afterwards is done to noisy values.
        return (bounded.float() + self._normal(hidden, random) * self._sigma).to(hidden.dtype)

    def _normal(self, like: Tensor, random: Random | None) -> Tensor:
        if random is not None or self._generator is None:
            return system_normal(like.shape, like.device, random)
        return torch.randn(like.shape, generator=self._generator, device=like.device, dtype=torch.float32)

    def _observe(self, hidden: Tensor) -> float:
        """Merge this tensor into the running moments (Chan et al.); the standard deviation so far."""
        count, values = hidden.numel(), hidden.double()
        mean, square = float(values.mean()), float((values - values.mean()).square().sum())
        before = self.moments
        total, delta = before.elements + count, mean - before.mean
        square += before.square + delta * delta * before.elements * count / total
        self.moments = Moments(total, before.mean + delta * count / total, square)
        return math.sqrt(square / total)


def _digest(hidden: Tensor, sigma: float) -> bytes:
    """Of what is noised, and how strongly."""
    values = hidden.cpu().contiguous().view(torch.uint8).numpy().data
    return hashlib.blake2b(values).digest() + struct.pack("<d", sigma)


def clipped(hidden: Tensor, bound: float) -> Tensor:
    """Each vector of `hidden` `[tokens, hidden]`, shortened to an L2 norm of `bound` if it is longer; fp32.

    Autograd's gradient is the exact one: where a vector was shortened, what points along it is lost.
    """
    norms: Tensor = torch.linalg.vector_norm(hidden.float(), dim=-1, keepdim=True)
    # A tensor: a number over a tensor is times the reciprocal, and would not be exactly 1 for a short vector.
    limit = norms.new_tensor(bound)
    return hidden.float() * (limit / norms.clamp_min(limit.item()))


def system_normal(shape: torch.Size, device: torch.device, random: Random | None = None) -> Tensor:
    """Standard normal values, fp32, from the operating system's random bytes, or `random`'s (Box and Muller).

    No torch generator will do: the CPU's Mersenne twister uses 32 bits of its seed, and every chat
    template begins with tokens whose hidden states the server can compute. It would see their noise
    bare, try 2**32 seeds, and take off all the noise of the process.
    """
    pairs = (shape.numel() + 1) // 2
    drawn = np.frombuffer(bytearray((random or os.urandom)(8 * pairs)), dtype=np.int32).reshape(2, pairs)
    # Uniform in (0, 1), never 0 or 1: 32 bits, so the normal values reach out to 6.7.
    uniform = torch.from_numpy(drawn).to(device).double().mul_(2.0**-32).add_(0.5 + 2.0**-33)
    radius, angle = uniform[0].log_().mul_(-2).sqrt_(), uniform[1].mul_(2 * math.pi)
    both = torch.cat((radius * angle.cos(), radius * angle.sin()))
    return both[: shape.numel()].reshape(shape).float()
