"""Scores of guesses made by hand, and the small decisions of the attacks."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from silo_agent.audit.attack import NO_GUESS
from silo_agent.audit.gradients import least_squares
from silo_agent.audit.scoring import score, sentences_of
from silo_agent.audit.search import likeliest, together
from silo_agent.audit.subject import shared_beginning
from silo_agent.microbatch import Example


def test_a_share_of_the_text_is_counted(tiny: Any) -> None:
    ids = tiny.ids("The patient came in. Pain in the chest. Seen by the nurse.")
    example = Example(tuple(ids), (False,) * 6 + (True,) * (len(ids) - 6))
    guess = torch.tensor(ids)
    begin = 2
    guess[:begin] = NO_GUESS
    whole = score(tiny.tokenizer, [example], [guess], about="text", begin=begin)
    assert (whole.token_recovery, whole.precision, whole.exact_sentences, whole.rougeL) == (1, 1, 1, 1)
    assert whole.tokens == len(ids) - begin
    guess[-1] = 3  # The last sentence of three is not exact any more.
    part = score(tiny.tokenizer, [example], [guess], about="text", begin=begin)
    assert part.token_recovery == pytest.approx(1 - 1 / whole.tokens)
    assert part.exact_sentences == pytest.approx(2 / 3)
    guess[6:8] = NO_GUESS
    labels = score(tiny.tokenizer, [example], [guess], about="labels", begin=begin)
    assert labels.tokens == len(ids) - 6
    assert labels.token_recovery == pytest.approx((labels.tokens - 3) / labels.tokens)
    assert labels.precision == pytest.approx((labels.tokens - 3) / (whole.tokens - 2))


def test_sentences_end_where_they_say_so() -> None:
    assert sentences_of(["A", " b", ".", " C", "?\n", "d"]) == [(0, 3), (3, 5), (5, 6)]
    assert sentences_of(["A", "."]) == [(0, 2)]
    assert sentences_of([]) == []


def test_what_texts_share_is_no_secret() -> None:
    texts = [Example(ids, (True,) * len(ids)) for ids in ((1, 2, 3, 4), (1, 2, 5), (1, 2, 3))]
    assert shared_beginning(texts) == (1, 2)
    assert shared_beginning(texts[:1]) == ()


@given(st.data())
def test_candidates_are_different_and_keep_their_order(data: st.DataObject) -> None:
    tokens = list(range(20))
    second = data.draw(st.lists(st.sampled_from(tokens), min_size=2, max_size=20, unique=True))
    size = data.draw(st.integers(1, len(second)))
    first = data.draw(st.lists(st.sampled_from(tokens), min_size=size, max_size=size, unique=True))
    found = together(torch.tensor([first]), torch.tensor([second]))[0].tolist()
    expected = [*first, *(token for token in second if token not in first)]
    assert found == expected[: len(second)]


def test_far_candidates_need_a_better_word_of_the_language_model() -> None:
    """Deviation 1: squared distances 10 apart are 5 nats."""
    squares, spoken = torch.tensor([[10.0, 20.0]]), torch.tensor([[-8.0, -4.0]])
    assert likeliest(squares, 10, torch.tensor([1.0]), spoken).tolist() == [0]
    assert likeliest(squares, 10, torch.tensor([1.0]), spoken * 2).tolist() == [1]
    # Without noise the nearest wins, whatever is said; if even it is far, something else is wrong.
    assert likeliest(torch.tensor([[0.0, 1e-3]]), 10, torch.tensor([0.0]), spoken * 99).tolist() == [0]
    assert likeliest(squares * 100, 10, torch.tensor([1.0]), spoken * 2).tolist() == [1]


def test_least_squares_equals_lapack() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, right = torch.randn(12, 7, generator=generator), torch.randn(12, generator=generator)
    found = least_squares(lambda x: matrix @ x, lambda y: matrix.T @ y, right, 30)
    torch.testing.assert_close(found, torch.linalg.lstsq(matrix, right[:, None]).solution[:, 0])
