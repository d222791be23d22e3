"""Words shared by two texts, normalised as the official SQuAD, ReCoRD and CoQA scripts do."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean

from silo_agent.tasks.item import Answered

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normal_words(text: str) -> list[str]:
    """The words of `text` in lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact(text: str, right: str) -> float:
    """1 if both have the same words in the same order, else 0."""
    return float(normal_words(text) == normal_words(right))


def overlap(text: str, right: str) -> float:
    """F1 of the words of `text` against those of `right`; of two texts without words it is 1."""
    said, wanted = normal_words(text), normal_words(right)
    if not said or not wanted:
        return float(said == wanted)
    same = (Counter(said) & Counter(wanted)).total()
    return 2 * same / (len(said) + len(wanted))


def best_match(answers: Sequence[Answered]) -> dict[str, float]:
    """ReCoRD's and SQuAD's: the best of all right answers counts; mean over the questions."""

    def mean(measure: Callable[[str, str], float]) -> float:
        return fmean(max(measure(a.text, right) for right in a.item.right) for a in answers)

    return {"f1": mean(overlap), "em": mean(exact)}


def human_match(answers: Sequence[Answered]) -> dict[str, float]:
    """CoQA's: as `best_match`, but of several right answers each is left out once.

    So a model meets as many answers as each human did, whose score is the best over the others'.
    """

    def one(measure: Callable[[str, str], float], answer: Answered) -> float:
        scores = [measure(answer.text, right) for right in answer.item.right]
        if len(scores) == 1:
            return scores[0]
        return fmean(max(scores[:at] + scores[at + 1 :]) for at in range(len(scores)))

    return {
        "f1": fmean(one(overlap, answer) for answer in answers),
        "em": fmean(one(exact, answer) for answer in answers),
    }
