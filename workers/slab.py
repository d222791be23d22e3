"""Memory for many pieces of one size, side by side at equal distances.

On Linux a CPU's slab is address space alone until a slot is written to, and gives a slot's memory back to
the system when the slot is given back. So slots that nobody has take nothing, and there can be many.
Where the system has no such promise a slab is a single slot.
"""

import heapq
import mmap
import sys

import torch

_SLOTS = 64


def shares(device: torch.device) -> bool:
    """Whether slabs on `device` have several slots."""
    return sys.platform == "linux" and device.type == "cpu"


class Slab:
    """Slots of `elements` elements each, zero when they are taken."""

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        """Where slabs are shared, a slot must be whole pages of the system's.

        Raises `MemoryError`, or `RuntimeError` from torch, if there is not even room for one.
        """
        self._memory: mmap.mmap | None = None
        if elements and shares(device):
            self._stride = elements * dtype.itemsize
            if self._stride % mmap.PAGESIZE:
                raise ValueError(f"slots of {self._stride} bytes are not whole pages")
            slots, self._memory = _reserve(self._stride)
            self.tensor = torch.frombuffer(self._memory, dtype=dtype).view(slots, elements)
        else:
            self.tensor = torch.zeros(1, elements, dtype=dtype, device=device)
        self._free = list(range(len(self.tensor)))

    @property
    def full(self) -> bool:
        """Whether every slot is taken."""
        return not self._free

    @property
    def empty(self) -> bool:
        """Whether no slot is."""
        return len(self._free) == len(self.tensor)

    def take(self) -> int:
        """The first free slot: those that are taken lie close together."""
        return heapq.heappop(self._free)

    def give_back(self, slot: int) -> None:
        """Nobody looks at it any more."""
        heapq.heappush(self._free, slot)
        if self._memory is not None:
            self._memory.madvise(mmap.MADV_DONTNEED, slot * self._stride, self._stride)


def _reserve(stride: int) -> tuple[int, mmap.mmap]:
    """Address space for as many slots as the system lets a process have; how many they are."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    slots = _SLOTS
    while True:
        try:
            return slots, mmap.mmap(-1, slots * stride, flags=flags)
        except OSError as error:  # More than there is memory, or a limit on address space.
            if slots == 1:
                raise MemoryError(f"{stride} bytes of KV cache: {error}") from None
            slots //= 2
