"""CoQA and QuAC: questions about a text, each with all turns before it and their right answers."""

import re
from collections.abc import Iterator

from silo_agent.tasks.item import Item
from silo_agent.tasks.records import Record

_COQA = "Read the story, then answer each question in as few words as possible.\n\n"
_QUAC = "Read the text, then answer each question with words from it, or with CANNOTANSWER.\n\n"
NO_ANSWER = "CANNOTANSWER"


def coqa(record: Record) -> list[Item]:
    """A story with its turns (Reddy et al. 2019); further people's answers are references too."""
    answers = record.parts("answers")
    others = record.part("additional_answers") if "additional_answers" in record.fields else None
    more = [others.parts(name) for name in others.fields] if others else []
    questions = [question.text("input_text") for question in record.parts("questions")]
    said = [[answer.text("input_text") for answer in person] for person in (answers, *more)]
    if any(len(person) != len(questions) for person in said):
        raise record.wrong(f"{len(questions)} questions need as many answers")
    references = list(zip(*said, strict=True))
    return _turns(record.where, _COQA + record.text("story"), questions, references)


def quac(record: Record) -> list[Item]:
    """A section with its dialogues (Choi et al. 2018), or a line of a small extract (see `_extract`)."""
    if "passage" in record.fields:
        return _extract(record)
    items = []
    for paragraph in record.parts("paragraphs"):
        asked = paragraph.parts("qas")
        references = [tuple(answer.text("text") for answer in qa.parts("answers")) for qa in asked]
        text = paragraph.text("context").removesuffix(NO_ANSWER).rstrip()
        questions = [qa.text("question") for qa in asked]
        items += _turns(record.where, _QUAC + text, questions, references)
    return items


def _turns(where: str, context: str, questions: list[str], references: list[tuple[str, ...]]) -> list[Item]:
    """An item for each turn; the first reference is the answer that later turns know of."""
    turns: list[tuple[str, str]] = []
    items = []
    for number, (question, right) in enumerate(zip(questions, references, strict=True), 1):
        place = f"{where}, turn {number}"
        if not right:
            raise Record(place, {}).wrong("a question without an answer")
        items.append(Item(place, question, right[0], context, earlier=tuple(turns), references=right))
        turns.append((question, right[0]))
    return items


def _extract(record: Record) -> list[Item]:
    """QuAC as some collections of samples have it: numbered turns in two fields, beside the passage.

    All answers to a question stand one after another in one text, with nothing reliable between them.
    """
    passage = record.text("passage")
    questions = [text for _, text in re.findall(r"question(\d+): (.*)", record.text("question"))]
    parts = re.split(r"possible answers for question\d+:", record.text("answer"))[1:]
    references = [tuple(_spans(part, passage)) for part in parts]
    if not questions or len(questions) != len(references):
        raise record.wrong(f"{len(questions)} questions and {len(references)} lists of answers")
    return _turns(record.where, _QUAC + passage, questions, references)


def _spans(joined: str, passage: str) -> Iterator[str]:
    """The answers in `joined`: each is the longest beginning that the passage has too."""
    rest = joined.strip()
    while rest:
        if rest.startswith(NO_ANSWER):
            length = len(NO_ANSWER)
        else:
            length = next((n for n in range(len(rest), 0, -1) if rest[:n] in passage), len(rest))
        yield rest[:length].strip(" ,")
        rest = rest[length:].lstrip(" ,")
