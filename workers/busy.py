"""How long a worker has computed: what shows whether its trunk had to wait."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True, eq=False)
class UnderWay:
    """The pass that runs now."""

    kind: str
    tokens: int
    since: float


@dataclass(slots=True)
class Busy:
    """Seconds of computation, and how much was done in them, since the worker started."""

    device: torch.device
    _done: float = 0.0
    passes: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    slowest: dict[str, float] = field(default_factory=dict)
    """Of each kind, the most seconds that a token took."""
    under_way: UnderWay | None = None

    @property
    def seconds(self) -> float:
        """Of all passes, the one under way included. May be read from another thread."""
        done, under_way = self._done, self.under_way
        return done if under_way is None else done + time.monotonic() - under_way.since

    @contextmanager
    def counting(self, kind: str, tokens: int) -> Iterator[None]:
        """One pass of a kind. On a GPU it waits for the pass to end.

        What comes next is chosen only then: chosen while a pass still runs, it would miss all that
        is answered by that pass and comes back at once, and sessions would fall into halves.
        """
        self.under_way = under_way = UnderWay(kind, tokens, time.monotonic())
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
        finally:
            seconds = time.monotonic() - under_way.since
            self._done, self.under_way = self._done + seconds, None
            self.slowest[kind] = max(self.slowest.get(kind, 0.0), seconds / max(1, tokens))
            self.passes[kind] = self.passes.get(kind, 0) + 1
            self.tokens[kind] = self.tokens.get(kind, 0) + tokens
