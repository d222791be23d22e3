"""Generation over the split model against transformers' own on the whole one."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from codec.errors import DataError, LimitError
from silo_agent.generation import Continuation, generate

PROMPTS = [
    "The patient came in",
    "If this is true, then",
    "user: what is the capital of that country? assistant: the capital is the largest city",
    "hello",
]
NO_ENDS: frozenset[int] = frozenset()


def answers(pool: Any, tiny: Any, prompts: Sequence[str], tokens: int, **options: Any) -> list[Continuation]:
    ids = [tiny.ids(prompt) for prompt in prompts]
    settings = {"max_tokens": tokens, "ends": NO_ENDS, **options}
    with pool.session(rows=len(ids)) as session:
        return generate(session, tiny.tokenizer, ids, **settings)


def test_greedy_is_what_the_whole_model_says_alone_and_in_a_batch(pool: Any, tiny: Any) -> None:
    expected = [tiny.greedy(tiny.ids(prompt), 40, eos_token_id=None) for prompt in PROMPTS]
    assert len({len(tiny.ids(prompt)) for prompt in PROMPTS}) == len(PROMPTS)
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    together = answers(pool, tiny, PROMPTS, 40)
    alone = [answers(pool, tiny, [prompt], 40)[0] for prompt in PROMPTS]
    for got in (together, alone):
        assert [answer.tokens for answer in got] == expected
        assert [answer.text for answer in got] == [tiny.tokenizer.decode(tokens) for tokens in expected]
        assert {answer.reason for answer in got} == {"length"}


@pytest.mark.parametrize("partition", [(0, 0), (1, 4), (4, 1), (0, 5), (5, 0)])
def test_whatever_the_partition(pool: Any, tiny: Any, partition: tuple[int, int]) -> None:
    prompt = tiny.ids(PROMPTS[1])
    with pool.session(ends=pool.ends(*partition)) as session:
        (answer,) = generate(session, tiny.tokenizer, [prompt], max_tokens=12, ends=NO_ENDS)
    assert answer.tokens == tiny.greedy(prompt, 12, eos_token_id=None)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_of_more_prompts_than_rows_the_next_takes_the_first_free_row(pool: Any, tiny: Any, rows: int) -> None:
    prompts = [tiny.ids(prompt) for prompt in [*PROMPTS, *PROMPTS[:3]]]
    full = [tiny.greedy(prompt, 15, eos_token_id=None) for prompt in prompts]
    end = full[1][3]
    heard: dict[int, str] = {}
    with pool.session(rows=rows) as session:
        got = generate(
            session,
            tiny.tokenizer,
            prompts,
            max_tokens=15,
            ends=frozenset({end}),
            on_text=lambda index, text: heard.update({index: heard.get(index, "") + text}),
        )
    expected = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in full]
    assert [answer.tokens for answer in got] == expected
    assert [heard.get(index, "") for index in range(len(prompts))] == [answer.text for answer in got]
    busy = [len(parcel.header.rows) for parcel in pool.sent()]
    assert busy == sorted(busy, reverse=True), "rows are free only when no prompt is left"
    assert busy[0] == rows


def test_an_end_token_ends_its_row_and_no_other(pool: Any, tiny: Any) -> None:
    full = [tiny.greedy(tiny.ids(prompt), 40, eos_token_id=None) for prompt in PROMPTS]
    end = full[1][3]
    assert end not in full[1][:3]
    assert sum(end in tokens for tokens in full) < len(full)
    got = answers(pool, tiny, PROMPTS, 40, ends=frozenset({end}))
    for answer, tokens in zip(got, full, strict=True):
        cut = tokens.index(end) + 1 if end in tokens else len(tokens)
        assert answer.tokens == tokens[:cut]
        assert answer.reason == ("stop" if end in tokens else "length")
        assert answer.text == tiny.tokenizer.decode(tokens[: cut - 1] if end in tokens else tokens)


def test_the_models_own_end_token_is_no_text(pool: Any, tiny: Any) -> None:
    (answer,) = answers(pool, tiny, ["Several owners"], 40, ends=frozenset({2}))
    assert answer.tokens[-1] == 2
    assert answer.tokens == tiny.greedy(tiny.ids("Several owners"), 40)
    assert answer.text == tiny.tokenizer.decode(answer.tokens[:-1])


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_no_more_than_the_tokens_asked_for(pool: Any, tiny: Any, tokens: int) -> None:
    got = answers(pool, tiny, PROMPTS[:2], tokens)
    assert [len(answer.tokens) for answer in got] == [tokens, tokens]


def test_pieces_come_as_they_are_made_and_add_up(pool: Any, tiny: Any) -> None:
    pieces: list[list[str]] = [[] for _ in PROMPTS]
    got = answers(pool, tiny, PROMPTS, 40, on_text=lambda row, text: pieces[row].append(text))
    for answer, heard in zip(got, pieces, strict=True):
        assert "".join(heard) == answer.text
        assert all(heard)
        assert len(heard) > 20
    # Characters of several bytes, split over tokens, come whole.
    assert any(len(piece) == 1 and ord(piece) in range(128, 0xFFFD) for heard in pieces for piece in heard)


def test_a_row_stops_within_the_session_or_with_a_clear_error(pool: Any, tiny: Any) -> None:
    prompt = tiny.ids(PROMPTS[0])
    with pool.session(capacity=len(prompt) + 9) as session:
        (answer,) = generate(session, tiny.tokenizer, [prompt], max_tokens=10, ends=NO_ENDS)
        assert len(answer.tokens) == 10, "the last token needs no room: nothing follows it"
    with pool.session(capacity=len(prompt) + 8) as session:
        with pytest.raises(LimitError, match=f"{len(prompt) + 9} tokens do not fit") as caught:
            generate(session, tiny.tokenizer, [prompt], max_tokens=10, ends=NO_ENDS)
        assert caught.value.at == "silo"
        assert "--max-tokens" in caught.value.hint


def test_an_empty_prompt_is_refused_before_anything_is_sent(pool: Any, tiny: Any) -> None:
    with pool.session(rows=2) as session:
        before = len(pool.broker.passed)
        with pytest.raises(DataError, match="empty prompt"):
            generate(session, tiny.tokenizer, [[5, 6], []], max_tokens=3, ends=NO_ENDS)
        assert len(pool.broker.passed) == before


def test_a_session_goes_on_where_it_stands(pool: Any, tiny: Any) -> None:
    prompt = tiny.ids(PROMPTS[2])
    with pool.session() as session:
        session.extend([0], [prompt[:9]])
        (answer,) = generate(session, tiny.tokenizer, [prompt], max_tokens=8, ends=NO_ENDS, starts=[9])
    assert answer.tokens == tiny.greedy(prompt, 8, eos_token_id=None)
    assert [parcel.header.lengths for parcel in pool.sent()[:2]] == [(9,), (len(prompt) - 9,)]


def test_logits_are_those_of_the_whole_model(pool: Any, tiny: Any) -> None:
    ids = tiny.ids(PROMPTS[2])
    with pool.session(rows=2) as session:
        together = session.extend([1], [ids], keep=torch.arange(len(ids)))
        one_by_one = torch.cat([session.extend([0], [[token]]) for token in ids])
    torch.testing.assert_close(together, tiny.logits(ids), atol=2e-5, rtol=0)
    torch.testing.assert_close(one_by_one, tiny.logits(ids), atol=2e-5, rtol=0)
