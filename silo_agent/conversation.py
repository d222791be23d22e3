"""A conversation: turns that share one session row, so that earlier turns are not sent again."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from silo_agent.data import prompt_ids
from silo_agent.generation import generate
from silo_agent.sampling import Sampling
from silo_agent.session import Session


class Conversation:
    """Chat in the model's template over one session of one row."""

    def __init__(
        self,
        session: Session,
        tokenizer: PreTrainedTokenizerBase,
        ends: frozenset[int],
        sampling: Sampling,
        system: str | None = None,
    ) -> None:
        self._session, self._tokenizer, self._ends, self._sampling = session, tokenizer, ends, sampling
        self._messages = [{"role": "system", "content": system}] if system else []
        self._cached: list[int] = []

    def say(self, text: str, max_tokens: int, on_text: Callable[[str], None]) -> str:
        """Answer one turn with at most `max_tokens` tokens.

        Raises `LimitError` when the row is full; the turn is then no part of the conversation.
        """
        turn = {"role": "user", "content": text}
        prompt = prompt_ids(self._tokenizer, [*self._messages, turn], answer_next=True)
        # The last token of the prompt is always run: its logits choose the first word.
        known = min(common_prefix(self._cached, prompt), len(prompt) - 1)
        self._cached = prompt[:known]
        (answer,) = generate(
            self._session,
            self._tokenizer,
            [prompt],
            max_tokens=max_tokens,
            ends=self._ends,
            sampling=self._sampling,
            on_text=lambda _, piece: on_text(piece),
            starts=[known],
        )
        self._cached = [*prompt, *answer.tokens[:-1]]
        self._messages += [turn, {"role": "assistant", "content": answer.text}]
        return answer.text


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
