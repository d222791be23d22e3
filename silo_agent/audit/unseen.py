"""No attack: a language model goes on from the texts' common beginning, and looks at nothing.

Its rate is the floor. What another attack recovers no more of than this, what crossed did not tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from silo_agent.audit.attack import About, Knowledge, Seen
from silo_agent.audit.reading import Reading


@dataclass(frozen=True, slots=True)
class Unseen:
    """The public model's greedy continuation."""

    name: str = "unseen"
    about: About = "text"
    assumes: str = "public model; looks at nothing"

    def guess(self, knowledge: Knowledge, seen: Sequence[Seen]) -> list[Tensor]:
        """The same for every text, as long as each is."""
        model, longest = knowledge.model, max(text.tokens for text in seen)
        reading = Reading([model.head, model.trunk, model.tail], rows=1, capacity=longest + 1)
        found = list(knowledge.begin) or [0]
        unread = found
        while len(found) < longest:
            unread = reading.read([0], [unread]).argmax(1).tolist()
            found = found + unread
        return [torch.tensor(found[: text.tokens]) for text in seen]
