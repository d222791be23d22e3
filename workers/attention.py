"""Attention over packed sequences: no padding, no mask tensor, KV in place.

A pass holds the new tokens of many sequences one after another, `[1, heads, tokens, dim]`. Each
sequence attends to itself alone: first to its own cached keys, if the pass has KV caches, then
causally to its new tokens. Registered with transformers as an attention implementation, so every
family's own layers call it; the `Packing` reaches it as an extra keyword of the forward call.

Shape letters: H query heads, G key/value heads, T packed tokens, N keys of one sequence, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from workers.abreast import Abreast, abreast
from workers.kv import RowCache

IMPLEMENTATION = "trunkline_packed"


@dataclass(frozen=True, eq=False)
class Packing:
    """How one pass is packed: new tokens per sequence, and each sequence's KV cache if it has one."""

    lengths: tuple[int, ...]
    caches: Sequence[RowCache] | None = None
    masks: Sequence[Tensor | None] | None = None
    """For each sequence bool `[length, length]`, which new tokens see which; causal where None."""

    @cached_property
    def together(self) -> Sequence[Abreast]:
        """Sequences with one new token each that attend in one call. The same in every block."""
        if self.caches is None or len(self.lengths) == 1:
            return ()
        starts = list(accumulate(self.lengths, initial=0))
        single = [i for i, length in enumerate(self.lengths) if length == 1 and not self._masked(i)]
        return abreast([starts[i] for i in single], [self.caches[i] for i in single])

    @cached_property
    def alone(self) -> Sequence[tuple[int, slice]]:
        """The other sequences, and where their tokens are."""
        shared = {token for group in self.together for token in group.tokens.values()}
        edges = enumerate(pairwise(accumulate(self.lengths, initial=0)))
        return [(i, slice(start, stop)) for i, (start, stop) in edges if start not in shared or stop == start]

    @cached_property
    def order(self) -> Tensor:
        """Where each token's output is, when those that are together come first."""
        places, offset = [0] * sum(self.lengths), 0
        for group in self.together:
            for slot, token in group.tokens.items():
                places[token] = offset + slot
            offset += group.slots
        for _, here in self.alone:
            places[here] = range(offset, offset + here.stop - here.start)
            offset += here.stop - here.start
        return torch.tensor(places, device=self.together[0].device)

    def _masked(self, index: int) -> bool:
        return self.masks is not None and self.masks[index] is not None


def packed_attention(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    _mask_tensor: Tensor | None,
    *,
    packing: Packing,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention output `[1, T, H, D]`. Called by transformers' attention layers."""
    outputs = []
    layer, groups = cast("int", module.layer_idx), key_1GTD.shape[1]
    for group in packing.together:
        query, mask = group.queries(query_1HTD, groups), group.mask(sliding_window)
        key, value = group.append(layer, key_1GTD, value_1GTD)
        output = _one_each(query, key, value, scaling, dropout, softcap, mask)
        outputs.append(output.reshape(1, group.slots, -1, query.shape[3]))
    for index, here in packing.alone:
        query, key, value = query_1HTD[:, :, here], key_1GTD[:, :, here], value_1GTD[:, :, here]
        if packing.caches is not None:
            key, value = packing.caches[index].append(layer, key, value)
        seen = None if packing.masks is None else packing.masks[index]
        output = _attend(query, key, value, scaling, dropout, sliding_window, softcap, seen)
        outputs.append(output.transpose(1, 2))  # Joined as the layer wants it, or it would copy it again.
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return joined.index_select(1, packing.order) if packing.together else joined, None


def _attend(
    query_1HMD: Tensor,
    key_1GND: Tensor,
    value_1GND: Tensor,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    seen_MM: Tensor | None,
) -> Tensor:
    """One sequence: M new tokens, the last of its N, attend to all N keys, causally or as they are told."""
    new, total = query_1HMD.shape[2], key_1GND.shape[2]
    windowed = window is not None and total > window
    if softcap is not None:
        mask = None if new == 1 and not windowed else _mask(new, total, window, query_1HMD.device, seen_MM)
        return _softcapped(query_1HMD, key_1GND, value_1GND, scaling, dropout, softcap, mask)
    if new == 1 and not windowed:
        heads, dim, groups = query_1HMD.shape[1], query_1HMD.shape[3], key_1GND.shape[1]
        query = query_1HMD.reshape(1, groups, heads // groups, dim)
        out = _one_each(query, key_1GND, value_1GND, scaling, dropout)
        return out.reshape(1, heads, 1, dim)
    causal = new == total and not windowed and seen_MM is None
    mask = None if causal else _mask(new, total, window, query_1HMD.device, seen_MM)
    return F.scaled_dot_product_attention(
        query_1HMD,
        key_1GND,
        value_1GND,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query_1HMD.shape[1] != key_1GND.shape[1],
    )


def _one_each(
    query_SGRD: Tensor,
    key_SGND: Tensor,
    value_SGND: Tensor,
    scaling: float,
    dropout: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Sequences with one new token each; the R query heads of a group stand as its queries.

    That reads each cached key once instead of once per query head.
    """
    if softcap is not None:
        return _softcapped(query_SGRD, key_SGND, value_SGND, scaling, dropout, softcap, mask)
    return F.scaled_dot_product_attention(
        query_SGRD, key_SGND, value_SGND, attn_mask=mask, dropout_p=dropout, scale=scaling
    )


def _mask(
    new: int, total: int, window: int | None, device: torch.device, seen_MM: Tensor | None = None
) -> Tensor:
    """Bool `[new, total]`, True where a query may look: causal or as told, and within the window if any."""
    at = torch.arange(total - new, total, device=device)[:, None]
    to = torch.arange(total, device=device)[None, :]
    if seen_MM is None:
        seen = to <= at
    else:
        seen = torch.cat((seen_MM.new_ones(new, total - new), seen_MM), dim=1)
    return seen if window is None else seen & (to > at - window)


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    dropout: float,
    softcap: float,
    mask: Tensor | None,
) -> Tensor:
    """Scores squashed by `softcap * tanh(score / softcap)`, as Gemma 2 wants; no fused kernel does it."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap)) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout) @ value if dropout else weights @ value


AttentionInterface.register(IMPLEMENTATION, packed_attention)
