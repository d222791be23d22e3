"""Which adapter computes which tokens of the pass that is under way."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """The packed tokens `[start, stop)` and the key of their adapter; None is the base model alone."""

    adapter: str | None
    start: int
    stop: int


def shares_of(owners: Iterable[tuple[str | None, int]]) -> tuple[Share, ...]:
    """Adapter and number of tokens of each part, in packed order, as shares that tile the pass.

    Neighbours with one adapter are one share. No adapter at all gives no shares.
    """
    shares: list[Share] = []
    at = 0
    for adapter, tokens in owners:
        if shares and shares[-1].adapter == adapter:
            shares[-1] = Share(adapter, shares[-1].start, at + tokens)
        elif tokens:
            shares.append(Share(adapter, at, at + tokens))
        at += tokens
    return tuple(shares) if any(share.adapter is not None for share in shares) else ()


class Routing:
    """A span's one place where its adapted layers read the shares of the pass under way."""

    def __init__(self) -> None:
        self.shares: tuple[Share, ...] = ()

    @contextmanager
    def to(self, shares: tuple[Share, ...]) -> Iterator[None]:
        """These shares for what runs within; none after it, whatever happens."""
        self.shares = shares
        try:
            yield
        finally:
            self.shares = ()
