"""What every attack has in common: what is known before, what was seen, and what is guessed.

Attacks are written as the operator of a worker would write them: they know how everything works, the
noise's strength too, and lack only the text, the silo's adapter and its random bytes (Kerckhoffs).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from silo_agent.audit.public import PublicModel

About = Literal["text", "labels"]
"""What an attack guesses: every token of the text, or those that are learned."""

NO_GUESS = -1


@dataclass(frozen=True, slots=True, eq=False)
class Knowledge:
    """What an attacker holds before anything crosses."""

    model: PublicModel
    begin: tuple[int, ...] = ()
    """What all texts begin with: the chat template's words, which are no secret."""
    texts: tuple[tuple[int, ...], ...] = ()
    """Tokens of other texts: public ones, or those of a silo that colludes. None of those attacked."""


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What a worker decoded of one text. It holds no more of the text than its length."""

    releases: tuple[Tensor, ...]
    """Hidden states leaving the head `[tokens, hidden]`, once for each time that the text was sent."""
    sigma: float
    """Deviation of what was added to them: noise, and what the wire rounded."""
    output: Tensor
    """The trunk's output for the first release as it was sent back, `[tokens, hidden]`."""
    gradient: Tensor
    """The gradient of the summed loss at the trunk's output, `[tokens, hidden]`."""

    @property
    def tokens(self) -> int:
        """Tokens of the text."""
        return len(self.output)


class Attack(Protocol):
    """One attack. Its guesses depend on what it is given and on nothing else."""

    @property
    def name(self) -> str:
        """What it is called in reports."""
        ...

    @property
    def about(self) -> About:
        """What it guesses."""
        ...

    @property
    def assumes(self) -> str:
        """What the attacker is taken to know and to have, in few words."""
        ...

    def guess(self, knowledge: Knowledge, seen: Sequence[Seen]) -> list[Tensor]:
        """A token id for each position of each text, int64 `[tokens]`; `NO_GUESS` where there is none."""
        ...
