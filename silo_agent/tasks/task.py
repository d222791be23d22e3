"""What a task is, and all tasks by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from codec.errors import UsageError
from silo_agent.tasks import conversations, labels, superglue
from silo_agent.tasks.item import Item, Metric
from silo_agent.tasks.own import load_template, own_reader
from silo_agent.tasks.records import Record
from silo_agent.tasks.rouge import rouge
from silo_agent.tasks.summaries import xsum
from silo_agent.tasks.words import best_match, human_match


@dataclass(frozen=True, slots=True)
class Task:
    """How records become questions, and how answers are scored.

    Answers are chosen among the items' candidates, or written with up to `new_tokens` tokens. Among
    candidates that are sentences or names, `per_token` likelihoods are compared, since a sum favours the
    short. Items of a `dialogue` are turns of one conversation, and are learned in one piece. `hub` is
    the set's place there, and its configuration.
    """

    read: Callable[[Record], list[Item]]
    score: Metric | None = None
    new_tokens: int = 0
    per_token: bool = False
    dialogue: bool = False
    hub: tuple[str, ...] = ()

    def learned(self, thread: Sequence[Item]) -> list[Item]:
        """The items to learn from those of a record: all, or each dialogue's last, which has the others."""
        if not self.dialogue:
            return list(thread)
        ends = [not item.earlier for item in thread[1:]] + [True]
        return [item for item, end in zip(thread, ends, strict=True) if end]


_GLUE = "aps/super_glue"
_TASKS = {
    "boolq": Task(superglue.boolq, labels.accuracy, hub=(_GLUE, "boolq")),
    "cb": Task(superglue.cb, labels.accuracy_and_macro_f1, hub=(_GLUE, "cb")),
    "copa": Task(superglue.copa, labels.accuracy, per_token=True, hub=(_GLUE, "copa")),
    "multirc": Task(superglue.multirc, labels.multirc, hub=(_GLUE, "multirc")),
    "record": Task(superglue.record_cloze, best_match, per_token=True, hub=(_GLUE, "record")),
    "rte": Task(superglue.rte, labels.accuracy, hub=(_GLUE, "rte")),
    "wic": Task(superglue.wic, labels.accuracy, hub=(_GLUE, "wic")),
    "wsc": Task(superglue.wsc, labels.accuracy, hub=(_GLUE, "wsc.fixed")),
    "coqa": Task(conversations.coqa, human_match, new_tokens=32, dialogue=True, hub=("stanfordnlp/coqa",)),
    "quac": Task(conversations.quac, human_match, new_tokens=48, dialogue=True, hub=("allenai/quac",)),
    "xsum": Task(xsum, rouge, new_tokens=64, hub=("EdinburghNLP/xsum",)),
}
NAMES = ("chat", "jsonl", *_TASKS)
"""All tasks. `chat` is read by `silo_agent.data`; it and `jsonl` are scored by their loss."""


def find_task(name: str, template: str | None, answer_field: str) -> Task | None:
    """The task `name`; None is `chat`, which has conversations instead of items.

    Raises `UsageError` for a template that is missing or would not be used, and `DataError`.
    """
    if name == "jsonl":
        if template is None:
            raise UsageError(
                "--task jsonl needs to know the prompt", hint="Give --template 'Translate: {source}'."
            )
        return Task(own_reader(load_template(template), answer_field))
    if template is not None:
        raise UsageError(f"--task {name} has its own prompt", hint="--template goes with --task jsonl.")
    return _TASKS.get(name)
