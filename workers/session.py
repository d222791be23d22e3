"""A session on its worker: one generation's KV caches over the trunk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codec import partition
from codec.errors import LimitError, ProtocolError
from codec.messages import Extend, OpenSession
from workers.kv import RowCache
from workers.lora import add_adapter, drop_adapter, load_adapter, use_adapter
from workers.span import Span


class TrunkSession:
    """KV caches of a session's rows, and the adapter its silo brought, if any."""

    def __init__(self, span: Span, key: str, opening: OpenSession, adapter: Mapping[str, Tensor]) -> None:
        """Reserve the caches. Raises `MismatchError` if the adapter does not fit the trunk."""
        self._span = span
        self._key = key if opening.adapter else None
        self._blocks = partition.Span(opening.start, opening.stop)
        shape = span.kv_shape(self._blocks)
        self._rows = [RowCache(shape, opening.capacity) for _ in range(opening.rows)]
        self.bytes = session_bytes(span, opening)
        if opening.adapter is not None:
            add_adapter(span, key, opening.adapter, seed=0, blocks=self._blocks)
            try:
                load_adapter(span, key, adapter)
            except Exception:
                drop_adapter(span, key)
                raise

    @property
    def place(self) -> tuple[str | None, partition.Span]:
        """What sessions must have in common to run together: the adapter and the blocks."""
        return self._key, self._blocks

    def prepare(self, request: Extend) -> list[RowCache]:
        """Roll the request's rows back to where it starts; their caches.

        Raises `ProtocolError` and `LimitError`; no row has changed then.
        """
        counts = {len(request.rows), len(request.starts), len(request.lengths)}
        if len(counts) != 1 or len(set(request.rows)) != len(request.rows):
            raise ProtocolError("rows, starts and lengths must be one each for distinct rows")
        if max(request.rows) >= len(self._rows):
            raise LimitError(f"the session has {len(self._rows)} rows", side="silo")
        caches = [self._rows[row] for row in request.rows]
        before = [cache.length for cache in caches]
        try:
            for cache, start, length in zip(caches, request.starts, request.lengths, strict=True):
                cache.rewind(start)
                cache.check_room(length)
        except LimitError:
            # No row is rolled back for a request that is refused.
            for cache, length in zip(caches, before, strict=True):
                cache.length = length
            raise
        return caches

    def close(self) -> None:
        """Free the adapter; the caches go with the session."""
        if self._key is not None:
            drop_adapter(self._span, self._key)


@dataclass(frozen=True, slots=True)
class Extension:
    """New tokens for rows of one session: hidden states `packed` `[T, hidden]` and their caches."""

    session: TrunkSession
    lengths: tuple[int, ...]
    caches: list[RowCache]
    packed: Tensor
    mask: Tensor | None = None


@torch.no_grad()
def extend_together(span: Span, extensions: Sequence[Extension]) -> list[Tensor]:
    """Run the new tokens of several sessions of one `place` in one pass; each one's `[T, hidden]`.

    A masked one runs alone.
    """
    key, blocks = extensions[0].session.place
    use_adapter(span, key)
    packed = [extension.packed.to(span.device, span.dtype) for extension in extensions]
    output = span.run(
        packed[0] if len(packed) == 1 else torch.cat(packed),
        [length for extension in extensions for length in extension.lengths],
        caches=[cache for extension in extensions for cache in extension.caches],
        blocks=blocks,
        mask=extensions[0].mask,
    )
    return list(output.split([len(part) for part in packed]))


def session_bytes(span: Span, opening: OpenSession) -> int:
    """Bytes of KV cache a session reserves."""
    blocks = partition.Span(opening.start, opening.stop)
    return span.kv_shape(blocks).bytes_for(opening.rows * opening.capacity)
