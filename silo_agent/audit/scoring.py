"""How much of the silo's text a guess has."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from silo_agent.audit.attack import NO_GUESS, About
from silo_agent.microbatch import Example
from silo_agent.tasks.item import Answered, Item
from silo_agent.tasks.rouge import rouge

_ENDS = (".", "!", "?", "\n")


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of 1. `token_recovery` is of the `tokens` looked for, `precision` of those guessed."""

    token_recovery: float
    precision: float
    rouge1: float
    rouge2: float
    rougeL: float  # noqa: N815  # its name
    exact_sentences: float
    tokens: int


def score(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    guesses: Sequence[Tensor],
    *,
    about: About,
    begin: int,
) -> Score:
    """Compare guesses with the texts, from position `begin` on: what all texts share is no secret.

    About `labels` only the learned tokens are looked for.
    """
    right = guessed = tokens = exact = sentences = 0
    answers = []
    for example, guess in zip(examples, guesses, strict=True):
        places = looked_for(example, about, begin)
        said = guess.tolist()
        hits = [said[at] == example.ids[at] for at in places]
        right, tokens = right + sum(hits), tokens + len(places)
        guessed += sum(token != NO_GUESS for token in said[begin:])
        truth = [example.ids[at] for at in places]
        for first, stop in sentences_of([str(tokenizer.decode([token])) for token in truth]):
            sentences, exact = sentences + 1, exact + all(hits[first:stop])
        words = tokenizer.decode([said[at] for at in places if said[at] != NO_GUESS])
        answers.append(Answered(Item("", "", answer=str(tokenizer.decode(truth))), str(words)))
    return Score(
        token_recovery=right / max(1, tokens),
        precision=right / max(1, guessed),
        exact_sentences=exact / max(1, sentences),
        tokens=tokens,
        **rouge(answers),
    )


def looked_for(example: Example, about: About, begin: int) -> list[int]:
    """The positions that count. A text's first token is not learned: nothing stands before it."""
    if about == "text":
        return list(range(begin, len(example.ids)))
    return [at for at in range(max(begin, 1), len(example.ids)) if example.answer[at]]


def sentences_of(pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Where the sentences of a text in pieces begin and stop; each ends with a piece that says so."""
    stops = [at for at, piece in enumerate(pieces, 1) if piece.rstrip(" ").endswith(_ENDS)]
    if pieces and (not stops or stops[-1] != len(pieces)):
        stops.append(len(pieces))
    return list(zip([0, *stops], stops, strict=False))
