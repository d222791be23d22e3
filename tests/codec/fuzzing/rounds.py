"""Rounds: messages bred one from another, each round the same for a seed whatever ran before it.

A message that takes a path not seen in its round (`Outcome.signature`) is bred from in turn. That is
coarse beside counting branches, and costs nothing: every refusal has words of its own.
"""

import time
from collections.abc import Callable
from random import Random

from fuzzing.corpus import Corpus
from fuzzing.message import MAX_SIZE, Message, Outcome
from fuzzing.mutators import damage
from fuzzing.report import Tally

_UNTOUCHED = 0.02
_HEAVY = 1 / 10_000
"""A heavy message takes as long as a thousand others."""
_KEPT = 0.3
_MAX_KEPT = 2000
_MAX_KEPT_SIZE = 1 << 18
"""Bytes, received and made of them. The offspring of larger ones would take most of the time."""


class Round:
    """Breeds the messages of round `number`, and learns from what came of each."""

    def __init__(self, seed: int, number: int, corpus: Corpus) -> None:
        self._rng = Random(f"{seed}/{number}")
        self._corpus = corpus
        self._kept: list[Message] = []
        self._seen: set[tuple[str, ...]] = set()

    @property
    def paths(self) -> int:
        """How many different paths were taken."""
        return len(self._seen)

    def breed(self) -> Message:
        """The next message."""
        rng, luck = self._rng, self._rng.random()
        if luck < _HEAVY:
            return rng.choice(self._corpus.heavy)
        kept = self._kept and rng.random() < _KEPT
        parent = rng.choice(self._kept) if kept else self._valid()
        if luck < _UNTOUCHED:
            return parent
        child = damage(rng, parent, self._valid())
        return child if child.size <= MAX_SIZE else parent

    def learn(self, message: Message, outcome: Outcome) -> None:
        """Keep what took a new path."""
        if outcome.signature in self._seen:
            return
        self._seen.add(outcome.signature)
        # Where the header is refused, more damage mostly finds the same fault again.
        told = outcome.labels or not outcome.refused
        if told and len(self._kept) < _MAX_KEPT and message.size + outcome.size <= _MAX_KEPT_SIZE:
            self._kept.append(message)

    def _valid(self) -> Message:
        return self._rng.choice(self._rng.choice(self._corpus.groups))


def play(
    breeder: Round,
    indices: range,
    read: Callable[[Message], Outcome],
    tally: Tally,
    watch: Callable[[int, Message], bool] = lambda index, message: True,
) -> None:
    """Read the round's next messages; `watch` is told of each before, and may end the round early."""
    for index in indices:
        message = breeder.breed()
        if not watch(index, message):
            break
        start = time.perf_counter()
        outcome = read(message)
        tally.count(index, outcome, time.perf_counter() - start)
        breeder.learn(message, outcome)
        tally.paths = breeder.paths
