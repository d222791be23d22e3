"""One silo's part of a worker's KV memory."""

from workers.kv import KVMemory, KVShape, SlabPlace


class Allowance(KVMemory):
    """What one silo holds of the `whole`. `budget` is what is its own.

    Beyond that it may borrow what is free, with sessions that can be sent again: others whose own part is
    not used up take it back.
    """

    def __init__(self, whole: KVMemory, budget: int) -> None:
        self._whole, self._held = whole, 0
        super().__init__(budget)

    @property
    def held(self) -> int:
        """Bytes that the silo's rows take; they count in the whole too."""
        return self._held

    @held.setter
    def held(self, size: int) -> None:
        self._whole.held += size - self._held
        self._held = size

    @property
    def free(self) -> int:
        """Bytes that can be had without making room, borrowed ones among them."""
        return self._whole.free

    @property
    def borrowed(self) -> int:
        """Bytes that it holds beyond what is its own."""
        return max(0, self._held - self.budget)

    def place(self, shape: KVShape, room: int) -> SlabPlace:
        """See `KVMemory.place`: rows of all silos lie in the same slabs, so that they can attend together."""
        return self._whole.place(shape, room)

    def give_back(self, shape: KVShape, place: SlabPlace) -> None:
        """See `KVMemory.give_back`."""
        self._whole.give_back(shape, place)
