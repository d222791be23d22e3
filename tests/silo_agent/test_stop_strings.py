"""Stop strings and characters that are split over tokens, on answers that the test decides."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from silo_agent.generation import Continuation, generate


@dataclass
class Scripted:
    """Answers each row with given tokens, whatever it is asked: the text under test is ours to choose."""

    script: Sequence[Sequence[int]]
    at: dict[int, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.script)

    def extend(self, rows: Sequence[int], _: Sequence[Sequence[int]], *, starts: Sequence[int]) -> Tensor:
        logits = torch.zeros(len(rows), 512)
        for index, row in enumerate(rows):
            self.at[row] = self.at.get(row, -1) + 1
            logits[index, self.script[row][self.at[row]]] = 1.0
        return logits


def said(
    tiny: Any, scripts: Sequence[Sequence[int]], stops: Sequence[str], ends: Sequence[int] = ()
) -> tuple[list[Continuation], list[str]]:
    """The answers, and the rows' pieces joined by a bar."""
    pieces: list[list[str]] = [[] for _ in scripts]
    session: Any = Scripted(scripts)
    answers = generate(
        session,
        tiny.tokenizer,
        [[5]] * len(scripts),
        max_tokens=min(len(script) for script in scripts),
        ends=frozenset(ends),
        stops=stops,
        on_text=lambda row, text: pieces[row].append(text),
    )
    for answer, heard in zip(answers, pieces, strict=True):
        assert "".join(heard) == answer.text
    return answers, ["|".join(heard) for heard in pieces]


def letters(tiny: Any, text: str) -> list[int]:
    """One token for each byte, so that everything is split that can be."""
    table = tiny.tokenizer.backend_tokenizer
    tokens = [token for character in text for token in spelled(table, character)]
    assert tiny.tokenizer.decode(tokens) == text
    return tokens


def spelled(table: Any, character: str) -> list[int]:
    ids: list[int] = table.encode(character).ids
    return ids


@pytest.mark.parametrize(
    ("text", "stops", "expected", "reason"),
    [
        ("one two STOP three", ["STOP"], "one two ", "stop"),
        ("one two STOP", ["STOP"], "one two ", "stop"),
        ("STOP one", ["STOP"], "", "stop"),
        ("one STO two", ["STOP"], "one STO two", "length"),
        ("one two STO", ["STOP"], "one two STO", "length"),
        ("one SSTSTOSTOP two", ["STOP"], "one SSTSTO", "stop"),
        ("aabaabaaac", ["aabaaac"], "aab", "stop"),
        ("one two three", ["two", "one two"], "", "stop"),
        ("one two three", ["three", " t"], "one", "stop"),
        ("one\n\ntwo", ["\n\n"], "one", "stop"),
        ("one\ntwo\n", ["\n\n"], "one\ntwo\n", "length"),
        ("eins Straße zwei", ["ße"], "eins Stra", "stop"),
        ("東京タワー", ["京タ"], "東", "stop"),
        ("one two", [""], "one two", "length"),
    ],
)
def test_the_text_before_a_stop_string_and_no_more(
    tiny: Any, text: str, stops: list[str], expected: str, reason: str
) -> None:
    (answer,), (heard,) = said(tiny, [letters(tiny, text)], stops)
    assert (answer.text, answer.reason) == (expected, reason)
    assert heard.replace("|", "") == expected


def test_only_what_may_begin_a_stop_string_is_held_back(tiny: Any) -> None:
    _, (heard,) = said(tiny, [letters(tiny, "ab STO cd")], ["STOP"])
    assert heard == "a|b| |STO |c|d"


def test_a_stop_string_within_one_token(tiny: Any) -> None:
    tokens = tiny.tokenizer(" capital river", add_special_tokens=False)["input_ids"]
    assert any(len(tiny.tokenizer.decode([token])) > 4 for token in tokens)
    (answer,), _ = said(tiny, [tokens], ["it"])
    assert answer.text == " cap"


def test_rows_stop_one_by_one(tiny: Any) -> None:
    scripts = [letters(tiny, text) for text in ("ab.cdefgh", "abcdefgh.", "abcdefghi")]
    answers, _ = said(tiny, scripts, ["."])
    assert [answer.text for answer in answers] == ["ab", "abcdefgh", "abcdefghi"]
    assert [len(answer.tokens) for answer in answers] == [3, 9, 9]
    assert [answer.reason for answer in answers] == ["stop", "stop", "length"]


def test_text_held_back_comes_out_at_the_end_token(tiny: Any) -> None:
    (answer,), _ = said(tiny, [[*letters(tiny, "one STO"), 2, 5]], ["STOP"], ends=[2])
    assert (answer.text, answer.reason) == ("one STO", "stop")


def test_characters_split_over_tokens_come_whole(tiny: Any) -> None:
    text = "été 東京 🙂"
    tokens = letters(tiny, text)
    assert len(tokens) > len(text)
    _, (heard,) = said(tiny, [tokens], [])
    assert heard == "|".join(text)


@pytest.mark.parametrize("ends", [(), (2,)])
def test_an_incomplete_character_at_the_end_is_not_lost(tiny: Any, ends: tuple[int, ...]) -> None:
    """As `decode` shows it; transformers' text of these tokens is the same."""
    tokens = [*letters(tiny, "abc 🙂")[:-1], *ends]
    (answer,), (heard,) = said(tiny, [tokens], [], ends)
    assert answer.text == tiny.tokenizer.decode(tokens, skip_special_tokens=True) == "abc �"
    assert heard == "a|b|c| |�"


def test_bytes_that_are_no_character_appear_as_decode_shows_them(tiny: Any) -> None:
    smile = letters(tiny, "🙂")
    tokens = [*smile[:2], *letters(tiny, "x"), smile[-1], *letters(tiny, "é")[1:], *letters(tiny, "yz")]
    (answer,), _ = said(tiny, [tokens], [])
    assert answer.text == tiny.tokenizer.decode(tokens)
    assert answer.text.count("�") >= 3
