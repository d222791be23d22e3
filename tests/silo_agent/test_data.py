"""Which words of a conversation are learned: the mask against the text itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from codec.errors import DataError
from silo_agent.data import chat_examples, prompt_ids, read_chats, text_ids
from silo_agent.microbatch import Example

END = "<|im_end|>"


def write(path: Path, *conversations: list[tuple[str, str]]) -> Path:
    lines = [
        json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})
        for turns in conversations
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def learned(tokenizer: Any, example: Example) -> list[str]:
    """The text of every unbroken stretch of learned tokens."""
    stretches: list[list[int]] = [[]]
    for token, answer in zip(example.ids, example.answer, strict=True):
        if answer:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(ids) for ids in stretches if ids]


def test_the_demos_data_is_masked_to_the_answers(tiny: Any, clinics: list[Path]) -> None:
    assert len(clinics) == 2
    for path in clinics:
        chats = [messages for _, messages in read_chats(path)]
        examples = chat_examples(path, tiny.tokenizer, max_tokens=1024)
        assert len(examples) == len(chats) > 20
        for messages, example in zip(chats, examples, strict=True):
            assert learned(tiny.tokenizer, example) == [messages[-1]["content"] + END]
            # What is trained on is what generation will send as its prompt.
            assert list(example.ids) == prompt_ids(tiny.tokenizer, messages, answer_next=False)
            prompt = prompt_ids(tiny.tokenizer, messages[:-1], answer_next=True)
            assert list(example.ids[: example.answer.index(True)]) == prompt


@pytest.mark.parametrize(
    "answers",
    [
        ["plain"],
        ["first", "second", "third"],
        ["  leading and trailing  "],
        ["\n\nlines\n", "\n"],
        [""],
        ["été 東京 🙂", "🙂🙂"],
        ["the same words", "the same words"],
        ["user", "<|im_start|>assistant\nnot the template's own"],
    ],
)
def test_several_turns_of_every_kind_of_text(tiny: Any, tmp_path: Path, answers: list[str]) -> None:
    turns = [("system", "Be brief.")]
    for answer in answers:
        turns += [("user", "What is it?"), ("assistant", answer)]
    (example,) = chat_examples(write(tmp_path / "d.jsonl", turns), tiny.tokenizer, max_tokens=1024)
    assert learned(tiny.tokenizer, example) == [answer + END for answer in answers]


def test_everything_may_be_learned(tiny: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [("user", "a question"), ("assistant", "an answer")])
    (example,) = chat_examples(path, tiny.tokenizer, max_tokens=1024, everything=True)
    assert all(example.answer)
    assert tiny.tokenizer.decode(example.ids).startswith("<|im_start|>user\na question")


def test_a_template_without_an_end_token_is_learned_to_its_line_end(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    monkeypatch.setattr(tiny.tokenizer, "chat_template", template)
    turns = [("user", "q"), ("assistant", "one two"), ("user", "q"), ("assistant", "three")]
    (example,) = chat_examples(write(tmp_path / "d.jsonl", turns), tiny.tokenizer, max_tokens=1024)
    assert learned(tiny.tokenizer, example) == [" one two\n", " three\n"]


def test_a_template_that_rewrites_earlier_turns_is_refused(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Qwen3 does, which drops the thoughts of all turns but the last."""
    template = (
        "{% for m in messages %}{{ m['role'] }}:"
        "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    monkeypatch.setattr(tiny.tokenizer, "chat_template", template)
    one = [("user", "q"), ("assistant", "a")]
    (example,) = chat_examples(write(tmp_path / "one.jsonl", one), tiny.tokenizer, max_tokens=1024)
    assert learned(tiny.tokenizer, example) == ["<think></think>a\n"]
    path = write(tmp_path / "two.jsonl", one, one + one)
    with pytest.raises(DataError, match="line 2: the chat template rewrites earlier turns"):
        chat_examples(path, tiny.tokenizer, max_tokens=1024)


def test_a_long_conversation_is_cut_at_its_end(tiny: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [("user", "a question"), ("assistant", "word " * 50)])
    (whole,) = chat_examples(path, tiny.tokenizer, max_tokens=1024)
    first = whole.answer.index(True)
    (cut,) = chat_examples(path, tiny.tokenizer, max_tokens=first + 1)
    assert (cut.ids, cut.answer) == (whole.ids[: first + 1], whole.answer[: first + 1])
    with pytest.raises(DataError, match=rf"d\.jsonl, line 1: no answer within the first {first} tokens"):
        chat_examples(path, tiny.tokenizer, max_tokens=first)


def test_a_prompts_tokens_are_those_of_the_template(tiny: Any) -> None:
    messages = [{"role": "user", "content": "Who is it? été 🙂"}]
    expected = tiny.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert prompt_ids(tiny.tokenizer, messages, answer_next=True) == expected["input_ids"]
    assert text_ids(tiny.tokenizer, "Who is it?") == tiny.tokenizer("Who is it?")["input_ids"]


def test_what_is_not_text_is_refused(tiny: Any) -> None:
    with pytest.raises(DataError, match="not text"):
        text_ids(tiny.tokenizer, "half a pair \ud800")
