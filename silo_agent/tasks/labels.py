"""Metrics of chosen answers: accuracy, macro-F1, and MultiRC's three."""

from collections.abc import Sequence
from itertools import groupby
from statistics import fmean

from silo_agent.tasks.item import Answered

YES, NO, MAYBE = "Yes", "No", "Maybe"


def accuracy(answers: Sequence[Answered]) -> dict[str, float]:
    """The share of right answers."""
    return {"accuracy": fmean(a.text == a.item.answer for a in answers)}


def accuracy_and_macro_f1(answers: Sequence[Answered]) -> dict[str, float]:
    """Accuracy, and the mean of the labels' F1 over all labels that are right or chosen somewhere (CB)."""
    labels = {a.text for a in answers} | {a.item.answer for a in answers}
    return {**accuracy(answers), "macro_f1": fmean(_f1(answers, label) for label in labels)}


def _f1(answers: Sequence[Answered], label: str) -> float:
    both = sum(a.text == a.item.answer == label for a in answers)
    chosen, right = sum(a.text == label for a in answers), sum(a.item.answer == label for a in answers)
    return 2 * both / (chosen + right)


def multirc(answers: Sequence[Answered]) -> dict[str, float]:
    """MultiRC's, as its authors define them: an answer is a positive if it is `Yes`.

    `f1a` is F1 over all answers. `f1m` is the harmonic mean of precision and recall that were each
    averaged over the questions. `em` is the share of questions with every answer right. Precision without
    a positive chosen, and recall without one that is right, are 1.
    """
    questions = [list(group) for _, group in groupby(answers, key=lambda a: a.item.group)]
    rates = [_precision_and_recall(question) for question in questions]
    return {
        "f1a": _harmonic(*_precision_and_recall(answers)),
        "f1m": _harmonic(fmean(p for p, _ in rates), fmean(r for _, r in rates)),
        "em": fmean(all(a.text == a.item.answer for a in question) for question in questions),
    }


def _precision_and_recall(answers: Sequence[Answered]) -> tuple[float, float]:
    both = sum(a.text == a.item.answer == YES for a in answers)
    chosen, right = sum(a.text == YES for a in answers), sum(a.item.answer == YES for a in answers)
    return both / chosen if chosen else 1.0, both / right if right else 1.0


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0
