"""Vocabulary search with the known head, position by position, on what was recovered before it.

Every candidate for the next token is run through the head behind the recovered words, and compared with
what arrived. Exact recovery without noise: Nikolaou et al. (SipIt, arXiv 2510.15511) and Thomas et al.
(arXiv 2505.18332). With noise, the candidate's likelihood is weighed with a language model's opinion
of it, as Kale et al. do on embeddings (BeamClean, arXiv 2505.13758).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from silo_agent.audit.attack import About, Knowledge, Seen
from silo_agent.audit.nearest import nearest_tokens
from silo_agent.audit.reading import Reading

_LEAST = 1e-12
"""A variance that stands for none."""


@dataclass(frozen=True, slots=True)
class Search:
    """Tries `candidates` tokens a position: a quarter the language model's, the rest nearest by state."""

    candidates: int = 256
    name: str = "search"
    about: About = "text"
    assumes: str = "public model, noise's strength"

    def guess(self, knowledge: Knowledge, seen: Sequence[Seen]) -> list[Tensor]:
        """A guess for every position; all texts go on together, a token at a time."""
        model = knowledge.model
        tried = min(self.candidates, model.vocabulary)
        near = [nearest_tokens(knowledge, text.releases[0], tried) for text in seen]
        # The first token's table holds its very state: nothing is before it.
        found = [list(knowledge.begin) or [int(tokens[0, 0])] for tokens in near]
        room = max(text.tokens for text in seen) + tried
        reading = Reading([model.head, model.trunk, model.tail], rows=len(seen), capacity=room)
        unread = dict(enumerate(found))
        while rows := [row for row, text in enumerate(seen) if len(found[row]) < text.tokens]:
            spoken = reading.read(rows, [unread[row] for row in rows]).float().log_softmax(1).cpu()
            at = [len(found[row]) for row in rows]
            liked = spoken.topk(max(1, tried // 4), dim=1).indices
            close = torch.stack([near[row][place] for row, place in zip(rows, at, strict=True)])
            candidates = together(liked, close)
            arrived = torch.stack([seen[row].releases[0][place] for row, place in zip(rows, at, strict=True)])
            states = reading.next_states(rows, candidates).to(arrived.device)
            sigma = torch.tensor([seen[row].sigma for row in rows])
            squares = (states - arrived[:, None]).square().sum(2).cpu()
            best = likeliest(squares, arrived.shape[1], sigma, spoken.gather(1, candidates))
            chosen = candidates.gather(1, best[:, None])
            for row, token in zip(rows, chosen.tolist(), strict=True):
                found[row] = found[row] + token
            unread = dict(zip(rows, chosen.tolist(), strict=True))
        return [torch.tensor(tokens[: text.tokens]) for tokens, text in zip(found, seen, strict=True)]


def together(first: Tensor, second: Tensor) -> Tensor:
    """As many tokens as `second` has, in each row: all of `first`, then those of `second` not in it."""
    again = (second[:, :, None] == first[:, None, :]).any(2)
    order = again.to(torch.uint8).argsort(dim=1, stable=True)
    return torch.cat((first, second.gather(1, order)[:, : second.shape[1] - first.shape[1]]), dim=1)


def likeliest(squares: Tensor, size: int, sigma: Tensor, spoken: Tensor) -> Tensor:
    """The candidate of each row with the greatest posterior: Gaussian likelihood times the language model's.

    `squares` and `spoken` `[rows, candidates]` are squared distances over `size` elements, and
    log-probabilities; `sigma` `[rows]` is the deviation of what was added. Where even the nearest is
    farther than noise explains, because the head or the words before are not quite the right ones, that
    distance stands for the noise.
    """
    variance = torch.maximum(sigma.square(), squares.amin(1) / size).clamp_min(_LEAST)
    return (spoken - squares / (2 * variance[:, None])).argmax(1)
