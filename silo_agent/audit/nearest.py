"""Nearest embedding: each hidden state on its own, against every token of the vocabulary.

The plainest attack on embeddings, made for a head with blocks: the table holds each token's state
behind the texts' common beginning, which without blocks is its embedding. "Vocabulary matching" of
Thomas et al. (arXiv 2505.18332) is this with a text's own words before it; that is `search`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from silo_agent.audit.attack import About, Knowledge, Seen

_ROWS = 256


@dataclass(frozen=True, slots=True)
class Nearest:
    """Takes the token whose state is the least squared distance away."""

    name: str = "nearest"
    about: About = "text"
    assumes: str = "public head"

    def guess(self, knowledge: Knowledge, seen: Sequence[Seen]) -> list[Tensor]:
        """A guess for every position."""
        return [nearest_tokens(knowledge, text.releases[0], 1)[:, 0] for text in seen]


def nearest_tokens(knowledge: Knowledge, states: Tensor, count: int) -> Tensor:
    """The `count` nearest tokens to each of a text's states `[tokens, hidden]`, int64 `[tokens, count]`.

    The first token has no word before it, and its state is like no other's: it has its own table.
    """
    table = knowledge.model.states_after
    # Without a common beginning one token before stands for whatever was there.
    before = knowledge.begin or (0,)
    parts = [states[:1], *states[1:].split(_ROWS)]
    tables = [table(()), *[table(before)] * (len(parts) - 1)]
    return torch.cat([_nearest(part, known, count) for part, known in zip(parts, tables, strict=True)])


def _nearest(states: Tensor, table: Tensor, count: int) -> Tensor:
    return distances(states, table).topk(count, dim=1, largest=False).indices.cpu()


def distances(states: Tensor, table: Tensor) -> Tensor:
    """Squared, from each state to every row of the table, less what is the same for all rows."""
    return table.square().sum(1) - 2 * (states.to(table) @ table.T)
