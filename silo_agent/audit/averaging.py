"""Averaging: noise is drawn anew at every release, so the mean of K has its deviation over √K.

A text is released again in every epoch and evaluation, and each time a question about it is asked. That
independent noise averages out is why a budget counts releases (Dwork and Roth, "The Algorithmic
Foundations of Differential Privacy", 3.5).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from silo_agent.audit.attack import About, Attack, Knowledge, Seen


@dataclass(frozen=True, slots=True)
class Averaged:
    """Another attack, on the mean of all releases of each text."""

    attack: Attack
    about: About = "text"

    @property
    def name(self) -> str:
        """What it is called in reports."""
        return f"averaged-{self.attack.name}"

    @property
    def assumes(self) -> str:
        """What the other attack assumes, and that releases can be told to be of one text."""
        return f"{self.attack.assumes}, several releases"

    def guess(self, knowledge: Knowledge, seen: Sequence[Seen]) -> list[Tensor]:
        """The other attack's guesses."""
        return self.attack.guess(knowledge, [_mean(text) for text in seen])


def _mean(seen: Seen) -> Seen:
    mean = torch.stack(seen.releases).mean(0)
    return replace(seen, releases=(mean,), sigma=seen.sigma / math.sqrt(len(seen.releases)))
