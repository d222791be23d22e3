"""One question to the model in words, and an answer to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Item:
    """A question, and what is right.

    `context` is the text it is about; it alone is shortened, from its end, where all does not fit.
    `earlier` are the turns before it, questions with right answers. With `candidates` the answer is
    chosen from them, else it is written. `answer` is what is learned, `references` is all that counts as
    right (`answer` if empty). Items of one `group` are scored together.
    """

    where: str
    question: str
    answer: str
    context: str = ""
    earlier: tuple[tuple[str, str], ...] = ()
    candidates: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    group: str = ""

    @property
    def right(self) -> tuple[str, ...]:
        """All answers that count as right."""
        return self.references or (self.answer,)

    def messages(self, context: str, answer: str | None = None) -> list[dict[str, str]]:
        """The conversation over `context`, up to the question or to its `answer`."""
        asked = [question for question, _ in self.earlier] + [self.question]
        said = [said for _, said in self.earlier] + ([] if answer is None else [answer])
        asked[0] = f"{context}\n\n{asked[0]}" if context else asked[0]
        turns: list[dict[str, str]] = []
        for at, question in enumerate(asked):
            turns.append({"role": "user", "content": question})
            turns += [{"role": "assistant", "content": words} for words in said[at : at + 1]]
        return turns


@dataclass(frozen=True, slots=True)
class Answered:
    """An item and what the model chose or wrote."""

    item: Item
    text: str


Metric = Callable[[Sequence[Answered]], dict[str, float]]
"""Scores by name, from 0 to 1, over at least one answer."""
