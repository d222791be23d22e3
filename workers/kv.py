"""KV caches: one contiguous buffer per sequence and span.

On a CPU contiguous buffers beat pages; on a GPU pages will pay. Only this class knows which it is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from codec.errors import LimitError


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token's keys and values take in `layers` blocks, of which `first` is the first.

    Blocks are counted from the start of the span that hosts them.
    """

    layers: int
    groups: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    first: int = 0

    def bytes_for(self, tokens: int) -> int:
        """Bytes of keys and values of `tokens` tokens."""
        return 2 * self.layers * self.groups * self.dim * tokens * self.dtype.itemsize


class RowCache:
    """Keys and values of one sequence in every block of a span, up to `capacity` tokens.

    A pass appends block by block; `advance` then makes the new tokens part of the sequence. Until
    it is called the row's length stands, so a pass that fails half-way is as if it never began.
    """

    def __init__(self, shape: KVShape, capacity: int) -> None:
        size = (shape.layers, 1, shape.groups, capacity, shape.dim)
        self._keys = torch.empty(size, dtype=shape.dtype, device=shape.device)
        self._values = torch.empty_like(self._keys)
        self._first = shape.first
        self.capacity = capacity
        self.length = 0

    def rewind(self, start: int) -> None:
        """Forget every token from position `start` on. Raises `LimitError` beyond the row's length."""
        if start > self.length:
            raise LimitError(
                f"new tokens start at position {start}, the cache ends at {self.length}", side="silo"
            )
        self.length = start

    def check_room(self, new: int) -> None:
        """Raises `LimitError` if `new` more tokens do not fit."""
        if self.length + new > self.capacity:
            raise LimitError(
                f"{self.length + new} tokens do not fit a session row of {self.capacity}",
                side="silo",
                hint="Open the session with a larger capacity (--max-tokens).",
            )

    def append(self, layer: int, key_1GTD: Tensor, value_1GTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write one block's new keys and values; return all of the sequence's, old and new."""
        end, layer = self.length + key_1GTD.shape[2], layer - self._first
        self._keys[layer, :, :, self.length : end] = key_1GTD
        self._values[layer, :, :, self.length : end] = value_1GTD
        return self._keys[layer, :, :, :end], self._values[layer, :, :, :end]

    def advance(self, new: int) -> None:
        """The pass is complete: its `new` tokens belong to the sequence."""
        self.length += new
