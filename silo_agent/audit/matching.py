"""Continuous matching: vectors in the embeddings' place, moved until the head's output fits.

Song and Raghunathan (arXiv 2004.00053) invert embedding models so. All positions of a text are looked
for at once, so no wrong word stands before the next, and no vocabulary is searched but at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from silo_agent.audit.attack import About, Knowledge, Seen
from silo_agent.audit.nearest import distances


@dataclass(frozen=True, slots=True)
class Matching:
    """L-BFGS on the squared distance, `steps` evaluations; then the nearest embedding of each vector.

    It begins with the states themselves, as long as embeddings are: blocks add to what they are given,
    so each still has something of its token's direction.
    """

    steps: int = 150
    name: str = "matching"
    about: About = "text"
    assumes: str = "public head"

    def guess(self, knowledge: Knowledge, seen: Sequence[Seen]) -> list[Tensor]:
        """A guess for every position; all texts are matched together."""
        model, lengths = knowledge.model, tuple(text.tokens for text in seen)
        target = torch.cat([text.releases[0] for text in seen]).to(model.device)
        table = model.embeddings
        # One massive state must not be all that counts.
        sizes = target.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        found = (target * (table.norm(dim=1).mean() / sizes)).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [found], max_iter=self.steps, max_eval=self.steps, line_search_fn="strong_wolfe"
        )

        def distance() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = ((model.core.run(found, lengths).float() - target) / sizes).square().sum()
            loss.backward()
            return loss

        optimizer.step(distance)
        return [distances(part, table).argmin(1).cpu() for part in found.detach().split(lengths)]
