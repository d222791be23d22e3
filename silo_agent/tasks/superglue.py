"""The eight SuperGLUE tasks as cloze questions, from their official JSONL files.

Wang et al. 2019 (arXiv 1905.00537). Each reader takes one record of a file.
"""

from silo_agent.tasks.item import Item
from silo_agent.tasks.labels import MAYBE, NO, YES
from silo_agent.tasks.records import Record

_YES_NO = (NO, YES)
_ENTAILS = {"entailment": YES, "contradiction": NO, "neutral": MAYBE, "not_entailment": NO}
BLANK = "____"


def boolq(record: Record) -> list[Item]:
    """A yes-or-no question about a passage."""
    question = f"{record.text('question').rstrip('? ')}? Answer Yes or No."
    return [_yes_or_no(record, question, record.flag("label"), record.text("passage"))]


def rte(record: Record) -> list[Item]:
    """Whether a text entails a sentence."""
    label = record.one_of("label", ("entailment", "not_entailment"))
    question = f'Does it follow that "{record.text("hypothesis")}"? Answer Yes or No.'
    return [_yes_or_no(record, question, label == "entailment", record.text("premise"))]


def cb(record: Record) -> list[Item]:
    """Whether a text entails a sentence, contradicts it, or neither."""
    label = record.one_of("label", ("entailment", "contradiction", "neutral"))
    question = f'Does it follow that "{record.text("hypothesis")}"? Answer Yes, No or Maybe.'
    return [
        Item(
            record.where,
            question,
            answer=_ENTAILS[label],
            context=record.text("premise"),
            candidates=(YES, NO, MAYBE),
        )
    ]


def copa(record: Record) -> list[Item]:
    """Which of two sentences is the cause or the effect of another."""
    choices = record.text("choice1"), record.text("choice2")
    asked = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}
    question = asked[record.one_of("question", tuple(asked))]
    listed = "\n".join(f"- {choice}" for choice in choices)
    answer = choices[record.one_of("label", (0, 1))]
    return [Item(record.where, f"{record.text('premise')}\n{question}\n{listed}", answer, candidates=choices)]


def wic(record: Record) -> list[Item]:
    """Whether a word has the same meaning in two sentences."""
    question = (
        f"1. {record.text('sentence1')}\n2. {record.text('sentence2')}\n"
        f'Does the word "{record.text("word")}" have the same meaning in both sentences? Answer Yes or No.'
    )
    return [_yes_or_no(record, question, record.flag("label"))]


def wsc(record: Record) -> list[Item]:
    """Whether a pronoun, marked with stars, stands for a noun."""
    target = record.part("target")
    pronoun, noun, at = target.text("span2_text"), target.text("span1_text"), target.number("span2_index")
    words = record.text("text").split()
    if not 0 <= at < len(words):
        raise record.wrong(f'"span2_index" {at} is none of the {len(words)} words of the text')
    words[at] = words[at].replace(pronoun, f"*{pronoun}*", 1)
    question = f'{" ".join(words)}\nDoes "*{pronoun}*" stand for "{noun}"? Answer Yes or No.'
    return [_yes_or_no(record, question, record.flag("label"))]


def record_cloze(record: Record) -> list[Item]:
    """Which of the entities in a passage belongs into the blank of a sentence (ReCoRD)."""
    passage = record.part("passage")
    text = passage.text("text")
    spans = [(entity.number("start"), entity.number("end")) for entity in passage.parts("entities")]
    if not all(0 <= start <= end < len(text) for start, end in spans):
        raise record.wrong("an entity is not within the passage")
    # An entity may be named more than once; the ends are part of the names.
    entities = tuple(dict.fromkeys(text[start : end + 1] for start, end in spans))
    items = []
    for asked in record.parts("qas"):
        answers = tuple(dict.fromkeys(answer.text("text") for answer in asked.parts("answers")))
        if not answers or not entities:
            raise record.wrong("a query needs an answer, and entities to choose from")
        query = asked.text("query").replace("@placeholder", BLANK)
        items.append(
            Item(
                record.where,
                f"{query}\nWhich name belongs in the place of {BLANK}?",
                answer=answers[0],
                context=text.replace("\n@highlight\n", "\n- "),
                candidates=entities,
                references=answers,
            )
        )
    return items


def multirc(record: Record) -> list[Item]:
    """Whether an answer to a question about a passage is right; any number of a question's may be."""
    passage = record.part("passage")
    items = []
    for number, asked in enumerate(passage.parts("questions"), 1):
        for answer in asked.parts("answers"):
            question = (
                f"Question: {asked.text('question')}\nAnswer: {answer.text('text')}\n"
                "Is this answer right? Answer Yes or No."
            )
            label = bool(answer.one_of("label", (0, 1)))
            group = f"{record.where}, question {number}"
            items.append(_yes_or_no(record, question, label, passage.text("text"), group))
    return items


def _yes_or_no(record: Record, question: str, label: bool, context: str = "", group: str = "") -> Item:
    answer = YES if label else NO
    return Item(record.where, question, answer, context=context, candidates=_YES_NO, group=group)
