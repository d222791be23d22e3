"""Spans of decoder blocks, and the partition that cuts a model into head, trunk and tail."""

from dataclasses import dataclass

from codec.errors import UsageError


@dataclass(frozen=True, slots=True)
class Span:
    """The contiguous range of decoder blocks `[start, stop)`."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise UsageError(f"{self.start}:{self.stop} is not a range of blocks")

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    def contains(self, other: "Span") -> bool:
        """Whether every block of `other` lies in this span."""
        return self.start <= other.start and other.stop <= self.stop

    @classmethod
    def parse(cls, text: str) -> "Span":
        """Read `2:28`. Raises `UsageError` for anything else."""
        start, colon, stop = text.partition(":")
        if not (colon and start.isdecimal() and stop.isdecimal()):
            raise UsageError(f"{text!r} is not a range of blocks", hint="write it as START:STOP, 2:28")
        return cls(int(start), int(stop))


@dataclass(frozen=True, slots=True)
class Partition:
    """`head` blocks stay before the trunk on the silo, `tail` blocks after it (the paper's p, q)."""

    head: int
    tail: int

    def spans(self, blocks: int) -> tuple[Span, Span, Span]:
        """Head, trunk and tail of a model of `blocks` blocks. Raises `UsageError` if no trunk is left."""
        if self.head < 0 or self.tail < 0:
            raise UsageError(f"a partition cannot be negative, ({self.head}, {self.tail}) is")
        if self.head + self.tail >= blocks:
            raise UsageError(
                f"a head of {self.head} and a tail of {self.tail} leave no trunk of {blocks} blocks",
                hint=f"choose --head and --tail that sum to at most {blocks - 1}",
            )
        cut = blocks - self.tail
        return Span(0, self.head), Span(self.head, cut), Span(cut, blocks)
