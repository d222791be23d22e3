"""What requests bring to a pass, and who is in which blocks of it. Decisions only."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from codec.partition import Span
from workers.kv import RowCache


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one request brings to a pass: packed sequences, and how they are to be computed.

    `packed` is int64 `[T]` token ids for a span that embeds, else `[T, hidden]`, with
    `T = sum(lengths)`. With `caches`, one per sequence, the tokens continue what each cache holds.
    """

    packed: Tensor
    lengths: Sequence[int]
    blocks: Span | None = None
    """The blocks that it runs through; all of the span's if None."""
    adapter: str | None = None
    """Key of its adapter; the base model alone if None."""
    caches: Sequence[RowCache] | None = None
    mask: Tensor | None = None
    """Bool `[T, T]`, which new tokens of a sequence see which, where that is not causal."""
    keep: Tensor | None = None
    """For a span that predicts: the packed positions that get logits; all if None."""
    positions: Tensor | None = None
    """int64 `[T]`, where in their sequences the tokens stand, if not one behind the other: several
    candidates for one place, say."""

    @property
    def tokens(self) -> int:
        """`T`, the packed tokens."""
        return sum(self.lengths)

    @property
    def rows(self) -> int:
        """Rows of its result."""
        return self.tokens if self.keep is None else len(self.keep)

    def check_room(self) -> None:
        """Have room for the new tokens in every cache. Raises `LimitError` if there is none."""
        for cache, length in self._growing():
            cache.check_room(length)

    def advance(self) -> None:
        """The pass is complete: its tokens belong to the caches."""
        for cache, length in self._growing():
            cache.advance(length)

    def _growing(self) -> Iterable[tuple[RowCache, int]]:
        return () if self.caches is None else zip(self.caches, self.lengths, strict=True)

    def squares(self, device: torch.device) -> list[Tensor | None]:
        """The mask's square `[length, length]` of each sequence; None where it is causal."""
        if self.mask is None:
            return [None] * len(self.lengths)
        mask = self.mask.to(device)
        edges = pairwise(accumulate(self.lengths, initial=0))
        return [mask[start:stop, start:stop] for start, stop in edges]


def stretches(ranges: Sequence[Span]) -> list[tuple[Span, tuple[int, ...]]]:
    """Cut ranges of blocks where one begins or ends: each stretch in order, and the ranges that hold it.

    Ranges are told by their index. Those that are all the same are one stretch, even without blocks.
    """
    everyone = tuple(range(len(ranges)))
    if len(set(ranges)) == 1:
        return [(ranges[0], everyone)]
    cuts = sorted({edge for span in ranges if len(span) for edge in (span.start, span.stop)})
    pieces = [Span(start, stop) for start, stop in pairwise(cuts)]
    inside = [tuple(i for i in everyone if ranges[i].contains(piece)) for piece in pieces]
    return [(piece, members) for piece, members in zip(pieces, inside, strict=True) if members]
