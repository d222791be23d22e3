"""A request as a worker's inbox sees it: what it is about, how urgent it is, what it costs."""

from enum import IntEnum
from typing import TypeVar

from msgspec import Struct

from codec.messages import Backward, CloseSession, Extend, Forward, OpenRun, OpenSession, Request


class Rank(IntEnum):
    """The classes, the most urgent first."""

    DECODE = 0
    BACKWARD = 1
    PREFILL = 2
    FORWARD = 3


Flow = tuple[bytes, str, str]
"""A silo's alias, "session" or "run", and the name. What is about the same flow keeps its order."""

RunKey = tuple[tuple[str, ...], str]
"""The members that a run is open to, none for anybody, and its name."""


class Ask(Struct, eq=False):
    """One request for one worker. `number` is the silo's; nobody waits for the answer to 0."""

    flow: Flow
    number: int
    rank: Rank
    tokens: int


A = TypeVar("A", bound=Ask)


def flow_of(silo: bytes, header: Request) -> Flow:
    """What a silo's request is about."""
    if isinstance(header, Extend | OpenSession | CloseSession):
        return silo, "session", header.session
    return silo, "run", header.run


def run_key(header: OpenRun) -> RunKey:
    """Which run a silo asks for: one of another name, or of other members, is another."""
    return header.plan.members, header.run


def cost(header: Request) -> tuple[Rank, int]:
    """Class and tokens. What costs no tokens waits for nothing but its flow, so its class is idle."""
    if isinstance(header, Extend):
        tokens = sum(header.lengths)
        return Rank.DECODE if tokens == len(header.lengths) else Rank.PREFILL, tokens
    if isinstance(header, Forward):
        return Rank.FORWARD, sum(header.lengths)
    if isinstance(header, Backward):
        shape = header.tensors[0].shape if header.tensors else ()
        return Rank.BACKWARD, shape[0] if shape else 0
    return Rank.DECODE, 0
