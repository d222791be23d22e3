"""Texts as far as they are known, in the caches of a model's parts, and what may come next."""

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.kv import RowCache
from workers.span import Span


class Reading:
    """Several texts that grow token by token through `spans`, the first of which embeds."""

    def __init__(self, spans: Sequence[Span], rows: int, capacity: int) -> None:
        """`capacity` bounds a row's tokens, and in the first span its candidates with them."""
        self._spans = spans
        self._caches = [[RowCache(span.kv_shape(), capacity) for _ in range(rows)] for span in spans]
        self._window = getattr(spans[0].model.config, "sliding_window", None)

    @torch.no_grad()
    def read(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Add tokens to rows; the last span's output behind each row's last new token."""
        lengths = [len(part) for part in tokens]
        value = torch.tensor([token for part in tokens for token in part])
        last = torch.tensor(lengths).cumsum(0) - 1
        for number, (span, caches) in enumerate(zip(self._spans, self._caches, strict=True)):
            predicts = number > 0 and number == len(self._spans) - 1
            keep = last if predicts else None
            value = span.run(value, lengths, caches=[caches[row] for row in rows], keep=keep)
        return value if len(value) == len(rows) else value[last.to(value.device)]

    @torch.no_grad()
    def next_states(self, rows: Sequence[int], candidates: Tensor) -> Tensor:
        """The first span's output for each candidate as a row's next token; nothing is added.

        `candidates` int64 `[rows, n]`; returns `[rows, n, hidden]`. They stand side by side at the same
        position, each seeing what the row holds and itself: a row's cache is read once for all of them.
        """
        caches = [self._caches[0][row] for row in rows]
        states = []
        for part in candidates.split(self._together(max(cache.length for cache in caches)), dim=1):
            count = part.shape[1]
            starts = torch.tensor([cache.length for cache in caches])
            packed = self._spans[0].run(
                part.flatten(),
                [count] * len(rows),
                caches=caches,
                mask=torch.eye(part.numel(), dtype=torch.bool),
                positions=starts.repeat_interleave(count),
            )
            for cache, start in zip(caches, starts.tolist(), strict=True):
                cache.rewind(start)
            states.append(packed.view(len(rows), count, -1))
        return torch.cat(states, dim=1).float()

    def _together(self, held: int) -> int:
        """A sliding window counts a token's place by its order: side by side only as far as all fit in."""
        return 1 << 30 if self._window is None else max(1, self._window - held)
