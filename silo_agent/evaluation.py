"""How well the split model predicts a silo's own examples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F

from silo_agent.microbatch import Example, pack_examples
from silo_agent.session import Session


@dataclass(frozen=True, slots=True)
class Score:
    """Over all answer tokens: mean loss (nats), perplexity, and share of tokens predicted right."""

    loss: float
    perplexity: float
    token_accuracy: float
    tokens: int
    examples: int


def evaluate(
    session: Session, examples: Sequence[Example], *, rows: int, progress: Callable[[int], None]
) -> Score:
    """Score `examples`, `rows` at a time; `progress` is told how many are done with each batch."""
    loss, right, tokens = 0.0, 0, 0
    for at in range(0, len(examples), rows):
        part = examples[at : at + rows]
        batch = pack_examples(part)
        logits = session.extend(
            range(len(part)), [example.ids for example in part], starts=[0] * len(part), keep=batch.keep
        )
        logits = logits.float().cpu()
        loss += float(F.cross_entropy(logits, batch.targets, reduction="sum"))
        right += int((logits.argmax(-1) == batch.targets).sum())
        tokens += len(batch.targets)
        progress(len(part))
    mean = loss / tokens
    return Score(mean, math.exp(min(mean, 700.0)), right / tokens, tokens, len(examples))
