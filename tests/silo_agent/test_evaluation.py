"""Scores against the whole model's own cross entropy on the same answers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from silo_agent.data import chat_examples
from silo_agent.evaluation import evaluate
from silo_agent.noise import Noise, NoiseScale


@pytest.mark.parametrize("rows", [1, 4, 50])
def test_the_split_models_score_is_the_whole_models(
    pool: Any, tiny: Any, clinics: list[Path], rows: int
) -> None:
    examples = chat_examples(clinics[0], tiny.tokenizer, max_tokens=400)[:7]
    loss, right, tokens = 0.0, 0, 0
    for example in examples:
        logits = tiny.logits(example.ids)[:-1]
        learned = torch.tensor(example.answer[1:])
        targets = torch.tensor(example.ids[1:])[learned]
        loss += float(F.cross_entropy(logits[learned], targets, reduction="sum"))
        right += int((logits[learned].argmax(-1) == targets).sum())
        tokens += len(targets)
    done: list[int] = []
    with pool.session(rows=rows, capacity=400) as session:
        score = evaluate(session, examples, rows=rows, progress=done.append)
    assert score.loss == pytest.approx(loss / tokens, abs=1e-5)
    assert score.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert score.token_accuracy == right / tokens
    assert (score.tokens, score.examples) == (tokens, 7)
    assert sum(done) == 7
    assert len(done) == math.ceil(7 / rows)


def test_noise_shows_in_the_score(pool: Any, tiny: Any, clinics: list[Path]) -> None:
    examples = chat_examples(clinics[0], tiny.tokenizer, max_tokens=400)[:3]
    losses = []
    for relative in (0.0, 3.0):
        with pool.session(rows=3, capacity=400, noise=Noise(NoiseScale(relative=relative))) as session:
            losses.append(evaluate(session, examples, rows=3, progress=lambda _: None).loss)
    assert abs(losses[1] - losses[0]) > 0.01


def test_a_sessions_rows_are_used_again(pool: Any, tiny: Any, clinics: list[Path]) -> None:
    """The second batch must not attend to the first one's tokens."""
    examples = chat_examples(clinics[0], tiny.tokenizer, max_tokens=400)[:2]
    with pool.session(rows=1, capacity=400) as session:
        twice = [evaluate(session, examples, rows=1, progress=lambda _: None) for _ in range(2)]
    assert twice[0] == twice[1]
