"""KV caches: one contiguous row per sequence and span, that grows by pages.

On a CPU contiguous rows beat scattered pages (docs/log.md). Rows of about one size lie side by side in a
slab, so that those with one new token each can attend in one call (`workers/abreast.py`). A row takes
pages as its sequence grows, and all rows of a worker take them from one budget. Only this file and
`abreast.py` know how they lie.
"""

import math
import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from codec.errors import LimitError
from workers.slab import Slab, shares

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

    def room_for(self, tokens: int) -> int:
        """Tokens of the slot that a row of `tokens` tokens lies in: one of few sizes, so that rows meet."""
        if not shares(self.device):
            return tokens
        step = PAGE * mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, self.bytes_for(PAGE))
        room = step
        while room < tokens:
            room = -(-int(room * _GROWTH) // step) * step
        return room


@dataclass(frozen=True, slots=True)
class SlabPlace:
    """Where a row lies: a slot of a slab `[slots, layers, 2, groups, tokens, dim]`, keys before values."""

    slab: Slab
    slot: int
    tensor: Tensor
    """The whole slab."""


class KVMemory:
    """The bytes that all rows of a worker may take together, and the slabs that they lie in."""

    def __init__(self, budget: int = sys.maxsize) -> None:
        self.budget, self.held = budget, 0
        self.make_room: Callable[[int], None] = lambda _: None
        """Called with the bytes that are missing; may free rows."""
        self._slabs: dict[tuple[KVShape, int], list[Slab]] = {}

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

    def place(self, shape: KVShape, room: int) -> SlabPlace:
        """A slot of `room` tokens, all zero. Its bytes count when the row takes them, not here."""
        slabs = self._slabs.setdefault((shape, room), [])
        slab = next((slab for slab in slabs if not slab.full), None)
        size = (shape.layers, 2, shape.groups, room, shape.dim)
        if slab is None:
            slab = Slab(math.prod(size), shape.dtype, shape.device)
            slabs.append(slab)
        return SlabPlace(slab, slab.take(), slab.tensor.view(len(slab.tensor), *size))

    def give_back(self, shape: KVShape, place: SlabPlace) -> None:
        """The row has left it."""
        place.slab.give_back(place.slot)
        if place.slab.empty:
            key = (shape, place.tensor.shape[4])
            self._slabs[key].remove(place.slab)
            if not self._slabs[key]:
                del self._slabs[key]


class RowCache:
    """Keys and values of one sequence in every block of a span, up to `capacity` tokens.

    A pass appends block by block; `advance` then makes the new tokens part of the sequence. Until
    it is called the row's length stands, so a pass that fails half-way is as if it never began.
    """

    def __init__(self, shape: KVShape, capacity: int, memory: KVMemory | None = None) -> None:
        """Nothing is taken yet. Without `memory` a row is by itself, and bounded by its capacity alone."""
        self.shape, self._memory = shape, memory or KVMemory()
        self.place: SlabPlace | None = None
        self._keys = self._values = torch.empty(0)
        self._tokens = self._written = 0
        self.capacity = capacity
        self.length = 0

    @property
    def bytes(self) -> int:
        """What it holds of the memory."""
        return self.shape.bytes_for(self._tokens)

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
        if needed > self._tokens:
            self._grow(needed)

    def append(self, layer: int, key_1GTD: Tensor, value_1GTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write one block's new keys and values; return all of the sequence's, old and new."""
        end, layer = self.length + key_1GTD.shape[2], layer - self.shape.first
        self._keys[layer, :, :, self.length : end] = key_1GTD
        self._values[layer, :, :, self.length : end] = value_1GTD
        self._written = max(self._written, end)
        return self._keys[layer, :, :, :end], self._values[layer, :, :, :end]

    def extended(self, new: int) -> None:
        """`new` tokens will be written to its place from outside; beyond them it shall be zero.

        What was written there and then forgotten may be anything, such as not a number.
        """
        end = self.length + new
        if self._written > end:
            self._keys[:, :, :, end : self._written] = 0
            self._values[:, :, :, end : self._written] = 0
        self._written = end

    def advance(self, new: int) -> None:
        """The pass is complete: its `new` tokens belong to the sequence."""
        self.length += new

    def free(self) -> None:
        """Give everything back."""
        self._memory.held -= self.bytes
        self._keys = self._values = torch.empty(0)
        if self.place is not None:
            self._memory.give_back(self.shape, self.place)
        self.place = None
        self._tokens = self._written = self.length = 0

    def _grow(self, needed: int) -> None:
        held = self._tokens
        size = min(self.capacity, -(-max(needed, int(held * _GROWTH)) // PAGE) * PAGE)
        if self.shape.bytes_for(size - held) > self._memory.free:
            size = needed  # Nobody has to make room for more than that.
            self._memory.ensure(self.shape.bytes_for(size - held))
        room = self.shape.room_for(size)
        if self.place is None or room > self.place.tensor.shape[4]:
            self._move(room)
        self._memory.held += self.shape.bytes_for(size - held)
        self._tokens = size

    def _move(self, room: int) -> None:
        place, before = self._memory.place(self.shape, room), self.place
        keys, values = place.tensor[place.slot, :, :, None].unbind(1)
        if before is not None:
            # All that was written, not only up to `length`: a row that was rewound may yet be set back.
            kept = slice(self._written)
            keys[:, :, :, kept], values[:, :, :, kept] = (
                self._keys[:, :, :, kept],
                self._values[:, :, :, kept],
            )
            self._memory.give_back(self.shape, before)
        self.place, self._keys, self._values = place, keys, values
