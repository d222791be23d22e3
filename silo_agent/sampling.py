"""Choosing the next token, with transformers' own logits processors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from codec.errors import UsageError

_NO_IDS: Any = torch.empty(1, 0, dtype=torch.int64)
"""The warpers look at scores alone; ids are only part of their signature."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; a `temperature` of 0 is greedy. Same meaning as in `GenerationConfig`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UsageError("sampling needs temperature >= 0, top-k >= 0 and 0 < top-p <= 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UsageError("a repetition penalty is greater than 0; 1 is none")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise UsageError(f"{self.seed} is not a 64-bit seed")


class Sampler:
    """Draws next tokens for a batch of sequences of different lengths."""

    def __init__(self, sampling: Sampling) -> None:
        self._greedy = sampling.temperature == 0
        self._penalty = (
            RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))
            if sampling.repetition_penalty != 1
            else None
        )
        self._warpers = LogitsProcessorList()
        if not self._greedy:
            if sampling.temperature != 1:
                self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, histories: Sequence[Sequence[int]], logits: Tensor) -> list[int]:
        """Next tokens for `logits` `[rows, vocabulary]`; `histories` are the rows' tokens so far."""
        scores = logits.float().cpu()
        if self._penalty is not None:
            rows = [
                self._penalty(torch.tensor([history]), scores[i : i + 1])
                for i, history in enumerate(histories)
            ]
            scores = torch.cat(rows)
        if self._greedy:
            return scores.argmax(-1).tolist()
        scores = self._warpers(_NO_IDS, scores)
        return torch.multinomial(scores.softmax(-1), 1, generator=self._generator)[:, 0].tolist()
