"""Generation: prompts in, text out as it comes, several prompts in one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from codec.errors import DataError
from silo_agent.sampling import Sampler, Sampling
from silo_agent.session import Session

OnText = Callable[[int, str], None]
"""Called with a row and the text that it just gained."""


@dataclass(slots=True)
class Continuation:
    """One row's answer. `reason` is `stop` (end token or stop string) or `length`."""

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
    """Continue each prompt (token ids) in its row of `session` by up to `max_tokens` tokens.

    `ends` are the model's end-of-text tokens; they are part of `tokens`, not of `text`. With
    `starts`, row i already holds the first `starts[i]` tokens of its prompt. Raises `DataError` for
    a prompt without a token to run and `LimitError` if a row outgrows the session.
    """
    sampler = Sampler(sampling or Sampling())
    answers = [Continuation() for _ in prompts]
    streams = [_Text(tokenizer, stops) for _ in prompts]
    histories = [list(prompt) for prompt in prompts]
    active = list(range(len(prompts)))
    begins = list(starts) if starts is not None else [0] * len(prompts)
    fresh: list[list[int]] = [list(prompt[begin:]) for prompt, begin in zip(prompts, begins, strict=True)]
    if not all(fresh):
        raise DataError("an empty prompt: there is nothing to continue")
    for _ in range(max_tokens):
        logits = session.extend(active, fresh, starts=begins)
        chosen = sampler.choose([histories[row] for row in active], logits)
        begins = [begin + len(part) for begin, part in zip(begins, fresh, strict=True)]
        going = []
        for row, token, begin in zip(active, chosen, begins, strict=True):
            answer = answers[row]
            answer.tokens.append(token)
            histories[row].append(token)
            text, stopped = ("", True) if token in ends else streams[row].push(token)
            _say(answer, row, text, on_text)
            if token in ends:
                _say(answer, row, streams[row].rest(), on_text)
            if stopped:
                answer.reason = "stop"
            else:
                going.append((row, token, begin))
        active, fresh, begins = [r for r, _, _ in going], [[t] for _, t, _ in going], [b for _, _, b in going]
        if not active:
            break
    for row in active:
        _say(answers[row], row, streams[row].rest(), on_text)
    return answers


def _say(answer: Continuation, row: int, text: str, on_text: OnText | None) -> None:
    answer.text += text
    if on_text is not None and text:
        on_text(row, text)
