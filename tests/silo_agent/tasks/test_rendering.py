"""Token ids of items: the same words in every form, shortened where they do not fit."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec.errors import DataError
from silo_agent.tasks.item import Item
from silo_agent.tasks.rendering import LLAMA2, Rendering

ITEM = Item(
    "f, line 1",
    "And why?",
    "Because it rained.",
    context="The street was wet. " * 30,
    earlier=(("What was wet?", "The street."),),
)
CLOZE = Item("f, line 2", "Is it so?", "Yes", context="It is.", candidates=("No", "Yes", "Yes and no"))


def words(tokenizer: Any, ids: Any, marks: Any) -> str:
    return str(tokenizer.decode([token for token, mark in zip(ids, marks, strict=True) if mark]))


@pytest.mark.parametrize("template", [None, LLAMA2])
def test_what_is_learned_continues_what_is_asked(tiny: Any, template: str | None) -> None:
    rendering = Rendering(tiny.tokenizer, 1024, template)
    example = rendering.example(ITEM)
    learned = words(tiny.tokenizer, example.ids, example.answer)
    assert "The street." in learned
    assert learned.count("Because it rained.") == 1
    assert "wet?" not in learned
    prompt = rendering.prompt(ITEM)
    last = learned.index("Because") - 1 if template else learned.index("Because")
    assert list(example.ids[: len(prompt)]) == prompt
    rest = tiny.tokenizer.decode(example.ids[len(prompt) :])
    assert rest.strip() == learned[last:].strip()
    assert all(rendering.example(ITEM, everything=True).answer)


def test_llama2s_template_is_metas(tiny: Any) -> None:
    """`<s>[INST] <<SYS>>…<</SYS>> question [/INST] answer </s>`, each pair with its own ends."""
    first, end = tiny.tokenizer.bos_token, tiny.tokenizer.eos_token
    item = Item("f", "Q2", "A2", context="C", earlier=(("Q1", "A1"),))
    rendering = Rendering(tiny.tokenizer, 1024, LLAMA2)
    text = tiny.tokenizer.decode(rendering.example(item).ids)
    assert text == f"{first}[INST] C\n\nQ1 [/INST] A1 {end}{first}[INST] Q2 [/INST] A2 {end}"
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    said = tiny.tokenizer.apply_chat_template(messages, chat_template=LLAMA2, tokenize=False)
    assert said == f"{first}[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]"


@pytest.mark.parametrize("template", [None, LLAMA2])
def test_candidates_share_their_prompt_and_score_their_own_words(tiny: Any, template: str | None) -> None:
    rendering = Rendering(tiny.tokenizer, 1024, template)
    choices = rendering.choices(CLOZE)
    for candidate, rest, scored in zip(CLOZE.candidates, choices.continuations, choices.scored, strict=True):
        assert words(tiny.tokenizer, rest, scored).strip() == candidate
        whole = rendering.example(Item("f", CLOZE.question, candidate, context=CLOZE.context)).ids
        assert (*choices.prompt, *rest) == whole[: len(choices.prompt) + len(rest)]
    assert len({rest[0] for rest in choices.continuations}) > 1 or len(choices.prompt) == len(
        rendering.prompt(CLOZE)
    )
    assert choices.longest == len(choices.prompt) + max(map(len, choices.continuations))


@given(limit=st.integers(60, 200))
@pytest.mark.parametrize("context", ["The street was wet. " * 60, "🙂東京é " * 90, "x" * 3000])
def test_only_the_context_is_shortened_and_no_more_than_needed(tiny: Any, context: str, limit: int) -> None:
    item = Item("f", "And why?", "Because it rained.", context=context)
    short = Rendering(tiny.tokenizer, limit)
    example = short.example(item)
    # A character may be several tokens, and a word that is cut may be more tokens than before.
    assert limit - 20 < len(example.ids) <= limit
    text = tiny.tokenizer.decode(example.ids)
    assert "\n\nAnd why?" in text
    assert words(tiny.tokenizer, example.ids, example.answer).startswith("Because it rained.")
    assert len(short.prompt(item)) <= limit


def test_what_cannot_fit_is_told_by_its_place(tiny: Any) -> None:
    for render in (Rendering(tiny.tokenizer, 20).example, Rendering(tiny.tokenizer, 20).prompt):
        with pytest.raises(DataError, match=r"f, line 1: no room .* in 20 tokens") as caught:
            render(ITEM)
        assert "--max-length" in caught.value.hint
    with pytest.raises(DataError, match="f, line 2: no room"):
        Rendering(tiny.tokenizer, 20).choices(CLOZE)


def test_text_that_is_none_and_empty_candidates(tiny: Any) -> None:
    rendering = Rendering(tiny.tokenizer, 1024)
    with pytest.raises(DataError, match="f, line 3: not text"):
        rendering.prompt(Item("f, line 3", "\ud800", "x"))
    with pytest.raises(DataError, match="f, line 3: an answer to choose from has no words"):
        rendering.choices(Item("f, line 3", "?", "x", candidates=("x", " ")))
