"""KV caches: one contiguous buffer per sequence and span, that grows by pages.

On a CPU contiguous buffers beat scattered pages (docs/log.md); only this file knows which it is. A
row takes pages as its sequence grows, and all rows of a worker take them from one budget.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from codec.errors import LimitError

PAGE = 64
"""Tokens by which a row grows at least."""
_GROWTH = 1.5
"""A row that is full becomes so much longer: then copying it costs a constant per token."""


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


class KVMemory:
    """The bytes that all rows of a worker may take together."""

    def __init__(self, budget: int) -> None:
        self.budget, self.held = budget, 0
        self.make_room: Callable[[int], None] = lambda _: None
        """Called with the bytes that are missing; may free rows."""

    @property
    def free(self) -> int:
        """Bytes that can be had without making room."""
        return self.budget - self.held

    def ensure(self, size: int) -> None:
        """Have `size` bytes free. Raises `LimitError` if that cannot be."""
        if size > self.free:
            self.make_room(size - self.free)
        if size > self.free:
            raise LimitError(
                f"{size / (1 << 20):.3g} MiB of KV cache are needed, {self.free / (1 << 20):.3g} are free",
                side="worker",
                hint="Ask for fewer rows or tokens, wait, or start the worker with more --kv-memory.",
            )


class RowCache:
    """Keys and values of one sequence in every block of a span, up to `capacity` tokens.

    A pass appends block by block; `advance` then makes the new tokens part of the sequence. Until
    it is called the row's length stands, so a pass that fails half-way is as if it never began.
    """

    def __init__(self, shape: KVShape, capacity: int, memory: KVMemory | None = None) -> None:
        """Nothing is taken yet. Without `memory` a row is bounded by its capacity alone."""
        self._shape, self._memory = shape, memory
        self._keys = self._values = self._new(0)
        self.capacity = capacity
        self.length = 0

    @property
    def bytes(self) -> int:
        """What it holds of the memory."""
        return self._shape.bytes_for(self._keys.shape[3])

    def rewind(self, start: int) -> None:
        """Forget every token from position `start` on. Raises `LimitError` beyond the row's length."""
        if start > self.length:
            raise LimitError(
                f"new tokens start at position {start}, the cache ends at {self.length}", side="silo"
            )
        self.length = start

    def check_room(self, new: int) -> None:
        """Have room for `new` more tokens. Raises `LimitError` if there is none."""
        needed = self.length + new
        if needed > self.capacity:
            raise LimitError(
                f"{needed} tokens do not fit a session row of {self.capacity}",
                side="silo",
                hint="Open the session with a larger capacity (--max-tokens).",
            )
        if needed > self._keys.shape[3]:
            self._grow(needed)

    def append(self, layer: int, key_1GTD: Tensor, value_1GTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write one block's new keys and values; return all of the sequence's, old and new."""
        end, layer = self.length + key_1GTD.shape[2], layer - self._shape.first
        self._keys[layer, :, :, self.length : end] = key_1GTD
        self._values[layer, :, :, self.length : end] = value_1GTD
        return self._keys[layer, :, :, :end], self._values[layer, :, :, :end]

    def advance(self, new: int) -> None:
        """The pass is complete: its `new` tokens belong to the sequence."""
        self.length += new

    def free(self) -> None:
        """Give everything back."""
        if self._memory is not None:
            self._memory.held -= self.bytes
        self._keys = self._values = self._new(0)
        self.length = 0

    def _grow(self, needed: int) -> None:
        held = self._keys.shape[3]
        size = min(self.capacity, -(-max(needed, int(held * _GROWTH)) // PAGE) * PAGE)
        if self._memory is not None and self._shape.bytes_for(size - held) > self._memory.free:
            size = needed  # Nobody has to make room for more than that.
            self._memory.ensure(self._shape.bytes_for(size - held))
        keys, values = self._new(size), self._new(size)
        # All that was held, not only up to `length`: a row that was rewound may yet be set back.
        keys[:, :, :, :held], values[:, :, :, :held] = self._keys, self._values
        if self._memory is not None:
            self._memory.held += self._shape.bytes_for(size - held)
        self._keys, self._values = keys, values

    def _new(self, tokens: int) -> Tensor:
        shape = self._shape
        size = (shape.layers, 1, shape.groups, tokens, shape.dim)
        return torch.empty(size, dtype=shape.dtype, device=shape.device)
