"""Micro-batches: packed token ids and where the loss looks. They never leave the silo."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from codec.errors import DataError, UsageError


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized sequence; `answer[t]` says whether token t is to be learned."""

    ids: tuple[int, ...]
    answer: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences one after another, without padding.

    `ids` int64 `[T]`; `keep` int64 `[K]`, the packed positions whose next token is learned;
    `targets` int64 `[K]`, those next tokens. `mask`, bool `[T, T]`, says which tokens of a sequence
    see which, where that is not causal (a prefix read both ways, say).
    """

    ids: Tensor
    lengths: tuple[int, ...]
    keep: Tensor
    targets: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        check_mask(self.mask, len(self.ids))


def check_mask(mask: Tensor | None, tokens: int) -> None:
    """Raises `UsageError` for what is no mask of `tokens` tokens that each see at least themselves."""
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != (tokens, tokens):
        raise UsageError(f"a mask of {tokens} tokens is bool and square, not {mask.dtype} {list(mask.shape)}")
    if not bool(mask.diagonal().all()):
        raise UsageError(f"token {int((~mask.diagonal()).nonzero()[0])} does not see itself in the mask")


def pack_examples(examples: Sequence[Example]) -> MicroBatch:
    """Pack examples. Raises `DataError` if nothing in them is to be learned."""
    ids: list[int] = []
    keep: list[int] = []
    for example in examples:
        offset = len(ids)
        ids.extend(example.ids)
        keep.extend(offset + t - 1 for t in range(1, len(example.ids)) if example.answer[t])
    if not keep:
        raise DataError("a micro-batch without a single token to learn")
    packed = torch.tensor(ids, dtype=torch.int64)
    at = torch.tensor(keep, dtype=torch.int64)
    return MicroBatch(packed, tuple(len(e.ids) for e in examples), at, packed[at + 1])


def batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[MicroBatch]:
    """Micro-batches of `size` examples for ever, shuffled anew each time the data is used up.

    Raises `DataError` if there is no example.
    """
    if not examples:
        raise DataError("there is no example to learn from")
    shuffle = random.Random(seed)
    waiting: list[Example] = []
    while True:
        while len(waiting) < size:
            again = list(examples)
            shuffle.shuffle(again)
            waiting.extend(again)
        yield pack_examples(waiting[:size])
        del waiting[:size]


class Steps:
    """The micro-batches of every step by its number: the same ones whenever they are asked for."""

    _KEPT = 3

    def __init__(self, examples: Sequence[Example], batch: int, accumulate: int, seed: int) -> None:
        """`accumulate` micro-batches of `batch` examples in a step, in the order of `batches`."""
        self._examples, self._batch, self._accumulate, self._seed = examples, batch, accumulate, seed
        self._begin()

    def _begin(self) -> None:
        self._source = batches(self._examples, self._batch, self._seed)
        self._made: dict[int, tuple[MicroBatch, ...]] = {}
        self._next = 0

    def __getitem__(self, step: int) -> tuple[MicroBatch, ...]:
        """Fast for what is near the last one asked for. Raises `DataError` if there is no example."""
        if step < self._next and step not in self._made:
            self._begin()
        while self._next <= step:
            self._made[self._next] = tuple(islice(self._source, self._accumulate))
            self._made.pop(self._next - self._KEPT, None)
            self._next += 1
        return self._made[step]
