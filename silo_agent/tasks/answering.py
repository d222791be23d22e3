"""Answers from the split model: chosen by likelihood, or written.

Questions stand in threads, one thread to a row of the session at a time: those about the same text follow
each other, and only what a question does not share with the one before it is computed and sent.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from silo_agent.conversation import common_prefix
from silo_agent.generation import generate
from silo_agent.session import Session
from silo_agent.tasks.rendering import Choices

Question = TypeVar("Question")
Answer = TypeVar("Answer")
Member = TypeVar("Member")


class Held:
    """What the rows of a session hold, so that a prompt's beginning need not be run again."""

    def __init__(self) -> None:
        self._rows: dict[int, Sequence[int]] = {}

    def begin(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """How much of prompt i row i holds; from now on it holds all of it.

        The last token is never counted: its logits are what the prompt is run for.
        """
        starts = [common_prefix(self._rows.get(row, ()), prompt) for row, prompt in enumerate(prompts)]
        self._rows |= enumerate(prompts)
        return [min(start, len(prompt) - 1) for start, prompt in zip(starts, prompts, strict=True)]


def rounds(threads: Iterable[Sequence[Member]], rows: int) -> Iterator[list[Member]]:
    """What is done together: member i of a round in row i.

    A thread's members come in order and stay in one row; only when there are fewer threads left than
    rows may one move.
    """
    waiting = (deque(thread) for thread in threads if thread)
    lanes = list(islice(waiting, rows))
    while lanes:
        yield [lane.popleft() for lane in lanes]
        lanes = [lane for lane in (lane or next(waiting, None) for lane in lanes) if lane]


def likelihoods(session: Session, questions: Sequence[Choices], held: Held) -> list[list[tuple[float, int]]]:
    """For each question's candidates: their words' summed log-likelihood in nats, and number of tokens.

    Question i is asked in row i: the prompts in one pass, then each row's first candidate in one pass,
    then the second. A candidate of one token needs no pass. Raises as `Session.extend` does.
    """
    prompts = [question.prompt for question in questions]
    starts = held.begin(prompts)
    fresh = [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
    first = _log_softmax(session.extend(range(len(prompts)), fresh, starts=starts))
    found: list[list[tuple[float, int]]] = [[] for _ in questions]
    for number in range(max(len(question.continuations) for question in questions)):
        rows = [row for row, question in enumerate(questions) if number < len(question.continuations)]
        tokens = [questions[row].continuations[number] for row in rows]
        ahead = iter(_continued(session, rows, tokens, [len(prompts[row]) for row in rows]))
        for row, continuation in zip(rows, tokens, strict=True):
            known = [first[row], *islice(ahead, len(continuation) - 1)]
            parts = [
                float(logs[token])
                for logs, token, scored in zip(
                    known, continuation, questions[row].scored[number], strict=True
                )
                if scored
            ]
            found[row].append((sum(parts), len(parts)))
    return found


def choose(
    session: Session,
    threads: Sequence[Sequence[Choices]],
    *,
    rows: int,
    per_token: bool,
    progress: Callable[[int], None],
) -> list[list[int]]:
    """For each thread's questions the number of the likeliest candidate, the first of equals."""

    def together(questions: Sequence[Choices], held: Held) -> list[int]:
        scores = [
            [total / tokens if per_token else total for total, tokens in found]
            for found in likelihoods(session, questions, held)
        ]
        return [max(range(len(found)), key=found.__getitem__) for found in scores]

    return _answered(threads, rows, together, progress)


def write(
    session: Session,
    tokenizer: PreTrainedTokenizerBase,
    threads: Sequence[Sequence[Sequence[int]]],
    *,
    rows: int,
    new_tokens: int,
    ends: frozenset[int],
    progress: Callable[[int], None],
) -> list[list[str]]:
    """For each thread's prompts the model's greedy answer of at most `new_tokens` tokens."""

    def together(prompts: Sequence[Sequence[int]], held: Held) -> list[str]:
        starts = held.begin(prompts)
        answers = generate(session, tokenizer, prompts, max_tokens=new_tokens, ends=ends, starts=starts)
        return [answer.text.strip() for answer in answers]

    return _answered(threads, rows, together, progress)


def _answered(
    threads: Sequence[Sequence[Question]],
    rows: int,
    together: Callable[[Sequence[Question], Held], list[Answer]],
    progress: Callable[[int], None],
) -> list[list[Answer]]:
    """Every question's answer in its place, whatever the order they were asked in."""
    answers: list[list[Answer]] = [[] for _ in threads]
    held = Held()
    numbered = [[(number, question) for question in thread] for number, thread in enumerate(threads)]
    for part in rounds(numbered, rows):
        found = together([question for _, question in part], held)
        for (number, _), answer in zip(part, found, strict=True):
            answers[number].append(answer)
        progress(len(part))
    return answers


def _continued(
    session: Session, rows: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]
) -> Tensor:
    """Log-probabilities `[T, vocabulary]` behind all tokens but each row's last, rows in turn."""
    run = [at for at, part in enumerate(tokens) if len(part) > 1]
    if not run:
        return torch.empty(0, 0)
    parts = [tokens[at][:-1] for at in run]
    keep = torch.arange(sum(map(len, parts)))
    logits = session.extend([rows[at] for at in run], parts, starts=[starts[at] for at in run], keep=keep)
    return _log_softmax(logits)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.float().cpu().log_softmax(-1)
