"""Metrics against values worked out by hand from the official definitions."""

from collections.abc import Callable

import pytest

from silo_agent.tasks.item import Answered, Item
from silo_agent.tasks.labels import accuracy, accuracy_and_macro_f1, multirc
from silo_agent.tasks.rouge import rouge
from silo_agent.tasks.words import best_match, exact, human_match, normal_words, overlap

Answers = Callable[..., list[Answered]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Cat's (a) hat!", ["cats", "hat"]),
        ("An apple, another, theory", ["apple", "another", "theory"]),
        ("U.S.-led", ["usled"]),
        ("a-the", ["athe"]),
        ("\tÉcole  DU\nparc ", ["école", "du", "parc"]),
        ("the a an .", []),
        ("'s", ["s"]),
    ],
)
def test_normalisation(text: str, words: list[str]) -> None:
    """Punctuation goes first and leaves no space; articles are whole words; `string.punctuation` is ASCII."""
    assert normal_words(text) == words


@pytest.mark.parametrize(
    ("text", "right", "f1", "em"),
    [
        ("the white cat", "White cat!", 1, 1),
        ("white cat", "cat white", 1, 0),
        ("a white kitten named Cotton", "white", 2 * (1 / 4) * 1 / (1 / 4 + 1), 0),
        ("cat cat", "cat", 2 * 0.5 * 1 / 1.5, 0),
        ("dog", "cat", 0, 0),
        ("", "cat", 0, 0),
        ("the", "a", 1, 1),
    ],
)
def test_overlap_and_exact_match(text: str, right: str, f1: float, em: float) -> None:
    assert overlap(text, right) == pytest.approx(f1)
    assert exact(text, right) == em


def test_record_takes_the_best_of_all_right_answers(answered: Answers) -> None:
    answers = answered(
        ("Bhutto", ["Benazir Bhutto", "Bhutto"]),  # 1 and 1
        ("Asif Ali Zardari", ["Asif Zardari", "Zardari"]),  # max(4/5, 2/4) and 0
        ("CNN", ["Pakistan"]),
    )
    assert best_match(answers) == pytest.approx({"f1": (1 + 0.8) / 3, "em": 1 / 3})


def test_coqa_leaves_each_of_several_right_answers_out_once(answered: Answers) -> None:
    """The official script: mean over i of the best match with all answers but the i-th."""
    one = answered(("white", ["white"]))
    assert human_match(one) == {"f1": 1, "em": 1}
    # Against [white | black, grey, white]: without 'white' (twice) the other still matches.
    twice = answered(("white", ["white", "black", "grey", "white"]))
    assert human_match(twice) == {"f1": 1, "em": 1}
    # Only one of four matches: it is left out once, so 3/4.
    alone = answered(("white", ["white", "black", "grey", "brown"]))
    assert human_match(alone) == {"f1": 0.75, "em": 0.75}
    # 'white cat': F1 2/3 with 'white', 1 with 'white cat', 0 with 'no': without each (1, 2/3, 1).
    parts = answered(("white cat", ["white", "white cat", "no"]))
    assert human_match(parts) == pytest.approx({"f1": (1 + 2 / 3 + 1) / 3, "em": 2 / 3})
    assert human_match(one + alone)["em"] == pytest.approx((1 + 0.75) / 2)


def test_accuracy(answered: Answers) -> None:
    answers = answered(("Yes", "Yes"), ("No", "Yes"), ("No", "No"), ("Yes", "Yes"))
    assert accuracy(answers) == {"accuracy": 0.75}


def test_cbs_macro_f1_is_scikit_learns(answered: Answers) -> None:
    """`f1_score([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1], average="macro")` is 0.26… in its documentation."""
    names = ("Yes", "No", "Maybe")
    pairs = zip([0, 2, 1, 0, 0, 1], [0, 1, 2, 0, 1, 2], strict=True)
    answers = answered(*((names[said], names[right]) for said, right in pairs))
    assert accuracy_and_macro_f1(answers) == pytest.approx({"accuracy": 2 / 6, "macro_f1": 0.8 / 3})
    # A label that is neither right nor chosen anywhere does not count; one that is only chosen does.
    assert accuracy_and_macro_f1(answers[:1])["macro_f1"] == 1
    odd = answered(("Yes", "Yes"), ("Maybe", "Yes"))
    assert accuracy_and_macro_f1(odd)["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def marked(*questions: str) -> list[Answered]:
    """Answers from words such as `tp fn`: true and false, positive and negative."""
    said = {"tp": "Yes", "fp": "Yes", "tn": "No", "fn": "No"}
    right = {"tp": "Yes", "fn": "Yes", "tn": "No", "fp": "No"}
    return [
        Answered(Item("here", "?", right[word], group=f"question {number}"), said[word])
        for number, words in enumerate(questions)
        for word in words.split()
    ]


@pytest.mark.parametrize(
    ("questions", "f1a", "f1m", "em"),
    [
        (["tp tn", "tp tp tn"], 1, 1, 1),
        # All: precision 3/4, recall 3/4. By question: precision (1 + 2/3) / 2, recall (1/2 + 1) / 2.
        (["tp fn tn", "tp tp fp"], 3 / 4, 2 * (5 / 6) * (3 / 4) / (5 / 6 + 3 / 4), 0),
        # Nothing chosen: precision 1. Nothing right: recall 1.
        (["fn fn", "tp tn"], 2 * 1 * (1 / 3) / (4 / 3), 2 * 1 * 0.5 / 1.5, 0.5),
        (["fp", "tp"], 2 * 0.5 * 1 / 1.5, 2 * 0.5 * 1 / 1.5, 0.5),
        (["fp fn"], 0, 0, 0),
        (["tn", "tn"], 1, 1, 1),
    ],
)
def test_multirc(questions: list[str], f1a: float, f1m: float, em: float) -> None:
    assert multirc(marked(*questions)) == pytest.approx({"f1a": f1a, "f1m": f1m, "em": em})


def test_rouge_is_the_librarys(answered: Answers) -> None:
    """The library's own example: 6 of 9 and 8 words, 2 of 8 and 7 pairs, 5 in order."""
    pytest.importorskip("rouge_score")
    example = ("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog")
    f = {"rouge1": 2 * 6 / 17, "rouge2": 2 * 2 / 15, "rougeL": 2 * 5 / 17}
    assert rouge(answered(example)) == pytest.approx(f)
    assert rouge(answered(("Dogs were jumping", "dog jump")))["rouge1"] == pytest.approx(2 * 2 / 5)  # stems
    half = rouge(answered(example, ("", "something")))
    assert half == pytest.approx({name: value / 2 for name, value in f.items()})
