"""What a session has sent: enough to fill another worker's caches with the very same bytes."""

from collections.abc import Sequence
from typing import cast

from codec.messages import Extend
from silo_agent.packed import Packed


class Recording:
    """The extends that a session's caches on the trunk are made of, oldest first.

    The frames are kept as they were sent. To noise the same hidden states a second time would give
    away some of the noise; sending the same frame again gives away nothing.
    """

    def __init__(self, capacity: int) -> None:
        """`capacity` is what all rows of the session together can hold, in tokens."""
        self._capacity = capacity
        self._lengths: dict[int, int] = {}
        self._packed: list[Packed] | None = []

    @property
    def packed(self) -> Sequence[Packed] | None:
        """What to send again, in this order; None if so much was overwritten that it was given up."""
        return self._packed

    def add(self, packed: Packed) -> None:
        """An `Extend` was carried out. What it overwrites need not be sent again."""
        if self._packed is None:
            return
        request = cast("Extend", packed.request)
        rolled = False
        for row, start, length in zip(request.rows, request.starts, request.lengths, strict=True):
            rolled = rolled or start < self._lengths.get(row, 0)
            self._lengths[row] = start + length
        self._packed.append(packed)
        if rolled:
            kept = needed([cast("Extend", each.request) for each in self._packed])
            self._packed = [self._packed[index] for index in kept]
            # Frames are kept whole. Rows that are overwritten bit by bit leave many that matter little.
            if sum(each.tokens for each in self._packed) > 2 * self._capacity:
                self._packed = None


def needed(extends: Sequence[Extend]) -> list[int]:
    """Which of these, by index, leave the rows as all of them do, in order and from nothing.

    Read from the end: an extend is needed if, in one of its rows, it wrote below the length up to which
    that row still matters. Then what stood before its own first tokens matters, in each of its rows.
    """
    matters: dict[int, int] = {}
    for extend in extends:
        for row, start, length in zip(extend.rows, extend.starts, extend.lengths, strict=True):
            matters[row] = start + length
    kept = []
    for index in reversed(range(len(extends))):
        rows, starts = extends[index].rows, extends[index].starts
        if any(start < matters[row] for row, start in zip(rows, starts, strict=True)):
            matters.update(zip(rows, starts, strict=True))
            kept.append(index)
    return kept[::-1]
