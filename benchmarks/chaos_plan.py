"""What goes wrong in a chaos benchmark, and when: a pure function of the seed.

A *disturbance* has one target: the broker, a worker, the training silo, or the link of the silos or of one
worker. Killing broker and worker together is two disturbances at one moment.
"""

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["kill", "pause", "drain", "cut"]
"""SIGKILL and a start `seconds` later; SIGSTOP, and SIGCONT `seconds` later; SIGTERM and a start once it
has ended; every connection broken, and none taken for `seconds`."""

BROKER, TRAINER, SILOS = "broker", "trainer", "silos"

_LEAST, _MOST = 0.3, 1.7
"""Gaps between disturbances, in units of their mean."""
_DOWN_S, _PAUSE_S, _CUT_S = 1.0, 3.0, 1.5
"""At most; uniform from 0. A pause is from a third of it on: half-dead, not merely slow."""

_WEIGHTS: dict[tuple[Kind, str], int] = {
    ("kill", "worker"): 6,
    ("kill", BROKER): 6,
    ("kill", "both"): 2,
    ("pause", "worker"): 4,
    ("pause", BROKER): 2,
    ("drain", "worker"): 2,
    ("cut", "worker"): 3,
    ("cut", SILOS): 3,
}
_KILL_TRAINER = 3
"""The weight of killing the training silo, where it can go on."""


@dataclass(frozen=True, slots=True)
class Disturbance:
    """`at` seconds after the start something of `kind` happens to `target`, for `seconds`."""

    at: float
    kind: Kind
    target: str
    seconds: float

    @property
    def label(self) -> str:
        """What it is, without a worker's number: `kill worker`."""
        return f"{self.kind} {self.target.partition('-')[0]}"


def worker_name(number: int) -> str:
    """What a worker is called."""
    return f"worker-{number}"


def plan(seed: int, seconds: float, *, every: float, workers: int, trainer: bool) -> list[Disturbance]:
    """Disturbances of `seconds`, one `every` so many seconds on average, oldest first.

    With `trainer` the training silo is killed too.
    """
    dice = random.Random(seed)
    weights = _WEIGHTS | ({("kill", TRAINER): _KILL_TRAINER} if trainer else {})
    found: list[Disturbance] = []
    at = 0.0
    while (at := at + every * dice.uniform(_LEAST, _MOST)) < seconds:
        ((kind, whom),) = dice.choices(list(weights), list(weights.values()))
        target = worker_name(dice.randrange(workers)) if whom in ("worker", "both") else whom
        lasts = dice.random() * {"kill": _DOWN_S, "pause": _PAUSE_S, "drain": 0.0, "cut": _CUT_S}[kind]
        found.append(Disturbance(at, kind, target, max(lasts, _PAUSE_S / 3) if kind == "pause" else lasts))
        if whom == "both":
            found.append(Disturbance(at, kind, BROKER, dice.random() * _DOWN_S))
    return found
