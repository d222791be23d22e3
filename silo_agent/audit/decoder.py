"""A learned decoder: the model's last block and lm_head, trained to read tokens from hidden states.

The attack that FedSEA-LLaMA is defended against (Zhang et al., arXiv 2505.15683): whoever has text of the
same kind, a silo that colludes with the server or anybody for public text, runs it through the public
head, adds noise as the silo does, and trains on the pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from codec import partition
from codec.errors import UsageError
from silo_agent.audit.attack import About, Knowledge, Seen
from silo_agent.audit.plain import PlainTail
from silo_agent.microbatch import Example, batches

_BLOCKS = 1
_TEXTS = 4
"""Texts in a step: few, since a step's time is mostly the lm_head's."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """Trains for `steps` steps; the noise is drawn anew in each. `pretrained` or from a random start."""

    steps: int = 150
    rate: float = 1e-3
    pretrained: bool = True
    name: str = "decoder"
    about: About = "text"
    assumes: str = "public model, noise's strength, text of the same kind"

    def guess(self, knowledge: Knowledge, seen: Sequence[Seen]) -> list[Tensor]:
        """A guess for every position. Raises `UsageError` if there is no text to learn from."""
        if not knowledge.texts:
            raise UsageError("the decoder has no text to learn from", hint="Give --public DATA.")
        with torch.random.fork_rng():
            torch.manual_seed(0)  # The attacker's own draws; the silo's noise has another source.
            decoder = self._trained(knowledge, max(text.sigma for text in seen))
        with torch.no_grad():
            return [decoder(text.releases[0], (text.tokens,))[1].argmax(1).cpu() for text in seen]

    def _trained(self, knowledge: Knowledge, sigma: float) -> PlainTail:
        model = knowledge.model
        blocks = model.checkpoint.blocks
        decoder = PlainTail(model, partition.Span(blocks - _BLOCKS, blocks), pretrained=self.pretrained)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=self.rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, self.steps)
        texts = [Example(ids, (True,) * len(ids)) for ids in knowledge.texts]
        for batch in islice(batches(texts, min(_TEXTS, len(texts)), seed=0), self.steps):
            with torch.no_grad():
                hidden = model.head.run(batch.ids, batch.lengths).float()
            _, logits = decoder(hidden + sigma * torch.randn_like(hidden), batch.lengths)
            loss = F.cross_entropy(logits, batch.ids.to(logits.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return decoder
