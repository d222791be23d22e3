"""Answers of the split model against plain transformers on the whole one."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec.messages import Extend
from silo_agent.tasks.answering import Held, choose, likelihoods, rounds, write
from silo_agent.tasks.exam import Exam
from silo_agent.tasks.item import Item
from silo_agent.tasks.rendering import LLAMA2, Rendering
from silo_agent.tasks.source import read_threads
from silo_agent.tasks.task import find_task

STORY = "A heron stood in the shallow water and waited for the fish to come back to it."
THREADS = [
    [
        Item(
            "f", f"Who {verb}?", "A heron", context=STORY, candidates=("A heron", "The fish", "Nobody at all")
        )
        for verb in ("waited", "came", "left")
    ],
    [Item("f", "Is it so?", "Yes", candidates=("No", "Yes", "Maybe", "Maybe not, but who knows"))],
    [Item("f", "Why?", "Yes", context=STORY[:30], candidates=("No", "Yes")) for _ in range(2)],
]


def whole_likelihoods(tiny: Any, item: Item, template: str | None) -> list[tuple[float, int]]:
    """Each candidate's text behind the prompt, in one plain pass each."""
    tokenizer, found = tiny.tokenizer, []
    messages = [
        {"role": "user", "content": f"{item.context}\n\n{item.question}" if item.context else item.question}
    ]
    prompt = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    for candidate in item.candidates:
        before = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        text = f"{prompt} {candidate}" if template else prompt + candidate
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        logs = tiny.logits(ids).log_softmax(-1)
        parts = [float(logs[at - 1, ids[at]]) for at in range(before, len(ids))]
        found.append((sum(parts), len(parts)))
    return found


@pytest.mark.parametrize("template", [None, LLAMA2])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_likelihoods_are_the_whole_models(pool: Any, tiny: Any, rows: int, template: str | None) -> None:
    rendering = Rendering(tiny.tokenizer, 400, template)
    held, numbered = Held(), [[(item, rendering.choices(item)) for item in thread] for thread in THREADS]
    with pool.session(rows=rows, capacity=400) as session:
        asked = 0
        for part in rounds(numbered, rows):
            found = likelihoods(session, [choices for _, choices in part], held)
            for (item, _), scores in zip(part, found, strict=True):
                asked += 1
                expected = whole_likelihoods(tiny, item, template)
                assert [tokens for _, tokens in scores] == [tokens for _, tokens in expected]
                assert [total for total, _ in scores] == pytest.approx([t for t, _ in expected], abs=1e-4)
    assert asked == 6


@pytest.mark.parametrize("per_token", [False, True])
def test_the_likeliest_is_chosen_in_the_items_order(pool: Any, tiny: Any, per_token: bool) -> None:
    rendering = Rendering(tiny.tokenizer, 400)
    expected = []
    for thread in THREADS:
        for item in thread:
            scores = whole_likelihoods(tiny, item, None)
            measured = [total / tokens if per_token else total for total, tokens in scores]
            expected.append(item.candidates[measured.index(max(measured))])
    done: list[int] = []
    task = find_task("copa" if per_token else "boolq", None, "")
    assert task is not None
    exam = Exam(lambda rows, capacity: pool.session(rows=rows, capacity=capacity), 2, done.append)
    answers = exam.answers(task, THREADS, rendering, frozenset())
    assert [answer.text for answer in answers] == expected
    assert [answer.item for answer in answers] == [item for thread in THREADS for item in thread]
    assert sum(done) == 6


def test_only_what_is_not_shared_crosses(pool: Any, tiny: Any) -> None:
    """A second question about the same text sends its own words; single tokens need no second pass."""
    rendering = Rendering(tiny.tokenizer, 400)
    thread = [Item("f", f"Is it {w}?", "Yes", context=STORY * 3, candidates=("Yes", "No")) for w in "ab"]
    choices = [rendering.choices(item) for item in thread]
    with pool.session(capacity=400) as session:
        choose(session, [choices], rows=1, per_token=False, progress=lambda _: None)
    lengths = [parcel.header.lengths for parcel in pool.sent(Extend)]
    single = all(len(rest) == 1 for rest in choices[0].continuations)
    first, second = (lengths[0][0], lengths[1 if single else 3][0])
    assert first == len(choices[0].prompt)
    assert second < 30 < first


def test_written_answers_are_greedy_and_reuse_the_dialogue(pool: Any, tiny: Any) -> None:
    turns = (("Who waited?", "A heron."), ("Where?", "In the water."))
    dialogue = [
        Item("f", ask, "x", context=STORY, earlier=turns[:number])
        for number, ask in enumerate(["Who waited?", "Where?", "Why?"])
    ]
    threads = [dialogue, [Item("f", "Who is it?", "x")], dialogue[:1]]
    rendering = Rendering(tiny.tokenizer, 400)
    prompts = [[rendering.prompt(item) for item in thread] for thread in threads]
    with pool.session(rows=2, capacity=400) as session:
        texts = write(
            session,
            tiny.tokenizer,
            prompts,
            rows=2,
            new_tokens=7,
            ends=frozenset(),
            progress=lambda _: None,
        )
    for thread, found in zip(prompts, texts, strict=True):
        for prompt, text in zip(thread, found, strict=True):
            greedy = tiny.tokenizer.decode(tiny.greedy(prompt, 7), skip_special_tokens=True)
            assert text == greedy.strip()
    sizes = [sum(parcel.header.lengths) for parcel in pool.sent(Extend)]
    assert sum(sizes) < sum(len(prompt) for thread in prompts for prompt in thread)


@given(sizes=st.lists(st.integers(0, 5), max_size=8), rows=st.integers(1, 5))
def test_rounds_keep_threads_in_order_and_rows_full(sizes: list[int], rows: int) -> None:
    threads = [[(thread, at) for at in range(size)] for thread, size in enumerate(sizes)]
    done = list(rounds(threads, rows))
    assert sorted(member for part in done for member in part) == sorted(m for t in threads for m in t)
    for thread in threads:
        assert [member for part in done for member in part if member in thread] == thread
    places: dict[int, int] = {}
    for number, part in enumerate(done):
        assert 1 <= len(part) <= rows
        assert len({thread for thread, _ in part}) == len(part)
        # Only with fewer threads than rows may one move.
        for row, (thread, _) in enumerate(part):
            assert places.setdefault(thread, row) == row or len(part) < rows
            places[thread] = row
        left = {member[0] for later in done[number:] for member in later}
        assert len(part) == min(rows, len(left))


@given(
    prompts=st.lists(st.lists(st.lists(st.integers(0, 1), min_size=1), min_size=2, max_size=2), max_size=5)
)
def test_what_rows_hold(prompts: list[list[list[int]]]) -> None:
    """A start is never beyond what the row really holds, and leaves a token to run."""
    held, rows = Held(), [[], []]
    for asked in prompts:
        starts = held.begin(asked)
        for row, (start, prompt) in enumerate(zip(starts, asked, strict=True)):
            assert start < len(prompt)
            assert rows[row][:start] == prompt[:start]
            most = next((i for i, (a, b) in enumerate(zip(rows[row], prompt, strict=False)) if a != b), None)
            longest = min(len(rows[row]), len(prompt)) if most is None else most
            assert start == min(longest, len(prompt) - 1)
            rows[row] = prompt


@pytest.mark.parametrize("name", ["record", "copa", "multirc", "cb"])
def test_real_questions_are_answered_as_the_whole_model_does(
    pool: Any, tiny: Any, real: Path, name: str
) -> None:
    task = find_task(name, None, "")
    assert task is not None
    place = {"record": "ReCoRD", "copa": "COPA", "multirc": "MultiRC", "cb": "CB"}[name]
    data = str(real / "superglue" / place / "dev32.jsonl")
    threads = list(read_threads(task, data, "validation", 2))
    exam = Exam(lambda rows, capacity: pool.session(rows=rows, capacity=capacity), 3, lambda _: None)
    answers = exam.answers(task, threads, Rendering(tiny.tokenizer, 2048), frozenset())
    for answer in answers[:8]:
        scores = whole_likelihoods(tiny, answer.item, None)
        measured = [total / tokens if task.per_token else total for total, tokens in scores]
        chosen = measured[answer.item.candidates.index(answer.text)]
        assert chosen == pytest.approx(max(measured), abs=1e-4)
    assert task.score is not None
    assert all(0 <= value <= 1 for value in task.score(answers).values())
