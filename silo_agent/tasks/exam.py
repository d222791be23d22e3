"""The split model put to a task: all questions asked, through one session."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from silo_agent.evaluation import Score, evaluate
from silo_agent.microbatch import Example
from silo_agent.session import Session
from silo_agent.tasks.answering import choose, write
from silo_agent.tasks.item import Answered, Item
from silo_agent.tasks.rendering import Rendering
from silo_agent.tasks.task import Task


@dataclass(frozen=True, slots=True)
class Exam:
    """Asks `rows` questions at a time.

    `open_session` opens a session of so many rows of so many tokens; `progress` is told how many more
    questions are done. Every method renders before it asks, and raises what a session raises.
    """

    open_session: Callable[[int, int], Session]
    rows: int
    progress: Callable[[int], None]

    def answers(
        self, task: Task, threads: Sequence[Sequence[Item]], rendering: Rendering, ends: frozenset[int]
    ) -> list[Answered]:
        """Every item's answer, in the items' order: chosen, or written if the task has `new_tokens`.

        `ends` are the model's end-of-text tokens. Raises `DataError`.
        """
        if task.new_tokens:
            texts = self._written(task, threads, rendering, ends)
        else:
            texts = self._chosen(task, threads, rendering)
        pairs = zip(threads, texts, strict=True)
        return [Answered(*pair) for thread, found in pairs for pair in zip(thread, found, strict=True)]

    def loss(self, examples: Sequence[Example]) -> Score:
        """How well the examples' answers are predicted."""
        with self.open_session(self.rows, max(len(example.ids) for example in examples)) as session:
            return evaluate(session, examples, rows=self.rows, progress=self.progress)

    def _chosen(self, task: Task, threads: Sequence[Sequence[Item]], rendering: Rendering) -> list[list[str]]:
        asked = [[rendering.choices(item) for item in thread] for thread in threads]
        capacity = max(choices.longest for thread in asked for choices in thread)
        with self.open_session(self.rows, capacity) as session:
            found = choose(session, asked, rows=self.rows, per_token=task.per_token, progress=self.progress)
        pairs = zip(threads, found, strict=True)
        return [
            [item.candidates[number] for item, number in zip(thread, numbers, strict=True)]
            for thread, numbers in pairs
        ]

    def _written(
        self, task: Task, threads: Sequence[Sequence[Item]], rendering: Rendering, ends: frozenset[int]
    ) -> list[list[str]]:
        asked = [[rendering.prompt(item) for item in thread] for thread in threads]
        capacity = max(len(prompt) for thread in asked for prompt in thread) + task.new_tokens
        with self.open_session(self.rows, capacity) as session:
            return write(
                session,
                rendering.tokenizer,
                asked,
                rows=self.rows,
                new_tokens=task.new_tokens,
                ends=ends,
                progress=self.progress,
            )
