"""ROUGE, as Google's `rouge-score` computes it."""

from collections.abc import Sequence
from statistics import fmean

from silo_agent.tasks.item import Answered

_KINDS = ("rouge1", "rouge2", "rougeL")


def rouge(answers: Sequence[Answered]) -> dict[str, float]:
    """F-measures of ROUGE-1, -2 and -L with stemming; mean over the summaries."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(_KINDS, use_stemmer=True)
    scores = [scorer.score(answer.item.answer, answer.text) for answer in answers]
    return {kind: fmean(score[kind].fmeasure for score in scores) for kind in _KINDS}
