"""Micro-batches between forward and backward, and the memory that their activations may take.

Micro-batches that went forward together share one graph of activations, and go backward together.
One whose graph is gone, because memory was short or because the others of its group were too late,
is computed forward again from its input: LoRA has no dropout here, so the result is the same.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from codec.errors import LimitError, MismatchError, ProtocolError, UnknownNameError
from workers.graph import metered
from workers.parts import Part
from workers.run import TrunkRun
from workers.span import Span

Key = tuple[bytes, str, int]
"""Silo, run, and the micro-batch's number."""

_ESTIMATE = 17
"""Numbers that a block's graph keeps for each token and channel, before anything was measured: 34 bytes at
two bytes a number, attention scores left out (Korthikanti et al., arXiv 2205.05198, section 4)."""
_MAX_KEPT = 256
"""Micro-batches of one silo between forward and backward."""
_MAX_STEP = 1 << 16
"""Micro-batches of one silo in one step: their numbers are remembered."""


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Packed hidden states `[T, hidden]` at the trunk's input, and the run that they are for."""

    key: Key
    run: TrunkRun
    entry: Tensor
    lengths: tuple[int, ...]
    mask: Tensor | None = None

    def part(self) -> Part:
        """What it brings to a pass."""
        return Part(self.entry, self.lengths, blocks=self.run.blocks, adapter=self.run.key, mask=self.mask)


@dataclass(frozen=True, slots=True, eq=False)
class Gradient:
    """The gradient `[T, hidden]` at a micro-batch's output; `wanted` if the one at its input is."""

    key: Key
    values: Tensor
    wanted: bool = True


@dataclass(slots=True, eq=False)
class _Kept:
    batch: MicroBatch
    group: int
    bytes: int
    output: Tensor | None
    """With its graph; None if it is to be computed again."""


@dataclass(slots=True)
class _Numbers:
    """Of one silo's micro-batches in a run: which are `over` in this step, and which were before it."""

    over: set[int] = field(default_factory=set)
    last: int = -1
    floor: int = -1

    def check(self, number: int) -> None:
        """A micro-batch begins. Raises `ProtocolError` if it had its turn, `LimitError` for too many."""
        if number <= self.floor or number in self.over:
            raise ProtocolError(f"micro-batch {number} had its turn: each has a number of its own")
        if len(self.over) >= _MAX_STEP:
            raise LimitError(f"{_MAX_STEP} micro-batches in one step", side="silo")
        self.last = max(self.last, number)

    def next_step(self) -> None:
        """What begins from now on has numbers above all before."""
        self.floor = self.last
        self.over.clear()


class Activations:
    """Everything that waits for a backward, within `budget` bytes; a `share` of them is each silo's own.

    Inputs must be kept, and those of one silo are bounded by its share. Graphs may take what is free: who
    holds more than its share gives them back when others need room.
    """

    def __init__(self, span: Span, budget: int, share: int) -> None:
        self._span, self._budget, self._share = span, budget, share
        self._kept: dict[Key, _Kept] = {}
        self._numbers: dict[tuple[bytes, str], _Numbers] = {}
        self._spent: list[MicroBatch] = []
        self._groups = count()
        self._per_block: dict[str, float] = {}
        self.members: dict[int, int] = {}
        """How many micro-batches of each group wait."""
        self.held = 0
        """Bytes that they hold: inputs and graphs."""

    def forward(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Run micro-batches in one pass and keep them for `backward`; each one's `[T, hidden]`."""
        for batch in batches:
            self.drop(batch.key)  # Sent again: from the start.
        entries = _inputs(batches)
        whole = entries + sum(map(self._graph_bytes, batches))
        held = self._held_by_silo()
        if all(held[batch.key[0]] <= self._share for batch in batches):
            self._take_back(whole, above=self._share)
        keeps = self.held + whole <= self._budget
        if not keeps:
            self._take_back(entries, above=0)
        with torch.set_grad_enabled(keeps):
            outputs = self._run(batches, measure=keeps)
        group = next(self._groups)
        self.members[group] = len(batches)
        for batch, output in zip(batches, outputs, strict=True):
            size = batch.entry.nbytes + (self._graph_bytes(batch) if keeps else 0)
            self._kept[batch.key] = _Kept(batch, group, size, output if keeps else None)
            self.held += size
        return [output.detach() for output in outputs]

    def check_room(self, batch: MicroBatch) -> None:
        """Raises `LimitError` if not even a micro-batch's input could be kept, and `ProtocolError` for one
        whose gradient counts already: a message that came twice must not add it twice."""
        key, entry = batch.key, batch.entry
        self._numbers_of(batch).check(key[2])
        # Sent again, it makes room for itself.
        others = [kept.batch for other, kept in self._kept.items() if other != key]
        mine = [other for other in others if other.key[0] == key[0]]
        if (held := _inputs(mine)) + entry.nbytes > self._share:
            raise LimitError(
                f"micro-batches of this silo that wait for their backward hold {held >> 20} MiB, "
                f"{self._share >> 20} may be (--activation-per-silo)",
                hint="Lower --window or --batch, or start the worker with a larger share.",
            )
        if (held := _inputs(others)) + entry.nbytes > self._budget:
            raise LimitError(
                f"micro-batches that wait for their backward hold {held >> 20} MiB",
                hint="Lower --window or --batch, or start the worker with more --activation-memory.",
            )
        if key not in self._kept and len(mine) >= _MAX_KEPT:
            raise LimitError(f"{_MAX_KEPT} micro-batches wait for their backward", side="silo")

    def group(self, key: Key) -> int | None:
        """Which micro-batches it went forward with; None if it does not wait."""
        kept = self._kept.get(key)
        return None if kept is None else kept.group

    def check(self, gradient: Gradient) -> None:
        """Raises `UnknownNameError` or `MismatchError` unless a micro-batch waits for this."""
        kept = self._kept.get(gradient.key)
        if kept is None:
            raise UnknownNameError(f"no micro-batch {gradient.key[2]} of yours waits for its backward")
        came, sent = tuple(gradient.values.shape), tuple(kept.batch.entry.shape)
        if came != sent:
            raise MismatchError(f"a gradient {came} for an output {sent}")

    def backward(self, gradients: Sequence[Gradient]) -> list[Tensor | None]:
        """Accumulate adapters' gradients of one group, or some of it.

        Returns those at the inputs, `[T, hidden]`, where they are wanted.
        """
        kept = [self._kept[gradient.key] for gradient in gradients]
        (group, *others) = {one.group for one in kept}
        whole = not others and len(kept) == self.members[group]
        batches = [one.batch for one in kept]
        for batch in batches:
            self.drop(batch.key, alone=not whole)
            self._numbers_of(batch).over.add(batch.key[2])
        outputs = [one.output for one in kept if one.output is not None]
        if not whole or len(outputs) != len(kept):
            outputs = self._run(batches, measure=False)
        inputs = [batch.entry for g, batch in zip(gradients, batches, strict=True) if g.wanted]
        parameters = {p: None for batch in batches for p in batch.run.parameters.values()}
        if inputs or parameters:
            roots = [g.values.to(output) for g, output in zip(gradients, outputs, strict=True)]
            torch.autograd.backward(outputs, roots, inputs=[*inputs, *parameters])
        # A GPU may not be done with them before the pass has ended.
        self._spent = batches
        return [batch.entry.grad for batch in batches]

    def drop(self, key: Key, *, alone: bool = True) -> None:
        """Forget a micro-batch. Gone `alone`, it leaves the rest of its group to be computed again.

        Their graph is one: it would have to be walked as a whole for each of them.
        """
        kept = self._kept.pop(key, None)
        if kept is None:
            return
        self.held -= kept.bytes
        self.members[kept.group] -= 1
        if not self.members[kept.group]:
            del self.members[kept.group]
        elif alone:
            self._drop_graph(kept.group)

    def forget(self, run: TrunkRun) -> None:
        """A run is over."""
        self.drop_all(run)
        self._per_block.pop(run.key, None)
        for member in [member for member in self._numbers if member[1] == run.key]:
            del self._numbers[member]

    def drop_all(self, run: TrunkRun, silo: bytes | None = None) -> None:
        """Forget a run's micro-batches, or one silo's of it: its step is over, or begins anew."""
        for member, numbers in self._numbers.items():
            if member[1] == run.key and silo in (None, member[0]):
                numbers.next_step()
        kept = self._kept.items()
        for key in [key for key, one in kept if one.batch.run is run and silo in (None, key[0])]:
            self.drop(key)

    def _numbers_of(self, batch: MicroBatch) -> _Numbers:
        return self._numbers.setdefault((batch.key[0], batch.run.key), _Numbers())

    def _drop_graph(self, group: int) -> None:
        for kept in self._kept.values():
            if kept.group == group and kept.output is not None:
                self.held -= kept.bytes - kept.batch.entry.nbytes
                kept.bytes, kept.output = kept.batch.entry.nbytes, None

    def _held_by_silo(self) -> Counter[bytes]:
        held = Counter[bytes]()
        for key, kept in self._kept.items():
            held[key[0]] += kept.bytes
        return held

    def _take_back(self, size: int, above: int) -> None:
        """Drop graphs of those who hold most, and more than `above`, until `size` bytes are free."""
        while self.held + size > self._budget:
            groups = {key[0]: kept.group for key, kept in self._kept.items() if kept.output is not None}
            held = self._held_by_silo()
            most = max(groups, key=held.__getitem__, default=None)
            if most is None or held[most] <= above:
                return
            self._drop_graph(groups[most])

    def _graph_bytes(self, batch: MicroBatch) -> int:
        """What a micro-batch's graph takes: measured on its run, or else estimated."""
        estimate = _ESTIMATE * batch.entry.shape[1] * batch.entry.dtype.itemsize
        per_block = self._per_block.get(batch.run.key, max(self._per_block.values(), default=estimate))
        return int(per_block * len(batch.run.blocks) * len(batch.entry))

    def _run(self, batches: Sequence[MicroBatch], *, measure: bool) -> list[Tensor]:
        for batch in batches:
            batch.entry.requires_grad_()
        parts = [batch.part() for batch in batches]
        new = {batch.run.key for batch in batches} - self._per_block.keys()
        if not measure or not new:
            return self._span.run_parts(parts)
        with metered(self._span) as meter:
            outputs = self._span.run_parts(parts)
        each = meter.bytes / sum(len(batch.entry) * len(batch.run.blocks) for batch in batches)
        self._per_block.update(dict.fromkeys(new, each))
        return outputs


def _inputs(batches: Iterable[MicroBatch]) -> int:
    """Bytes of what came in with them."""
    return sum(batch.entry.nbytes for batch in batches)
