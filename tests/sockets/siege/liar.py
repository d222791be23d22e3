"""Answers that are not to be trusted."""

from collections.abc import Callable, Sequence
from random import Random

import msgspec
from fuzzing.examples import example
from fuzzing.message import Message
from fuzzing.mutators import damage
from siege.arsenal import KINDS, Tensors

from codec.messages import Done, Error, Extend, Opened, OpenSession, Request, Result, encode_header


class Liar:
    """Answers requests: rightly, damaged, cut short, as another kind, twice, or not at all."""

    def __init__(self, rng: Random, tensors: Tensors, throw: Callable[[Sequence[bytes]], None]) -> None:
        self._rng, self._tensors, self._throw = rng, tensors, throw

    def answer(self, silo: bytes, asked: Request) -> None:
        """Say something to a request of `silo`."""
        rng, right = self._rng, (silo, *self._right(asked))
        for _ in range(rng.choice((0, 1, 1, 1, 1, 1, 1, 2))):
            match rng.randrange(4):
                case 0:
                    self._throw(damage(rng, Message("", right), Message("", right)).frames)
                case 1:
                    header = example(rng.choice(KINDS), rng, tensors=())
                    self._throw((silo, encode_header(msgspec.structs.replace(header, id=asked.id))))
                case 2:
                    self._throw((*right[:2], *(part[: rng.randrange(1 + len(part))] for part in right[2:])))
                case _:
                    self._throw(right)

    def _right(self, asked: Request) -> tuple[bytes, ...]:
        if isinstance(asked, OpenSession):
            return (encode_header(Opened(id=asked.id)),)
        if not isinstance(asked, Extend):
            return (encode_header(Done(id=asked.id)),)
        spec, frame = self._tensors.draw(self._rng, sum(asked.lengths))
        return encode_header(Result(id=asked.id, tensors=(spec,), seconds=0.1)), frame


def ends_a_link(header: object) -> bool:
    """Whether a broker that says this means that the link is over."""
    return isinstance(header, Error) and header.id == 0 and header.code != "link"
