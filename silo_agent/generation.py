"""Generation: prompts in, text out as it comes, several prompts in one batch."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from codec.errors import DataError
from silo_agent.sampling import Sampler, Sampling
from silo_agent.session import Session

OnText = Callable[[int, str], None]
"""Called with a prompt's index and the text that was just added to it."""


@dataclass(slots=True)
class Continuation:
    """One prompt's answer. `reason` is `stop` (end token or stop string) or `length`."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: str = "length"


class _Text:
    """Turns tokens to text as they come, and holds back what may begin a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self._part: list[int] = []

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string ended it."""
        self._part.append(token)
        if text := self._stream.step(self._backend, token):
            self._held += text
            self._part.clear()
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            return self._held[: min(found)], True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready, False

    def rest(self) -> str:
        """What was held back, once no more tokens come; a character left incomplete becomes �."""
        return self._held + str(self._backend.decode(self._part, skip_special_tokens=True))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class _Writing:
    """A prompt that is being continued: what its row must run next, and what it has become."""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        begin: int,
        answer: Continuation,
        text: _Text,
        on_text: OnText | None,
    ) -> None:
        self._index, self._answer, self._text, self._on_text = index, answer, text, on_text
        self.history = list(prompt)
        self.begin = begin

    @property
    def fresh(self) -> list[int]:
        """Tokens that the row does not hold yet, the first at position `begin`."""
        return self.history[self.begin :]

    def take(self, token: int, ends: frozenset[int], max_tokens: int) -> bool:
        """The next token was chosen; whether it was the last."""
        self.begin = len(self.history)
        self.history.append(token)
        self._answer.tokens.append(token)
        ended = token in ends
        text, stopped = ("", False) if ended else self._text.push(token)
        over = ended or stopped or len(self._answer.tokens) == max_tokens
        self._say(text)
        if over and not stopped:
            self._say(self._text.rest())
        if ended or stopped:
            self._answer.reason = "stop"
        return over

    def _say(self, text: str) -> None:
        self._answer.text += text
        if self._on_text is not None and text:
            self._on_text(self._index, text)


def generate(
    session: Session,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    ends: frozenset[int],
    sampling: Sampling | None = None,
    stops: Sequence[str] = (),
    on_text: OnText | None = None,
    starts: Sequence[int] | None = None,
) -> list[Continuation]:
    """Continue each prompt (token ids) by up to `max_tokens` tokens, in the rows of `session`.

    The rows go on together. Of more prompts than rows, each next one takes the first row that is free.
    `ends` are the model's end-of-text tokens; they are part of `tokens`, not of `text`. With
    `starts`, row i already holds the first `starts[i]` tokens of prompt i. Raises `DataError` for
    a prompt without a token to run and `LimitError` if a row outgrows the session.
    """
    sampler = Sampler(sampling or Sampling())
    answers = [Continuation() for _ in prompts]
    begins = starts if starts is not None else [0] * len(prompts)
    waiting = deque(
        _Writing(index, prompt, begin, answers[index], _Text(tokenizer, stops), on_text)
        for index, (prompt, begin) in enumerate(zip(prompts, begins, strict=True))
    )
    if not all(writing.fresh for writing in waiting):
        raise DataError("an empty prompt: there is nothing to continue")
    active: dict[int, _Writing] = {}
    while max_tokens and (waiting or active):
        for row in range(session.rows):
            if waiting and row not in active:
                active[row] = waiting.popleft()
        rows = sorted(active)
        going = [active[row] for row in rows]
        logits = session.extend(rows, [each.fresh for each in going], starts=[each.begin for each in going])
        chosen = sampler.choose([each.history for each in going], logits)
        for row, token in zip(rows, chosen, strict=True):
            if active[row].take(token, ends, max_tokens):
                del active[row]
    return answers
