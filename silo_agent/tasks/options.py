"""The options that say which task, on which data."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click

from codec.errors import DataError, UsageError
from silo_agent.options import gathered
from silo_agent.tasks.item import Item
from silo_agent.tasks.source import Split, find_file, read_threads
from silo_agent.tasks.task import NAMES, Task, find_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from silo_agent.microbatch import Example
    from silo_agent.tasks.rendering import Rendering

_COUNT = click.IntRange(min=1)
_OPTIONS = [
    click.option("--task", "task_name", type=click.Choice(NAMES), default="chat", show_default=True),
    click.option(
        "--data", required=True, help="The task's official file, a directory with it, or hub[:OWNER/NAME]."
    ),
    click.option("--template", help="Prompt of `jsonl`, with {field} names, or a file that holds it."),
    click.option(
        "--answer-field", default="answer", show_default=True, help="The field with the answer, for `jsonl`."
    ),
    click.option(
        "--prompt",
        type=click.Choice(["model", "llama2"]),
        default="model",
        show_default=True,
        help="The model's own chat template, or Llama 2's [INST].",
    ),
    click.option("--limit", type=_COUNT, help="Use only the first records of the data."),
    click.option(
        "--max-length",
        default=1024,
        show_default=True,
        type=_COUNT,
        help="Tokens of an example; a task's long text is shortened to fit, a conversation is cut.",
    ),
]


@dataclass(frozen=True, slots=True)
class DataOptions:
    """The options as given; every method raises `DataError` or `UsageError` for what cannot be."""

    task_name: str
    data: str
    template: str | None
    answer_field: str
    prompt: str
    limit: int | None
    max_length: int

    def task(self, new_tokens: int | None = None) -> Task | None:
        """The task, whose written answers have up to `new_tokens` tokens if given; None is `chat`."""
        task = find_task(self.task_name, self.template, self.answer_field)
        if new_tokens is None:
            return task
        if task is None or not task.new_tokens:
            raise UsageError(f"--task {self.task_name} writes no answers", hint="Leave out --max-new-tokens.")
        return replace(task, new_tokens=new_tokens)

    def threads(self, task: Task, split: Split) -> list[list[Item]]:
        """The items of `split`, those of a record together."""
        threads = list(read_threads(task, self.data, split, self.limit))
        if not threads:
            raise DataError(f"{self.data} holds nothing to ask")
        return threads

    def rendering(self, tokenizer: "PreTrainedTokenizerBase") -> "Rendering":
        """How items become tokens."""
        from silo_agent.tasks.rendering import TEMPLATES, Rendering

        return Rendering(tokenizer, self.max_length, TEMPLATES[self.prompt])

    def examples(
        self, tokenizer: "PreTrainedTokenizerBase", split: Split, *, everything: bool = False
    ) -> "list[Example]":
        """What is to be learned: an example an item, or one a dialogue with all its answers."""
        rendering, task = self.rendering(tokenizer), self.task()
        if task is not None:
            items = [item for thread in self.threads(task, split) for item in task.learned(thread)]
            return [rendering.example(item, everything=everything) for item in items]

        from silo_agent.data import chat_examples

        return chat_examples(
            find_file(self.data, split),
            tokenizer,
            max_tokens=self.max_length,
            everything=everything,
            template=rendering.template,
            limit=self.limit,
        )


data_options = gathered("data", DataOptions, _OPTIONS)
"""Add these options to a command; it gets them as one `DataOptions` named `data`."""
