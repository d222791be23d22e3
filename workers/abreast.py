"""Rows that lie side by side in a slab, have one new token each, and attend in one call.

A call for every row and block costs more in calling than in computing, and is too little work for more
than one core. Rows abreast are of different lengths, so what lies beyond a row's end is masked; and they
need not be next to each other: the slots between them are computed too, and nobody looks at the result.
How much of that is worth it is decided once a pass, from counts alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.kv import PAGE, RowCache, SlabPlace

_WASTE = 1.5
"""How much more may be read in one call than what the rows hold."""


def runs(rows: Sequence[tuple[int, int]]) -> list[range]:
    """Cut rows of one slab, as (slot, tokens) in order of their slots, into those that share a call.

    A row counts as a page at least: a call of its own costs as much.
    """
    found: list[range] = []
    begin, longest, total = 0, 0, 0
    for index, (slot, tokens) in enumerate(rows):
        size = max(tokens, PAGE)
        longest, total = max(longest, size), total + size
        if (slot + 1 - rows[begin][0]) * longest > _WASTE * total:
            found.append(range(begin, index))
            begin, longest, total = index, size, size
    return [*found, range(begin, len(rows))] if rows else []


def abreast(tokens: Sequence[int], caches: Sequence[RowCache]) -> list["Abreast"]:
    """Those of `caches` that share calls. `tokens` are the places of their new tokens in the pass."""
    slabs: dict[int, list[tuple[SlabPlace, RowCache, int]]] = {}
    for token, cache in zip(tokens, caches, strict=True):
        if (place := cache.place) is not None:
            slabs.setdefault(id(place.slab), []).append((place, cache, token))
    found = []
    for members in slabs.values():
        members.sort(key=lambda member: member[0].slot)
        for run in runs([(place.slot, cache.length + 1) for place, cache, _ in members]):
            if len(run) > 1:
                found.append(Abreast(members[run.start : run.stop]))
    return found


class Abreast:
    """Rows that share a call: R rows in S slots, the first row's to the last's; the longest has N tokens."""

    def __init__(self, members: Sequence[tuple[SlabPlace, RowCache, int]]) -> None:
        """Place, cache and the new token's place in the pass, of rows of one slab in order of their slots."""
        slab, first = members[0][0].tensor, members[0][0].slot
        _, layers, two, groups, room, dim = slab.shape
        self._first_layer = members[0][1].shape.first
        self.tokens = {place.slot - first: token for place, _, token in members}
        """The new token of each slot that has one; slots count from the first row's."""
        ends = {place.slot - first: cache.length for place, cache, _ in members}
        slots, longest, device = max(ends) + 1, max(ends.values()) + 1, slab.device
        self.device = device
        for _, cache, _ in members:
            cache.extended(1)
        self._rows = torch.tensor(list(self.tokens.values()), device=device)
        # A slot between, which nobody looks at, attends with somebody's query to all that is there.
        spare = members[0][2]
        self._queries = torch.tensor([self.tokens.get(slot, spare) for slot in range(slots)], device=device)
        self._ends_S1 = torch.tensor([[ends.get(slot, longest - 1)] for slot in range(slots)], device=device)
        self._masks: dict[int | None, Tensor | None] = {}
        starts = [place.slot * layers * two * groups * room + cache.length for place, cache, _ in members]
        piece = torch.arange(layers * two * groups, device=device).view(layers, -1, 1) * room
        self._at = (piece + torch.tensor(starts, device=device)).flatten(1).unbind()
        """For each block, where in the slab's vectors `[-1, D]` keys of all groups, then values, go."""
        self._vectors = slab.view(-1, dim)
        self._cached = slab[first : first + slots, :, :, :, :longest].unbind(1)

    @property
    def slots(self) -> int:
        """How many outputs the call has."""
        return len(self._queries)

    def queries(self, query_1HTD: Tensor, groups: int) -> Tensor:
        """Of each slot `[S, G, H/G, D]`: the query heads of a group stand as its queries."""
        picked: Tensor = query_1HTD[0].index_select(1, self._queries)
        heads, slots, dim = picked.shape
        return picked.view(groups, heads // groups, slots, dim).permute(2, 0, 1, 3)

    def append(self, layer: int, key_1GTD: Tensor, value_1GTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write one block's new keys and values of the pass; return all of each slot, `[S, G, N, D]`."""
        layer -= self._first_layer
        new = [tensor[0].index_select(1, self._rows) for tensor in (key_1GTD, value_1GTD)]
        self._vectors.index_copy_(0, self._at[layer], torch.cat(new).flatten(0, 1))
        key, value = self._cached[layer].unbind(1)
        return key, value

    def mask(self, window: int | None) -> Tensor | None:
        """Bool `[S, 1, 1, N]`, True where a row's query may look; None if each may look everywhere."""
        if window not in self._masks:
            to = torch.arange(self._cached[0].shape[3], device=self._ends_S1.device)
            seen = to <= self._ends_S1
            if window is not None:
                seen &= to > self._ends_S1 - window
            self._masks[window] = None if bool(seen.all()) else seen[:, None, None]
        return self._masks[window]
