"""The silos of a chaos benchmark that generate, and compare with what they got undisturbed."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.chaos_tally import Tally
from broker.link import ZmqLink
from codec.errors import TrunklineError
from codec.partition import Partition
from silo_agent.ends import Ends
from silo_agent.noise import Noise, NoiseScale
from silo_agent.remote import Remote, silo_attach
from silo_agent.session import Session
from workers.checkpoint import Checkpoint

_DEADLINE_S = 60.0
"""For one request, and for finding a worker: what is not done by then is lost."""
_NOISE = NoiseScale(relative=0.05)
_CLEAR = 1e-3
"""Between the best token's logit and the next one's: rounding, which differs with who shares a pass, does
not turn it round."""
_STAYS = 0.9
"""Chance that a silo keeps its link after a generation."""

OnPass = Callable[[float, float], None]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt, and the greedy tokens that follow it where nothing is disturbed.

    `seed` is of the noise: with it fixed, only the very bytes of the first time give the same tokens.
    """

    prompt: tuple[int, ...]
    seed: int
    tokens: tuple[int, ...]


class Talker:
    """A silo that generates. Its head and tail are its own: a span computes on one thread at a time."""

    def __init__(self, checkpoint: Checkpoint, cut: Partition, endpoint: str) -> None:
        self._ends, self._endpoint = Ends(checkpoint, cut), endpoint
        self._vocabulary = checkpoint.config.vocab_size

    def rehearse(self, dice: random.Random, number: int) -> list[Exchange]:
        """So many exchanges without near ties; while nothing is disturbed. Raises `TrunklineError`."""
        found: list[Exchange] = []
        remote = self._remote()
        try:
            while len(found) < number:
                prompt = tuple(dice.randrange(self._vocabulary) for _ in range(dice.randint(4, 40)))
                seed = dice.getrandbits(32)
                tokens, clear = self._generate(remote, prompt, seed, dice.randint(8, 48))
                if clear > _CLEAR:
                    found.append(Exchange(prompt, seed, tuple(tokens)))
        finally:
            remote.close()
        return found

    def live(self, seed: int, exchanges: Sequence[Exchange], tally: Tally, stop: threading.Event) -> None:
        """Generate, one after another, until `stop`."""
        dice, remote = random.Random(seed), self._remote()
        try:
            while not stop.is_set():
                chosen = dice.choice(exchanges)
                try:
                    tokens, _ = self._generate(
                        remote, chosen.prompt, chosen.seed, len(chosen.tokens), tally.passed
                    )
                except TrunklineError as error:
                    tally.failed(f"generation: {error}")
                    stays = False
                else:
                    tally.generated(tuple(tokens) == chosen.tokens)
                    stays = dice.random() < _STAYS
                if not stays:
                    remote.close()
                    remote = self._remote()
        finally:
            remote.close()

    def _generate(
        self, remote: Remote, prompt: Sequence[int], seed: int, new: int, on_pass: OnPass = lambda *_: None
    ) -> tuple[list[int], float]:
        """Greedy tokens, and by how much the closest of them was ahead."""
        tokens: list[int] = []
        clear, part = float("inf"), list(prompt)
        asked = time.monotonic()
        noise = Noise(_NOISE, seed=seed)
        capacity = len(prompt) + new
        with Session(self._ends, remote, rows=1, capacity=capacity, noise=noise, wait=_DEADLINE_S) as session:
            for _ in range(new):
                values, ids = torch.topk(session.extend([0], [part])[0], 2)
                answered = time.monotonic()
                on_pass(asked, answered)
                asked = answered
                clear = min(clear, float(values[0] - values[1]))
                part = [int(ids[0])]
                tokens += part
        return tokens, clear

    def _remote(self) -> Remote:
        link = ZmqLink(self._endpoint, silo_attach("chaos"), patience=_DEADLINE_S)
        return Remote(link, deadline=_DEADLINE_S)
