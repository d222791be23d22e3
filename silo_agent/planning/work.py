"""What a silo has to do at once, from the lengths of its data. It decides times and memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codec.errors import DataError
from silo_agent.window import FIRST

if TYPE_CHECKING:
    from silo_agent.microbatch import Example


@dataclass(frozen=True, slots=True)
class Work:
    """A typical pass, which decides times, and the largest, which decides memory.

    `lengths` are the new tokens of a typical pass's sequences, each behind `behind` cached ones;
    `predicted` of all those tokens get logits. The largest pass has `most` tokens and
    `most_predicted` logits. `flights` micro-batches are between their head's forward and backward,
    and `cached` tokens, of all rows, are in the KV caches in the end.
    """

    training: bool
    lengths: tuple[int, ...]
    predicted: int
    most: int
    most_predicted: int
    flights: int = 0
    behind: int = 0
    cached: int = 0

    @property
    def tokens(self) -> int:
        """Those of a typical pass."""
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class Lengths:
    """A data set's examples in tokens: how many, the lengths at half, at 95 % and at the end, the share of
    tokens that is learned, and steps in which as many examples are seen as there are."""

    examples: int
    median: int
    p95: int
    most: int
    learned: float
    steps: int


def lengths_of(examples: "Sequence[Example]", a_step: int) -> Lengths:
    """The data's figures, for `a_step` examples a step. Raises `DataError` if there is none."""
    sizes = _sizes(examples)
    return Lengths(
        examples=len(sizes),
        median=_at(sizes, 0.5),
        p95=_at(sizes, 0.95),
        most=sizes[-1],
        learned=sum(map(_learned, examples)) / sum(sizes),
        steps=-(-len(sizes) // a_step),
    )


def training_work(
    examples: "Sequence[Example]", *, batch: int, accumulate: int, window: int | None = None
) -> Work:
    """Micro-batches of `batch` examples, `accumulate` of them a step.

    A `window` that tunes itself (None) counts as what it starts with. Raises `DataError` without examples.
    """
    sizes, learned = _sizes(examples), sorted(map(_learned, examples))
    lengths = spread(sizes, batch)
    share = sum(learned) / sum(sizes)
    return Work(
        training=True,
        lengths=lengths,
        predicted=max(1, round(share * sum(lengths))),
        most=_largest(sizes, batch),
        most_predicted=_largest(learned, batch),
        flights=min(accumulate, window or FIRST),
    )


def generating_work(rows: int, capacity: int, *, scored: int = 0) -> Work:
    """A session of `rows` sequences of up to `capacity` tokens, whose first pass may bring all of them, with
    logits for `scored`. A typical pass is a new token a row, half-way."""
    return Work(
        training=False,
        lengths=(1,) * rows,
        predicted=rows,
        most=rows * capacity,
        most_predicted=max(rows, scored),
        behind=capacity // 2,
        cached=rows * capacity,
    )


def spread(sizes: Sequence[int], number: int) -> tuple[int, ...]:
    """`number` of the sorted `sizes` that stand for all: the middles of as many equal parts."""
    return tuple(_at(sizes, (part + 0.5) / number) for part in range(number))


def _sizes(examples: "Sequence[Example]") -> list[int]:
    if not examples:
        raise DataError("there is no example to plan for")
    return sorted(len(example.ids) for example in examples)


def _learned(example: "Example") -> int:
    return sum(example.answer[1:])


def _at(sizes: Sequence[int], share: float) -> int:
    return sizes[min(len(sizes) - 1, int(share * len(sizes)))]


def _largest(sizes: Sequence[int], batch: int) -> int:
    """The most that a micro-batch of `batch` different examples has; fewer examples are repeated."""
    whole, rest = divmod(batch, len(sizes))
    return whole * sum(sizes) + sum(sizes[len(sizes) - rest :])
