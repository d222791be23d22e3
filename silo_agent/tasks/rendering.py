"""From words to token ids: items in a chat template, shortened until they fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from codec.errors import DataError
from silo_agent.data import candidate_of, encode, example_of, prompt_ids
from silo_agent.microbatch import Example
from silo_agent.tasks.item import Item

T = TypeVar("T")

LLAMA2 = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}"
    "{{ bos_token }}[INST] {% if loop.index0 == 1 and messages[0].role == 'system' %}"
    "<<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n{% endif %}{{ message.content | trim }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content | trim }} {{ eos_token }}"
    "{% endif %}{% endfor %}"
)
"""Llama 2's own format, which the paper uses for every task; a chat template as transformers take it."""
TEMPLATES = {"model": None, "llama2": LLAMA2}


@dataclass(frozen=True, slots=True)
class Choices:
    """A question as tokens: what all candidates begin with, and how each goes on.

    `scored[c][t]` says whether token t of continuation c belongs to the candidate's own words.
    """

    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    scored: tuple[tuple[bool, ...], ...]

    @property
    def longest(self) -> int:
        """Tokens of the prompt with the longest continuation."""
        return len(self.prompt) + max(map(len, self.continuations))


@dataclass(frozen=True, slots=True)
class Rendering:
    """How items become tokens: up to `limit` of them, in `template` or the model's own.

    Every method shortens an item's context if need be, and raises `DataError` naming the item's place if
    that is not enough or the template refuses it.
    """

    tokenizer: PreTrainedTokenizerBase
    limit: int
    template: str | None = None

    def example(self, item: Item, *, everything: bool = False) -> Example:
        """The item with its answer: all turns' answers are learned, or `everything`."""

        def render(context: str) -> Example:
            messages = item.messages(context, item.answer)
            return example_of(self.tokenizer, messages, everything=everything, template=self.template)

        return self._fitted(item, render, lambda example: len(example.ids))

    def prompt(self, item: Item) -> list[int]:
        """The item up to where the answer begins."""

        def render(context: str) -> list[int]:
            messages = item.messages(context)
            return prompt_ids(self.tokenizer, messages, answer_next=True, template=self.template)

        return self._fitted(item, render, len)

    def choices(self, item: Item) -> Choices:
        """The item with each of its candidates for an answer."""

        def render(context: str) -> Choices:
            return _choices(
                [
                    candidate_of(self.tokenizer, item.messages(context, words), template=self.template)
                    for words in item.candidates
                ]
            )

        return self._fitted(item, render, lambda choices: choices.longest)

    def _fitted(self, item: Item, render: Callable[[str], T], size: Callable[[T], int]) -> T:
        context = item.context
        try:
            while (over := size(made := render(context)) - self.limit) > 0:
                if not context:
                    raise DataError(
                        f"no room for question and answer in {self.limit} tokens", hint="Raise --max-length."
                    )
                context = self._shortened(context, over)
        except DataError as error:
            raise DataError(f"{item.where}: {error.what}", hint=error.hint) from None
        return made

    def _shortened(self, context: str, tokens: int) -> str:
        ends = [end for _, end in encode(self.tokenizer, context, special=False)["offset_mapping"]]
        kept = len(ends) - tokens
        # A character of several tokens ends where it began, and something must go.
        return context[: min(ends[kept - 1], len(context) - 1)].rstrip() if kept > 0 else ""


def _choices(candidates: Sequence[Example]) -> Choices:
    """Split off what all candidates share. Raises `DataError` for a candidate without a token."""
    if not all(any(candidate.answer) for candidate in candidates):
        raise DataError("an answer to choose from has no words")
    # Up to the first word of an answer at most: the logits before it are needed.
    shared = min(candidate.answer.index(True) for candidate in candidates)
    columns = zip(*(candidate.ids[:shared] for candidate in candidates), strict=True)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    stops = [len(c.answer) - c.answer[::-1].index(True) for c in candidates]
    pairs = list(zip(candidates, stops, strict=True))
    return Choices(
        prompt=candidates[0].ids[:shared],
        continuations=tuple(candidate.ids[shared:stop] for candidate, stop in pairs),
        scored=tuple(candidate.answer[shared:stop] for candidate, stop in pairs),
    )
