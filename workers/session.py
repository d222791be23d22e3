"""A session on its worker: one generation's KV caches over the trunk."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from codec import partition
from codec.errors import LimitError, ProtocolError
from codec.messages import Extend, OpenSession
from workers.kv import PAGE, KVMemory, RowCache
from workers.lora import add_adapter, drop_adapter
from workers.parts import Part
from workers.span import Span


class TrunkSession:
    """KV caches of a session's rows, and the adapter its silo brought, if any."""

    def __init__(
        self,
        span: Span,
        key: str,
        opening: OpenSession,
        adapter: Mapping[str, Tensor],
        memory: KVMemory,
        now: float,
    ) -> None:
        """Take caches from `memory`: all that the session may need, or a first page of each row if its
        silo can send everything again.

        Raises `LimitError` if they cannot be had, and `MismatchError` if the adapter does not fit.
        """
        self._span, self.replays, self.used = span, opening.replays, now
        self.running = False
        """Whether an extension is under way."""
        self.key = key if opening.adapter else None
        self.blocks = partition.Span(opening.start, opening.stop)
        shape = span.kv_shape(self.blocks)
        first = min(PAGE, opening.capacity) if self.replays else opening.capacity
        memory.ensure(shape.bytes_for(opening.rows * first))
        self._rows = [RowCache(shape, opening.capacity, memory) for _ in range(opening.rows)]
        try:
            for row in self._rows:
                row.check_room(first)
            if opening.adapter is not None:
                add_adapter(span, key, opening.adapter, 0, self.blocks, adapter)
        except Exception:
            self.close()
            raise

    @property
    def bytes(self) -> int:
        """What its caches take."""
        return sum(row.bytes for row in self._rows)

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
        """Free caches and adapter."""
        for row in self._rows:
            row.free()
        if self.key is not None:
            drop_adapter(self._span, self.key)


class Extension:
    """New tokens for rows of one session, run in one pass or, cut into parts, in several."""

    def __init__(
        self, session: TrunkSession, request: Extend, packed: Tensor, mask: Tensor | None = None
    ) -> None:
        """`packed` `[T, hidden]`. Raises what `TrunkSession.prepare` raises."""
        self._session, self._packed, self._mask = session, packed, mask
        session.running = True  # Growing may make others leave, and must not make it leave itself.
        try:
            self._left = list(zip(session.prepare(request), request.lengths, strict=True))
        except Exception:
            session.running = False
            raise
        self._outputs: list[Tensor] = []
        self._done = 0
        self.seconds = 0.0
        """What the passes took in which it was."""

    def part(self, tokens: int) -> Part:
        """The next `tokens` tokens. A masked extension cannot be cut."""
        taken: list[tuple[RowCache, int]] = []
        begin, self._done = self._done, self._done + tokens
        while tokens:
            cache, length = self._left.pop(0)
            taken.append((cache, min(length, tokens)))
            if length > tokens:
                self._left.insert(0, (cache, length - tokens))
            tokens -= taken[-1][1]
        return Part(
            self._packed[begin : self._done],
            tuple(length for _, length in taken),
            blocks=self._session.blocks,
            adapter=self._session.key,
            caches=[cache for cache, _ in taken],
            mask=self._mask,
        )

    def came_out(self, output: Tensor) -> Tensor | None:
        """A part's output; that of all tokens, `[T, hidden]`, once it is complete."""
        self._outputs.append(output)
        if self._left:
            return None
        return output if len(self._outputs) == 1 else torch.cat(self._outputs)

    def ended(self) -> None:
        """It is complete, or failed."""
        self._session.running, self._session.used = False, time.monotonic()
