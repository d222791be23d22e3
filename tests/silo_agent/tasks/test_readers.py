"""The official formats: small records by hand, and the real files whole."""

from pathlib import Path
from typing import Any

import pytest

from codec.errors import DataError
from silo_agent.tasks.conversations import coqa, quac
from silo_agent.tasks.item import Item
from silo_agent.tasks.records import Record, read_records
from silo_agent.tasks.source import read_threads
from silo_agent.tasks.task import find_task

MULTIRC = {
    "idx": 3,
    "passage": {
        "text": "Ann fed two cats.",
        "questions": [
            {
                "idx": 7,
                "question": "Who ate?",
                "answers": [{"text": "Ann", "label": 0}, {"text": "The cats", "label": 1}],
            },
            {"idx": 8, "question": "How many?", "answers": [{"text": "two", "label": 1}]},
        ],
    },
}
RECORD = {
    "passage": {
        "text": "Ann met Bob in Rome.\n@highlight\nAnn was late",
        "entities": [
            {"start": 0, "end": 2},
            {"start": 8, "end": 10},
            {"start": 15, "end": 18},
            {"start": 32, "end": 34},
        ],
    },
    "qas": [{"query": "@placeholder waited", "answers": [{"text": "Bob"}, {"text": "Bob"}], "idx": 1}],
}


def items(name: str, fields: dict[str, Any]) -> list[Item]:
    task = find_task(name, None, "answer")
    assert task is not None
    return task.read(Record("f, line 1", fields))


def test_boolq_asks_once() -> None:
    (item,) = items("boolq", {"question": "is it so ?", "passage": "It is.", "label": True})
    assert (item.context, item.question) == ("It is.", "is it so? Answer Yes or No.")
    assert (item.answer, set(item.candidates)) == ("Yes", {"Yes", "No"})


@pytest.mark.parametrize(
    ("name", "label", "answer"),
    [
        ("rte", "entailment", "Yes"),
        ("rte", "not_entailment", "No"),
        ("cb", "entailment", "Yes"),
        ("cb", "contradiction", "No"),
        ("cb", "neutral", "Maybe"),
    ],
)
def test_entailment(name: str, label: str, answer: str) -> None:
    (item,) = items(name, {"premise": "P.", "hypothesis": "H", "label": label})
    assert item.answer == answer
    assert answer in item.candidates
    assert (item.context, '"H"' in item.question) == ("P.", True)


@pytest.mark.parametrize(("asked", "words"), [("cause", "cause"), ("effect", "as a result")])
def test_copa_is_answered_by_a_sentence(asked: str, words: str) -> None:
    fields = {"premise": "It fell.", "choice1": "It was hit.", "choice2": "It flew.", "question": asked}
    (item,) = items("copa", {**fields, "label": 1})
    assert (item.candidates, item.answer) == (("It was hit.", "It flew."), "It flew.")
    assert words in item.question


def test_wic_and_wsc() -> None:
    (item,) = items("wic", {"word": "bank", "sentence1": "A.", "sentence2": "B.", "label": False})
    assert (item.answer, '"bank"' in item.question) == ("No", True)
    target = {"span1_text": "Ann", "span2_text": "she", "span1_index": 0, "span2_index": 3}
    fields = {"text": "Ann left because she, she said, was ill", "target": target, "label": True}
    (item,) = items("wsc", fields)
    assert item.question.startswith("Ann left because *she*, she said, was ill\n")
    assert '"*she*" stand for "Ann"' in item.question
    fields["target"] = {**target, "span2_index": 9}
    with pytest.raises(DataError, match='f, line 1: "span2_index" 9 is none of the 8 words'):
        items("wsc", fields)


def test_record_chooses_among_the_passages_entities() -> None:
    (item,) = items("record", RECORD)
    assert item.candidates == ("Ann", "Bob", "Rome")
    assert (item.answer, item.right) == ("Bob", ("Bob",))
    assert item.context == "Ann met Bob in Rome.\n- Ann was late"
    assert item.question.startswith("____ waited\n")


def test_multirc_asks_about_every_answer_and_knows_its_question() -> None:
    three = items("multirc", MULTIRC)
    assert [item.answer for item in three] == ["No", "Yes", "Yes"]
    assert three[0].group == three[1].group != three[2].group
    assert "Question: Who ate?\nAnswer: The cats\n" in three[1].question


STORY = {
    "id": "x",
    "story": "Cotton was white.",
    "questions": [{"input_text": "What colour?", "turn_id": 1}, {"input_text": "Sure?", "turn_id": 2}],
    "answers": [{"input_text": "white", "turn_id": 1}, {"input_text": "yes", "turn_id": 2}],
    "additional_answers": {
        "0": [{"input_text": "pure white", "turn_id": 1}, {"input_text": "Yes", "turn_id": 2}],
        "1": [{"input_text": "white", "turn_id": 1}, {"input_text": "it was", "turn_id": 2}],
    },
}


def test_coqa_has_the_turns_before_and_everybodys_answers() -> None:
    first, second = coqa(Record("f, line 9", STORY))
    assert first.references == ("white", "pure white", "white")
    assert second.references == ("yes", "Yes", "it was")
    assert (first.earlier, second.earlier) == ((), (("What colour?", "white"),))
    assert second.where == "f, line 9, turn 2"
    roles = [message["role"] for message in second.messages(second.context, second.answer)]
    assert roles == ["user", "assistant", "user", "assistant"]
    with pytest.raises(DataError, match="f, line 9: 2 questions need as many answers"):
        coqa(Record("f, line 9", {**STORY, "answers": STORY["answers"][:1]}))


def test_quacs_own_format_and_the_extracts() -> None:
    qas = [
        {"question": "who?", "answers": [{"text": "Ann"}, {"text": "Ann B"}]},
        {"question": "why?", "answers": [{"text": "CANNOTANSWER"}]},
    ]
    official = {"title": "T", "paragraphs": [{"context": "Ann B came. CANNOTANSWER", "qas": qas}]}
    extract = {
        "passage": "Ann B came.",
        "question": "question1: who?\nquestion2: why?",
        "answer": "possible answers for question1:\nAnn, Ann B\n"
        "possible answers for question2:\nCANNOTANSWER",
    }
    for fields in (official, extract):
        first, second = quac(Record("f, line 1", fields))
        assert first.references == ("Ann", "Ann B")
        assert second.references == ("CANNOTANSWER",)
        assert first.context.endswith("\n\nAnn B came.")
        assert second.earlier == (("who?", "Ann"),)
    with pytest.raises(DataError, match="f, line 1: 2 questions and 1 lists"):
        quac(Record("f, line 1", {**extract, "answer": "possible answers for question1:\nAnn"}))


def test_a_dialogue_is_learned_in_one_piece_and_others_item_by_item() -> None:
    task = find_task("coqa", None, "answer")
    assert task is not None
    dialogues = task.read(Record("f, line 1", STORY)) * 2
    assert task.learned(dialogues) == [dialogues[1], dialogues[3]]
    multirc = find_task("multirc", None, "answer")
    assert multirc is not None
    assert len(multirc.learned(multirc.read(Record("f, line 1", MULTIRC)))) == 3


GOOD: dict[str, dict[str, Any]] = {
    "boolq": {"question": "q", "passage": "p", "label": True},
    "cb": {"premise": "p", "hypothesis": "h", "label": "neutral"},
    "rte": {"premise": "p", "hypothesis": "h", "label": "entailment"},
    "copa": {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "label": 0},
    "wic": {"word": "w", "sentence1": "a", "sentence2": "b", "label": True},
    "wsc": {
        "text": "she",
        "target": {"span1_text": "x", "span2_text": "she", "span2_index": 0},
        "label": True,
    },
    "multirc": MULTIRC,
    "record": RECORD,
    "coqa": STORY,
    "xsum": {"document": "d", "summary": "s"},
}


def places(fields: Any) -> list[list[Any]]:
    """The way to every value in nested lists and objects."""
    if isinstance(fields, dict):
        return [[name, *rest] for name, value in fields.items() for rest in [[], *places(value)]]
    if isinstance(fields, list):
        return [[at, *rest] for at, value in enumerate(fields) for rest in places(value)]
    return []


def without(fields: Any, way: list[Any], value: Any) -> Any:
    """`fields` with another value at the end of `way`, or with none if it is `...`."""
    first, rest = way[0], way[1:]
    if isinstance(fields, list):
        return [without(v, rest, value) if at == first else v for at, v in enumerate(fields)]
    if rest:
        return {**fields, first: without(fields[first], rest, value)}
    kept = {name: v for name, v in fields.items() if name != first}
    return kept if value is ... else {**kept, first: value}


UNUSED = {"idx", "id", "span1_index", "turn_id", "version"}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("value", [..., None, 1.5, ["x"], 10**30])
def test_a_field_that_is_missing_or_of_another_kind_is_told_by_its_place(name: str, value: Any) -> None:
    assert items(name, GOOD[name])
    for way in places(GOOD[name]):
        if way[-1] in UNUSED or (value is ... and way[0] == "additional_answers" and len(way) < 3):
            continue
        with pytest.raises(DataError, match=r"^f, line 1"):
            items(name, without(GOOD[name], way, value))


def test_a_test_set_is_told_from_a_broken_one() -> None:
    with pytest.raises(DataError, match='no "label"') as caught:
        items("boolq", {"question": "q", "passage": "p"})
    assert "test set" in caught.value.hint


def test_a_file_of_one_document(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text('{"version": "1.0",\n "data": [\n {"a": 1},\n\n {"a": [2, "]"]}\n]\n}\n')
    assert [(r.where, r.fields) for r in read_records(path)] == [
        (f"{path}, line 3", {"a": 1}),
        (f"{path}, line 5", {"a": [2, "]"]}),
    ]
    for content, why in {
        '{"data": [{"a": 1},\n {"a": }]}': "line 2: not JSON: Expecting value at column 8",
        '{"data": [{"a": 1}': "line 1: not JSON",
        '{"data": [{"a": 1},\n3]}': "line 2: a record is a JSON object",
        '{"data": [{"a": 1},\n' + '{"a":' * 100_000: "line 2: not JSON that can be read",
        '{"items": []}': 'no "data" list',
    }.items():
        path.write_text(content)
        with pytest.raises(DataError, match=f"s.json.*{why}"):
            list(read_records(path))
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8 text"):
        list(read_records(path))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_records(tmp_path / "none.json"))


def test_a_stream_is_read_only_as_far_as_it_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text('{"document": "d", "summary": "s"}\n' * 2 + "nonsense\n")
    task = find_task("xsum", None, "answer")
    assert task is not None
    assert len(list(read_threads(task, str(path), "train", 2))) == 2
    with pytest.raises(DataError, match=r"s\.jsonl, line 3: not JSON"):
        list(read_threads(task, str(path), "train", None))


def test_a_directory_of_official_files(tmp_path: Path) -> None:
    task = find_task("xsum", None, "answer")
    assert task is not None
    for name in ("train", "val"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"document": "d", "summary": "{name}"}}\n')
    assert [thread[0].answer for thread in read_threads(task, str(tmp_path), "train", None)] == ["train"]
    assert [thread[0].answer for thread in read_threads(task, str(tmp_path), "validation", None)] == ["val"]
    (tmp_path / "val.jsonl").unlink()
    with pytest.raises(DataError, match="holds no validation file"):
        list(read_threads(task, str(tmp_path), "validation", None))


REAL = {
    "boolq": ("superglue/BoolQ", 32),
    "cb": ("superglue/CB", 32),
    "copa": ("superglue/COPA", 32),
    "multirc": ("superglue/MultiRC", 154),
    "record": ("superglue/ReCoRD", 32),
    "rte": ("superglue/RTE", 32),
    "wic": ("superglue/WiC", 32),
    "wsc": ("superglue/WSC", 32),
    "coqa": ("coqa/sample.json", 12),
    "quac": ("quac/test-tiny.jsonl", 150),
    "xsum": ("xsum/test-tiny.jsonl", 50),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_files(real: Path, name: str) -> None:
    task = find_task(name, None, "answer")
    assert task is not None
    place, count = REAL[name]
    threads = list(read_threads(task, str(real / place), "train", None))
    every = [item for thread in threads for item in thread]
    assert len(every) == count
    for item in every:
        assert item.question.strip()
        assert item.answer.strip()
        if item.candidates:
            assert set(item.right) <= set(item.candidates)
    if name == "wsc":
        assert all(item.question.count("*") >= 4 for item in every)
    if name == "quac":
        assert all(right in item.context for item in every for right in item.right)
    if name == "multirc":
        # What the set's authors count: 456 passages, 5,131 questions, 27,243 answers.
        whole = str(real / place / "train-full.jsonl")
        passages = list(read_threads(task, whole, "train", None))
        groups = {item.group for thread in passages for item in thread}
        assert (len(passages), len(groups), sum(map(len, passages))) == (456, 5131, 27243)
