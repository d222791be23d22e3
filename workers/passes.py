"""Which of the waiting requests run together in one pass through the trunk. Decisions only."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

MAX_PASS_TOKENS = 4096
"""Tokens in one pass; a longer request runs alone."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the worker's hands.

    Requests with the same `place` (adapter and blocks) may run together, unless they are about the
    same `unit` (a session): the later one needs what the earlier one did. `place` None runs alone.
    """

    silo: bytes
    place: Hashable = None
    unit: Hashable = None
    tokens: int = 0


@dataclass(slots=True)
class _Pass:
    place: Hashable
    members: list[int] = field(default_factory=list)
    units: set[Hashable] = field(default_factory=set)
    tokens: int = 0

    def takes(self, request: Waiting) -> bool:
        return (
            self.place is not None
            and self.place == request.place
            and request.unit not in self.units
            and self.tokens + request.tokens <= MAX_PASS_TOKENS
        )

    def add(self, index: int, request: Waiting) -> None:
        self.members.append(index)
        self.units.add(request.unit)
        self.tokens += request.tokens


def plan_passes(waiting: Sequence[Waiting]) -> list[list[int]]:
    """The requests, by index, pass by pass in the order in which to carry them out.

    Each request is in one pass. A silo's own requests keep their order: none is in a pass before
    that of an earlier one. Every request joins the first pass that will have it.
    """
    passes: list[_Pass] = []
    last: dict[bytes, int] = {}
    for index, request in enumerate(waiting):
        earliest = last.get(request.silo, 0)
        number = next((n for n in range(earliest, len(passes)) if passes[n].takes(request)), len(passes))
        if number == len(passes):
            passes.append(_Pass(request.place))
        passes[number].add(index, request)
        last[request.silo] = number
    return [made.members for made in passes]
