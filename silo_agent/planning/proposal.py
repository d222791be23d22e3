"""Which blocks a silo keeps and how its tensors cross, decided from figures. No clock, no model, no I/O.

More blocks on the silo cost it time and memory, and were never found to hide more of the text
(docs/privacy.md). So a silo keeps as many as are wanted and no more, and fewer where memory is short.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from broker.speed import Speed
from codec.errors import LimitError
from codec.messages import ENCODINGS, Encodings, Wire
from codec.partition import Partition
from silo_agent.planning.work import Work
from silo_agent.wires import ASSUMED_RATE, Boundary, Cost, Pick, choose

BOUNDARIES: Mapping[bool, tuple[Boundary, ...]] = {
    True: ("head → trunk", "trunk → tail", "tail → trunk (gradient)", "trunk → head (gradient)"),
    False: ("head → trunk", "trunk → tail"),
}
"""What is crossed in training, and else."""

_COMPARED = 4
"""Partitions up to so many blocks on either side are shown beside the one that is proposed."""

_FRAGMENTED = 2
"""What a pass needs is taken so often: passes differ in size, and an allocator keeps what they freed."""

_TRAINED = 4
"""An adapter that is trained is held as often: weights, gradient, and AdamW's two moments."""


@dataclass(frozen=True, slots=True)
class Block:
    """A decoder block on this machine. `forward_s` and `backward_s` are seconds a token, `weights` and
    `adapter` bytes, `graph` the bytes a token that wait for the backward, `cache` those in a KV cache."""

    forward_s: float
    backward_s: float
    weights: int
    adapter: int
    graph: float
    cache: int


@dataclass(frozen=True, slots=True)
class Rest:
    """Embeddings, final norm, lm_head and loss. `embed_s` is seconds a token, `predict_s` seconds and
    `logits` bytes a token that gets logits, forward and backward; `weights` bytes."""

    embed_s: float
    predict_s: float
    weights: int
    logits: int


@dataclass(frozen=True, slots=True)
class Line:
    """The way to the workers. `trunk_s` is what they take for a token's forward; where it is None,
    `silent` says why. `speed` is None until a large message was timed."""

    speed: Speed | None
    trunk_s: float | None = None
    silent: str = ""
    encodings: Encodings = ENCODINGS


@dataclass(frozen=True, slots=True)
class Measured:
    """All figures. `blocks` has one for each of the model, `memory` is the bytes that the silo may take,
    `wires` has each boundary's costs of those that may be picked."""

    blocks: tuple[Block, ...]
    rest: Rest
    hidden: int
    memory: int
    wires: Mapping[Boundary, Mapping[Wire, Cost]] = field(default_factory=dict)
    line: Line | None = None

    @property
    def rate(self) -> float:
        """Bytes per second of the line, or what is assumed."""
        return self.line.speed.rate if self.line and self.line.speed else ASSUMED_RATE


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is asked for: the blocks to keep, if there is memory for them, and the work to do."""

    partition: Partition
    work: Work


@dataclass(frozen=True, slots=True)
class Candidate:
    """A partition, the silo's own seconds a token with it, the bytes it takes, and whether they are there."""

    partition: Partition
    silo_s: float
    memory: int
    fits: bool


@dataclass(frozen=True, slots=True)
class Crossing:
    """One wire for all boundaries: bytes a token, and seconds a token on the line's busier direction."""

    bytes: float
    line_s: float


Binding = Literal["wish", "memory", "model"]
Part = Literal["silo", "line", "trunk"]


@dataclass(frozen=True, slots=True)
class Proposal:
    """What to do. `binding` is what kept the `chosen` partition from having another block; `wanted` is the
    largest up to the wish that the model can have. `wires` is each boundary's pick. `seconds` is what each
    part that was measured takes for a token; in training they work beside one another, and the `slowest`
    decides, in generation one after another."""

    chosen: Candidate
    wanted: Candidate
    binding: Binding
    compared: tuple[Candidate, ...]
    wires: Mapping[Boundary, Pick]
    crossings: Mapping[Wire, Crossing]
    seconds: Mapping[Part, float]

    @property
    def slowest(self) -> Part:
        """What takes longest."""
        return max(self.seconds, key=lambda part: self.seconds[part])


def propose(measured: Measured, wishes: Wishes) -> Proposal:
    """The partition with most blocks, up to the wish, that leaves a trunk and fits the memory.

    An end that is wished for keeps a block at least. Raises `UsageError` for a model with too few blocks
    for that, `LimitError` where not even so much fits.
    """
    work, wish, blocks = wishes.work, wishes.partition, len(measured.blocks)
    legal = _legal(wish, blocks)
    candidates = {partition: candidate(measured, work, partition) for partition in legal}
    fitting = [partition for partition in legal if candidates[partition].fits]
    if not fitting:
        least = min(candidates.values(), key=lambda one: one.memory)
        raise LimitError(
            f"a silo needs {gigabytes(least.memory)} for a partition of {named(least.partition)}, "
            f"{gigabytes(measured.memory)} may be taken",
            side="silo",
            hint="Lower --batch, --accumulate or --max-length, or free memory.",
        )
    partition, wanted = max(fitting, key=_blocks), max(legal, key=_blocks)
    binding: Binding = "memory" if partition != wanted else "wish" if partition == wish else "model"
    also = {Partition(n, n) for n in range(1, _COMPARED + 1) if 2 * n < blocks} | {partition, wanted}
    picks = {
        boundary: choose(costs, work.tokens * measured.hidden, measured.rate)
        for boundary, costs in measured.wires.items()
    }
    chosen = candidates[partition]
    return Proposal(
        chosen=chosen,
        wanted=candidates[wanted],
        binding=binding,
        compared=tuple(candidate(measured, work, one) for one in sorted(also, key=_blocks)),
        wires=picks,
        crossings=_crossings(measured, work),
        seconds=_seconds(measured, work, chosen, picks),
    )


def candidate(measured: Measured, work: Work, partition: Partition) -> Candidate:
    """What a silo takes with `partition`."""
    kept = _kept(measured, partition)
    seconds = measured.rest.embed_s + measured.rest.predict_s * work.predicted / work.tokens
    seconds += sum(block.forward_s + block.backward_s for block in kept)
    memory = _memory(measured, work, partition)
    return Candidate(partition, seconds, memory, memory <= measured.memory)


def _memory(measured: Measured, work: Work, partition: Partition) -> int:
    """Weights, adapters, what waits for its backward or is cached, and one block's pass and the logits."""
    kept, rest = _kept(measured, partition), measured.rest
    head, tail = kept[: partition.head], kept[partition.head :]
    adapters = _TRAINED if work.training else 1
    weights = rest.weights + sum(block.weights + adapters * block.adapter for block in kept)
    waiting = work.flights * sum(block.graph for block in head) + sum(block.graph for block in tail)
    cached = work.cached * sum(block.cache for block in kept)
    passing = work.most * max((block.graph for block in kept), default=0) + work.most_predicted * rest.logits
    graphs = work.most * waiting if work.training else 0
    return int(weights + cached + _FRAGMENTED * (graphs + passing))


def _kept(measured: Measured, partition: Partition) -> tuple[Block, ...]:
    blocks = measured.blocks
    return blocks[: partition.head] + blocks[len(blocks) - partition.tail :]


def _legal(wish: Partition, blocks: int) -> list[Partition]:
    """All up to the wish that leave a trunk, and at either end a block if any is wished for there."""
    least = Partition(min(1, wish.head), min(1, wish.tail))
    least.spans(blocks)
    return [
        Partition(head, tail)
        for head in range(least.head, min(wish.head + 1, blocks))
        for tail in range(least.tail, min(wish.tail + 1, blocks))
        if head + tail < blocks
    ]


def _blocks(partition: Partition) -> tuple[int, int, int]:
    """Most blocks first; of equally many, evenly; then rather in the head."""
    return partition.head + partition.tail, min(partition.head, partition.tail), partition.head


def _crossings(measured: Measured, work: Work) -> dict[Wire, Crossing]:
    """What each wire that all boundaries may have would send."""
    boundaries = list(measured.wires)
    wires = measured.wires[boundaries[0]] if boundaries else ()
    return {wire: _crossing(measured, work, dict.fromkeys(boundaries, wire)) for wire in wires}


def _crossing(measured: Measured, work: Work, wires: Mapping[Boundary, Wire]) -> Crossing:
    elements, up, down = work.tokens * measured.hidden, 0.0, 0.0
    for boundary, wire in wires.items():
        size = measured.wires[boundary][wire].bytes(elements)
        up, down = (up, down + size) if boundary.startswith("trunk") else (up + size, down)
    busier = max(up, down) if work.training else up + down
    return Crossing((up + down) / work.tokens, busier / measured.rate / work.tokens)


def _seconds(
    measured: Measured, work: Work, chosen: Candidate, picks: Mapping[Boundary, Pick]
) -> dict[Part, float]:
    """By part, a token's. The trunk's backward is to its forward as here."""
    seconds: dict[Part, float] = {"silo": chosen.silo_s}
    if measured.line is None:
        return seconds
    seconds["line"] = _crossing(measured, work, {b: pick.wire for b, pick in picks.items()}).line_s
    if measured.line.speed and not work.training:
        seconds["line"] += measured.line.speed.rtt / work.tokens
    if measured.line.trunk_s is not None:
        forward = sum(block.forward_s for block in measured.blocks)
        both = forward + sum(block.backward_s for block in measured.blocks)
        seconds["trunk"] = measured.line.trunk_s * both / forward
    return seconds


def named(partition: Partition) -> str:
    """`2, 2`."""
    return f"{partition.head}, {partition.tail}"


def gigabytes(size: float) -> str:
    """Bytes in words."""
    if size < 1e8:
        return f"{size / 1e6:.3g} MB"
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"
