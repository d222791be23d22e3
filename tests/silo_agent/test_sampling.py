"""Choosing tokens: the same rules as transformers' `generate`, and the dice."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from codec.errors import UsageError
from silo_agent.generation import generate
from silo_agent.sampling import Sampler, Sampling

PROMPTS = ["The patient came in", "user: what is", "hello again again"]


@pytest.fixture(scope="module")
def logits() -> Tensor:
    """One row of logits with a clear head and a long tail."""
    return 2 * torch.randn(1, 512, generator=torch.Generator().manual_seed(0))


def frequencies(sampling: Sampling, logits: Tensor, draws: int = 4000) -> Tensor:
    """How often each token is drawn from one and the same row."""
    chosen = Sampler(sampling).choose([[]] * draws, logits.expand(draws, -1))
    return torch.bincount(torch.tensor(chosen), minlength=logits.shape[1]) / draws


def test_greedy_takes_the_largest_whatever_else_is_set(logits: Tensor) -> None:
    rows = torch.cat([logits, logits.flip(1)])
    sampler = Sampler(Sampling(temperature=0.0, top_k=3, top_p=0.2, seed=1))
    assert sampler.choose([[], []], rows) == rows.argmax(1).tolist()


@pytest.mark.parametrize("penalty", [1.3, 2.0, 0.7])
def test_a_repetition_penalty_as_in_transformers(pool: Any, tiny: Any, penalty: float) -> None:
    changed = False
    for text in PROMPTS:
        prompt = tiny.ids(text)
        expected = tiny.greedy(prompt, 16, repetition_penalty=penalty, eos_token_id=None)
        with pool.session() as session:
            (answer,) = generate(
                session,
                tiny.tokenizer,
                [prompt],
                max_tokens=16,
                ends=frozenset(),
                sampling=Sampling(repetition_penalty=penalty),
            )
        assert answer.tokens == expected
        changed |= expected != tiny.greedy(prompt, 16, eos_token_id=None)
    assert changed, "the penalty made no difference: this shows nothing"


def test_the_penalty_looks_at_each_rows_own_history(logits: Tensor) -> None:
    best = int(logits.argmax())
    sampler = Sampler(Sampling(repetition_penalty=100.0))
    rows = logits.expand(2, -1)
    assert sampler.choose([[best], [1, 2]], rows)[1] == best
    assert sampler.choose([[best], [1, 2]], rows)[0] != best
    assert torch.equal(rows[0], logits[0]), "the model's logits were changed in place"


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.5},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.5, "repetition_penalty": 1.4},
    ],
)
def test_the_distribution_is_that_of_transformers(tiny: Any, settings: dict[str, Any]) -> None:
    prompt = tiny.ids(PROMPTS[0])
    out = tiny.whole.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=1,
        do_sample=True,
        output_scores=True,
        return_dict_in_generate=True,
        **{"top_k": 0, "top_p": 1.0, **settings},
    )
    expected = out.scores[0][0].softmax(-1)
    draws = 6000
    sampler = Sampler(Sampling(**settings, seed=0))
    rows = tiny.logits(prompt)[-1:].expand(draws, -1)
    drawn = torch.bincount(torch.tensor(sampler.choose([prompt] * draws, rows)), minlength=512) / draws
    assert not bool(drawn[expected == 0].any()), "a token was drawn that transformers rules out"
    likely = expected > 20 / draws
    assert bool(drawn[likely].all()), "a token was ruled out that transformers would draw"
    spread = (expected * (1 - expected) / draws).sqrt()
    assert bool(((drawn - expected).abs() <= 5 * spread + 1 / draws).all())


def test_supports(logits: Tensor) -> None:
    probabilities = logits[0].softmax(-1)
    order = probabilities.argsort(descending=True)
    drawn = frequencies(Sampling(temperature=1.0, top_k=4, seed=0), logits).nonzero()[:, 0]
    assert set(drawn.tolist()) == set(order[:4].tolist())
    nucleus = int((probabilities[order].cumsum(0) < 0.5).sum()) + 1
    drawn = frequencies(Sampling(temperature=1.0, top_p=0.5, seed=0), logits).nonzero()[:, 0]
    assert set(drawn.tolist()) == set(order[:nucleus].tolist())
    assert frequencies(Sampling(temperature=1.0, top_k=1, seed=0), logits).argmax() == order[0]


def test_a_seed_repeats_and_none_does_not(logits: Tensor) -> None:
    rows = logits.expand(40, -1)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return sampler.choose([[]] * 40, rows) + sampler.choose([[]] * 40, rows)

    assert draw(3) == draw(3)
    assert draw(3)[:40] != draw(3)[40:]
    assert len({tuple(draw(seed)) for seed in (3, 4, None, None)}) == 4


def test_whole_numbers_will_do_and_a_top_k_over_the_vocabulary(logits: Tensor) -> None:
    sampling = Sampling(temperature=2, top_k=9999, top_p=1, repetition_penalty=2, seed=0)
    assert len(Sampler(sampling).choose([[1], [2]], logits.expand(2, -1))) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"seed": 1 << 64},
    ],
)
def test_sampling_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Sampling(**options)
