"""A session on the silo: KV caches on head and tail, and one on the trunk kept by a worker."""

import secrets
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from codec.errors import LimitError
from codec.limits import MAX_ROWS, MAX_TOKENS
from codec.messages import Extend, OpenSession
from codec.plan import LoraPlan
from silo_agent.ends import Ends
from silo_agent.microbatch import check_mask
from silo_agent.noise import Noise
from silo_agent.packed import pack
from silo_agent.remote import Remote, expect
from silo_agent.remote_session import RemoteSession
from silo_agent.wires import Wires
from workers.kv import KVMemory, RowCache


class Session:
    """`rows` sequences that grow token by token, with caches on all three parts.

    Per new token one hidden state crosses each way, however long the context is. A context manager:
    leaving it closes the worker's caches too.
    """

    def __init__(
        self,
        ends: Ends,
        remote: Remote,
        *,
        rows: int,
        capacity: int,
        noise: Noise,
        wires: Wires | None = None,
        adapter: tuple[LoraPlan, Mapping[str, Tensor]] | None = None,
        wait: float = 30.0,
    ) -> None:
        """Open it with room for `capacity` tokens a row; `adapter` is the trunk's, by global name.

        Without `wires` every bit crosses. Waits up to `wait` seconds for a worker, and again when one is
        lost. Raises `LimitError` for more rows or tokens than a session may have, and what `Remote.open`
        raises.
        """
        if not (1 <= rows <= MAX_ROWS and 1 <= capacity <= MAX_TOKENS):
            raise LimitError(
                f"a session has 1 to {MAX_ROWS} rows of 1 to {MAX_TOKENS} tokens, not {rows} of {capacity}",
                side="silo",
            )
        self._ends, self._noise = ends, noise
        self._wires = wires or Wires("exact")
        self.rows, self.capacity = rows, capacity
        plan, tensors = adapter if adapter else (None, {})
        request = OpenSession(
            session=secrets.token_hex(8),
            model=ends.card,
            start=ends.trunk.start,
            stop=ends.trunk.stop,
            rows=rows,
            capacity=capacity,
            encodings=self._wires.needed(),
            replays=True,
            adapter=plan,
            names=tuple(tensors),
        )
        self._name = request.session
        self._trunk = RemoteSession(remote, request, list(tensors.values()), wait=wait)
        memory = KVMemory()
        self._head = [RowCache(ends.head.kv_shape(), capacity, memory) for _ in range(rows)]
        self._tail = [RowCache(ends.tail.kv_shape(), capacity, memory) for _ in range(rows)]

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self._trunk.close()

    @torch.no_grad()
    def extend(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        *,
        starts: Sequence[int] | None = None,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Add `tokens[i]` to row `rows[i]`, at `starts[i]` if given (earlier tokens from there are
        forgotten), and return logits: of each row's last token `[rows, vocabulary]`, or of the
        packed positions `keep`. `mask`, bool `[T, T]`, says which of these tokens see which, where that
        is not causal. After an error it may be called again. A lost worker is no error as long as the
        session finds another within `wait` seconds.

        Raises `UsageError` for a bad mask, `LimitError` if a row is full, and what
        `RemoteSession.extend` raises.
        """
        lengths = tuple(len(part) for part in tokens)
        check_mask(mask, sum(lengths))
        head, tail = [self._head[row] for row in rows], [self._tail[row] for row in rows]
        # The tail comes last: what it holds went through all three parts.
        begins = tuple(starts) if starts is not None else tuple(cache.length for cache in tail)
        for caches in (head, tail):
            for cache, start, length in zip(caches, begins, lengths, strict=True):
                cache.rewind(start)
                cache.check_room(length)
        key = self._ends.adapter_key
        ids = torch.tensor([token for part in tokens for token in part], dtype=torch.int64)
        sent = self._noise.add(self._ends.head.run(ids, lengths, adapter=key, caches=head, mask=mask))
        request = Extend(
            session=self._name,
            rows=tuple(rows),
            starts=begins,
            lengths=lengths,
            wire=self._wires.pick("trunk → tail", *sent.shape),
        )
        wire = self._wires.pick("head → trunk", *sent.shape)
        packed = pack(request, [sent], wire=wire, step=self._noise.step, mask=mask)
        (output,) = expect(self._trunk.extend(packed), 1)
        last = torch.tensor(lengths).cumsum(0) - 1 if keep is None else keep
        return self._ends.tail.run(output, lengths, adapter=key, caches=tail, keep=last, mask=mask)
