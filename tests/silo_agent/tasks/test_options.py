"""Which task on which data: what is learned, and combinations that cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest

from codec.errors import DataError, UsageError
from silo_agent.data import chat_examples
from silo_agent.tasks.options import DataOptions
from silo_agent.tasks.rendering import LLAMA2


def options(name: str, data: Path, **given: Any) -> DataOptions:
    usual = {"template": None, "answer_field": "answer", "prompt": "model", "limit": None}
    return DataOptions(task_name=name, data=str(data), **{**usual, "max_length": 512, **given})


def learned(tokenizer: Any, example: Any) -> str:
    pairs = zip(example.ids, example.answer, strict=True)
    return str(tokenizer.decode([token for token, answer in pairs if answer]))


def test_chat_is_read_as_ever(tiny: Any, clinics: list[Path]) -> None:
    given = options("chat", clinics[0], limit=3)
    assert given.examples(tiny.tokenizer, "train") == chat_examples(
        clinics[0], tiny.tokenizer, max_tokens=512, limit=3
    )
    (example, *_) = options("chat", clinics[0], prompt="llama2").examples(tiny.tokenizer, "train")
    text = tiny.tokenizer.decode(example.ids)
    assert text.startswith(f"{tiny.tokenizer.bos_token}[INST] Summarise")
    assert example == chat_examples(clinics[0], tiny.tokenizer, max_tokens=512, template=LLAMA2)[0]


def test_own_fields_through_a_template(tiny: Any, tmp_path: Path) -> None:
    path, template = tmp_path / "d.jsonl", tmp_path / "prompt.txt"
    rows = [{"source": "Guten Tag", "n": 3, "target": "Good day"}, {"source": "{n}", "n": 4, "target": 7}]
    path.write_text("\n".join(map(json.dumps, rows)))
    text = "Translate into {language}: {source} ({n}) {{x y}}"
    template.write_text(f"{text.replace('{language}', 'English')}\n")
    for given in (str(template), text.replace("{language}", "English")):
        own = options("jsonl", path, template=given, answer_field="target")
        first, second = own.examples(tiny.tokenizer, "train")
        assert "Translate into English: Guten Tag (3) {{x y}}<" in tiny.tokenizer.decode(first.ids)
        # What a field holds is not filled in again.
        assert "Translate into English: {n} (4) {{x y}}<" in tiny.tokenizer.decode(second.ids)
        assert learned(tiny.tokenizer, first) == "Good day<|im_end|>"
        assert learned(tiny.tokenizer, second) == "7<|im_end|>"
    for broken, why in {text: 'no "language"', "{source.__class__}": "names no field"}.items():
        with pytest.raises((DataError, UsageError), match=why):
            options("jsonl", path, template=broken).examples(tiny.tokenizer, "train")
    with pytest.raises(DataError, match=r"d\.jsonl, line 1: no \"answer\""):
        options("jsonl", path, template="{source}").examples(tiny.tokenizer, "train")
    template.write_bytes(b"\xff")
    with pytest.raises(DataError, match="cannot be read"):
        options("jsonl", path, template=str(template)).task()


def test_the_answer_is_learned_or_everything(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"document": "It rained all day. " * 300, "summary": "Rain."}))
    (example,) = options("xsum", path).examples(tiny.tokenizer, "train")
    assert learned(tiny.tokenizer, example) == "Rain.<|im_end|>"
    assert len(example.ids) <= 512
    (example,) = options("xsum", path).examples(tiny.tokenizer, "train", everything=True)
    assert all(example.answer)


@pytest.mark.parametrize("name", ["multirc", "coqa"])
def test_real_data_is_learned(tiny: Any, real: Path, name: str) -> None:
    place, count, expected = {
        "multirc": ("superglue/MultiRC", 7, "Yes<|im_end|>"),
        "coqa": ("coqa/sample.json", 1, "white<|im_end|>in a barn<|im_end|>"),
    }[name]
    given = options(name, real / place, limit=1, max_length=1500)
    examples = given.examples(tiny.tokenizer, "train")
    assert len(examples) == count
    assert any(expected in learned(tiny.tokenizer, example) for example in examples)


@pytest.mark.parametrize(
    ("name", "given", "why"),
    [
        ("jsonl", {}, "needs to know the prompt"),
        ("boolq", {"template": "{question}"}, "has its own prompt"),
        ("chat", {"template": "{question}"}, "has its own prompt"),
    ],
)
def test_a_template_goes_with_jsonl_alone(tmp_path: Path, name: str, given: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        options(name, tmp_path, **given).task()


@pytest.mark.parametrize("name", ["boolq", "chat"])
def test_only_written_answers_have_a_length(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="writes no answers"):
        options(name, tmp_path).task(9)
    task = options("xsum", tmp_path).task(9)
    assert task is not None
    assert task.new_tokens == 9


def test_a_file_without_a_record(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds nothing to ask"):
        options("boolq", tmp_path / "d.jsonl").examples(tiny.tokenizer, "train")
