"""Boundary tensors for replay silos: recorded from a real model, or made up in its size."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.parts import Parts
from benchmarks.replay import Crossing, Replayed
from codec.messages import Wire
from codec.tensors import encode_tensor

_GRADIENT = 1e-3
"""Deviation of a made-up gradient, in units of the hidden states'."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A micro-batch of a silo: hidden states `[T, hidden]` that leave the head, and the gradient `[T,
    hidden]` that leaves the tail."""

    lengths: tuple[int, ...]
    sent: Tensor
    gradient: Tensor

    def encoded(self, wire: Wire) -> Replayed:
        """As it crosses."""
        return Replayed(
            lengths=self.lengths,
            sent=crossing(self.sent, wire),
            gradient=crossing(self.gradient, wire, stochastic=True),
            useful=sum(self.lengths),
        )


def crossing(tensor: Tensor, wire: Wire, *, stochastic: bool = False) -> Crossing:
    """The tensor, encoded once for all times that it is sent."""
    spec, frame = encode_tensor(tensor, wire, "replay", stochastic=stochastic)
    return Crossing(spec, bytes(frame))


def made_up(lengths: Sequence[int], hidden: int, seed: int = 0) -> Recorded:
    """Normal numbers in bf16, as a silo would send that computes in it."""
    generator = torch.Generator().manual_seed(seed)
    shape = sum(lengths), hidden
    sent, gradient = (torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(2))
    return Recorded(tuple(lengths), sent, gradient * _GRADIENT)


def made_up_lengths(sequences: int, mean: int, seed: int) -> list[int]:
    """Lengths between half of `mean` and half as much again."""
    draw = random.Random(seed)
    return [draw.randint(max(1, mean // 2), mean + mean // 2) for _ in range(sequences)]


def recorded(parts: Parts) -> Recorded:
    """What crosses in one training pass over the parts' texts."""
    sent, _, gradient, _ = parts.boundaries()
    return Recorded(tuple(parts.lengths), sent, gradient)
