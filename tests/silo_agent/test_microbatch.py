"""Packing examples, where the loss looks, and the order they come in."""

from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codec.errors import DataError
from silo_agent.microbatch import Example, Steps, batches, pack_examples

EXAMPLES = st.lists(
    st.lists(st.tuples(st.integers(0, 500), st.booleans()), min_size=1, max_size=8), min_size=1, max_size=5
)


def example(pairs: list[tuple[int, bool]]) -> Example:
    return Example(tuple(i for i, _ in pairs), tuple(a for _, a in pairs))


@given(EXAMPLES)
def test_packing_keeps_every_token_and_predicts_every_answer(
    rows: list[list[tuple[int, bool]]],
) -> None:
    examples = [example(row) for row in rows]
    # The first token of a sequence has nothing before it that could predict it.
    wanted = [(row[t - 1][0], row[t][0]) for row in rows for t in range(1, len(row)) if row[t][1]]
    if not wanted:
        with pytest.raises(DataError, match="token to learn"):
            pack_examples(examples)
        return
    batch = pack_examples(examples)
    assert batch.lengths == tuple(len(row) for row in rows)
    assert batch.ids.tolist() == [i for row in rows for i, _ in row]
    assert list(zip(batch.ids[batch.keep].tolist(), batch.targets.tolist(), strict=True)) == wanted
    assert {batch.ids.dtype, batch.keep.dtype, batch.targets.dtype} == {torch.int64}


def test_positions_count_over_sequences() -> None:
    batch = pack_examples([Example((7, 8, 9), (False, False, True)), Example((1, 2), (True, True))])
    assert batch.keep.tolist() == [1, 3]
    assert batch.targets.tolist() == [9, 2]


def numbered(count: int) -> list[Example]:
    return [Example((i, i), (True, True)) for i in range(count)]


def order(count: int, size: int, seed: int, taken: int) -> list[int]:
    source = batches(numbered(count), size, seed)
    return [int(i) for batch in islice(source, taken) for i in batch.ids[::2]]


@pytest.mark.parametrize(("count", "size"), [(12, 4), (10, 4), (5, 5), (3, 7), (1, 2)])
def test_each_pass_covers_every_example_once(count: int, size: int) -> None:
    drawn = order(count, size, seed=0, taken=4 * count)
    assert len(drawn) == 4 * count * size
    for at in range(0, len(drawn), count):
        assert sorted(drawn[at : at + count]) == list(range(count))


def test_passes_differ_and_a_seed_repeats_them() -> None:
    first = order(12, 4, seed=0, taken=9)
    assert order(12, 4, seed=0, taken=9) == first
    assert order(12, 4, seed=1, taken=9) != first
    assert len({tuple(first[at : at + 12]) for at in (0, 12, 24)}) == 3
    assert Counter(first) == Counter(dict.fromkeys(range(12), 3))


def test_the_examples_themselves_stay_in_order() -> None:
    examples = numbered(6)
    next(batches(examples, 2, seed=0))
    assert examples == numbered(6)


def test_no_example_at_all_is_an_error_and_not_an_endless_search() -> None:
    with pytest.raises(DataError, match="no example"):
        next(batches([], 2, seed=0))


def test_the_micro_batches_of_a_step_are_the_same_whenever_they_are_asked_for() -> None:
    source = batches(numbered(7), 2, 5)
    expected = [[next(source).ids.tolist() for _ in range(3)] for _ in range(6)]
    steps = Steps(numbered(7), 2, 3, 5)
    for step in (0, 1, 2, 1, 5, 4, 0, 3):
        assert [batch.ids.tolist() for batch in steps[step]] == expected[step]
    assert steps[3] is steps[3], "a step that was prepared is known again"
