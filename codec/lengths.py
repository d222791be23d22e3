"""Masks as lengths: what says where sequences begin and end, without a mask ever crossing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from codec.errors import UsageError


def lengths_of(mask: Tensor) -> tuple[int, ...]:
    """Compress a padding mask `[batch, width]` of 0 and 1 to one length per sequence.

    Padding may stand left or right of a sequence, not inside it: causal order within a sequence
    is implied. Raises `UsageError` for any other mask and for an empty sequence.
    """
    kept = mask.bool()
    if kept.dim() != 2 or not kept.shape[1]:
        raise UsageError(f"a padding mask is [batch, width], this one is {tuple(mask.shape)}")
    edges = kept[:, 1:].ne(kept[:, :-1])
    rises = (edges & kept[:, 1:]).sum(1) + kept[:, 0]
    if bool((rises != 1).any()):
        row = int((rises != 1).nonzero()[0])
        raise UsageError(f"row {row} of the mask is not one unbroken sequence")
    return tuple(kept.sum(1).tolist())


def pack(padded: Tensor, mask: Tensor) -> Tensor:
    """`[batch, width, ...]` to `[sum(lengths), ...]`: the padding is dropped."""
    return padded[mask.bool()]


def unpack(packed: Tensor, mask: Tensor) -> Tensor:
    """`[sum(lengths), ...]` back to `[batch, width, ...]`, zero where the mask is."""
    out = packed.new_zeros(*mask.shape, *packed.shape[1:])
    out[mask.bool()] = packed
    return out


def positions(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> Tensor:
    """Position of every packed token, int64 `[sum(lengths)]`: each row counts up from its start."""
    if len(lengths) == 1:
        return torch.arange(starts[0], starts[0] + lengths[0], device=device)
    counts = torch.tensor(lengths)
    first = torch.tensor(starts) - (counts.cumsum(0) - counts)
    return (torch.arange(int(counts.sum())) + first.repeat_interleave(counts)).to(device)
